"""The starting recipe for one's own data makes a model that runs."""

from __future__ import annotations

import torch

from vitgraft.configs.load import load_recipe
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
