"""The starting recipe for one's own data makes a model that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.build import build_model


def test_the_coco_starter_predicts_and_gives_losses_on_a_smaller_canvas() -> None:
    recipe = load_recipe("starter/coco", ["data.image_size=[64, 96]", "model.head.rpn_proposals=20"])
    assert recipe.task == "detection"
    assert recipe.model.backbone.weights is None
    torch.manual_seed(0)
    model = build_model(recipe.model, num_classes=3, image_size=(64, 96))
    images, sizes = torch.randn(1, 3, 64, 96), torch.tensor([[64, 80]])
    model.train()
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[0, 10:40, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask}
    losses = model(images, sizes, [target], torch.ones(1))
    assert {"box_class", "box_regression", "mask"} < set(losses)
    assert all(term.total.isfinite() for term in losses.values())
    model.eval()
    with torch.no_grad():
        (prediction,) = model(images, sizes)
    assert set(prediction) == {"boxes", "labels", "scores", "masks"}
    assert (prediction["boxes"][:, 2] <= 80).all()
    assert (prediction["labels"] < 3).all()


@pytest.mark.parametrize("name", ["starter/coco_vit_adapter", "starter/semantic_vit_adapter"])
def test_the_vit_adapter_starters_build_as_published(name: str) -> None:
    """27.5 and 99.5 million parameters at 224 pixels are the published ViT-Adapter-S and B."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build_model(recipe.model, num_classes=80, image_size=(224, 224))
    trunk_and_adapter = [p.numel() for part in (model.backbone, model.adapter) for p in part.parameters()]
    assert round(sum(trunk_and_adapter) / 1e6, 1) == {"detection": 27.5, "semantic": 99.5}[recipe.task]


@pytest.mark.parametrize("name", ["starter/coco_vit_adapter", "starter/semantic_vit_adapter"])
def test_the_vit_adapter_starters_run(name: str) -> None:
    """The recipe itself with a narrower trunk and head, on a small canvas that is no multiple of 32."""
    narrow = ["model.backbone.embed_dim=48", "model.backbone.num_heads=3"]
    tree = load_recipe(name, narrow).model.model_dump()
    for part in tree["adapter"]:
        if part["name"] == "vit_adapter":
            part["deform_num_heads"] = 3
    head = {"mask_rcnn": {"box_channels": 32, "mask_channels": 16, "rpn_proposals": 20}, "upernet": {"channels": 16}}
    tree["head"].update(head[tree["head"]["name"]])
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate(tree), num_classes=3, image_size=(72, 104)).train()
    images, sizes = torch.randn(2, 3, 72, 104), torch.tensor([[72, 104], [64, 80]])
    targets: Any
    if tree["head"]["name"] == "upernet":
        targets = torch.randint(3, (2, 72, 104))
    else:
        mask = torch.zeros(1, 72, 104, dtype=torch.uint8)
        mask[0, 10:40, 20:60] = 1
        box = torch.tensor([[20.0, 10.0, 60.0, 40.0]])
        targets = [{"boxes": box, "labels": torch.tensor([1]), "masks": mask}] * 2
    losses = model(images, sizes, targets, torch.ones(2))
    torch.stack([term.total for term in losses.values()]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(term.total.isfinite() for term in losses.values())
