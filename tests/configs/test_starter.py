"""The starting recipe for one's own data makes a model that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.build import build_model
from vitgraft.models.layer_decay import layer_of
from vitgraft.trainer.param_groups import ParameterFacts, make_groups


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


def decays(name: str) -> dict[str, float]:
    """Weight decay of every parameter of a starter, by name."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build_model(recipe.model, num_classes=3, image_size=(64, 64))
    depth = model.backbone.depth
    facts = [ParameterFacts(name, parameter.ndim) for name, parameter in model.named_parameters()]
    groups = make_groups(recipe.train, facts, lambda name: layer_of(name, depth), depth)
    return {name: group.weight_decay for group in groups for name in group.names}


def test_the_vit_adapter_starters_decay_as_published() -> None:
    """Detection spares positions and level embeddings by name; under layer-wise decay, in segmentation, they decay."""
    for name, expected in ("starter/coco_vit_adapter", 0.0), ("starter/semantic_vit_adapter", 0.01):
        found = decays(name)
        assert [found["backbone.vit.pos_embed"], found["adapter.level_embed"]] == [expected, expected]
        assert found["backbone.vit.blocks.0.norm1.weight"] == found["backbone.vit.blocks.0.attn.qkv.bias"] == 0.0
        assert found["backbone.vit.blocks.0.attn.qkv.weight"] == {0.0: 0.05, 0.01: 0.01}[expected]


def test_the_semantic_starter_scales_the_short_side_as_published() -> None:
    """mmseg's ratio of 0.5 to 2 of (2048, 512), and crops of which no class has three quarters."""
    first, second, *_ = load_recipe("starter/semantic_vit_adapter").data.transforms
    assert first.model_dump() == {"name": "multi_scale", "short": [256, 1024], "max_long": 4096, "sampling": "range"}
    assert second.model_dump()["cat_max_ratio"] == 0.75
