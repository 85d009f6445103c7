"""Mask R-CNN against torchvision's own: losses, predictions, masks; and steps without objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from model_samples import CLASSES, HEADS, batch_of, loss_of, model_of
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import MaskRCNNConfig
from vitgraft.models.heads import mask_rcnn
from vitgraft.models.heads.mask_rcnn import MaskRCNN, paste_masks
from vitgraft.models.heads.rpn import Level

SIZE = (64, 96)
NAMES = {
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "box_class",
    "loss_box_reg": "box_regression",
    "loss_mask": "mask",
}


def torchvision_twin(head: MaskRCNN, options: dict[str, Any]) -> tuple[RegionProposalNetwork, RoIHeads]:
    """torchvision's RPN and RoI heads with the same modules; its mask predictor has one more map, the background's."""
    count = {"training": options["rpn_proposals"], "testing": options["rpn_proposals"]}
    rpn = RegionProposalNetwork(
        head.rpn.anchor_generator, head.rpn.head, 0.7, 0.3, options["rpn_batch"], 0.5, count, count, 0.7
    )
    ours = head.mask_predictor
    predictor = MaskRCNNPredictor(options["mask_channels"], options["mask_channels"], CLASSES + 1)
    predictor.conv5_mask = ours.conv5_mask
    with torch.no_grad():
        predictor.mask_fcn_logits.weight[1:] = ours.mask_fcn_logits.weight
        predictor.mask_fcn_logits.bias[1:] = ours.mask_fcn_logits.bias
    roi = RoIHeads(
        MultiScaleRoIAlign(["4", "8", "16"], 7, 2),
        head.box_head,
        head.box_predictor,
        0.5,
        0.5,
        options["roi_batch"],
        0.25,
        None,
        options["score_threshold"],
        0.5,
        options["detections_per_image"],
        MultiScaleRoIAlign(["4", "8", "16"], 14, 2),
        head.mask_head,
        predictor,
    )
    return rpn, roi


def maps_of(batch: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        stride: torch.randn(batch, 16, SIZE[0] // stride, SIZE[1] // stride, generator=generator)
        for stride in (4, 8, 16)
    }


@pytest.mark.parametrize("roi_batch", [16, 512])
def test_losses_and_predictions_equal_torchvisions(roi_batch: int) -> None:
    options = HEADS["mask_rcnn"] | {"roi_batch": roi_batch, "score_threshold": 0.05}
    head = model_of("mask_rcnn", size=SIZE, **options).head
    rpn, roi = torchvision_twin(head, options)
    maps, batch = maps_of(3), batch_of("mask_rcnn", 3, SIZE)
    images = ImageList(batch["images"], [SIZE] * 3)
    named = {str(stride): level for stride, level in maps.items()}
    targets = [target | {"labels": target["labels"] + 1} for target in batch["targets"]]

    torch.manual_seed(7)
    losses = head(maps, batch["sizes"], SIZE, batch["targets"])
    torch.manual_seed(7)
    proposals, expected = rpn(images, named, targets)
    expected |= roi(named, proposals, images.image_sizes, targets)[1]
    assert {NAMES[name] for name in expected} == set(losses)
    for name, value in expected.items():
        total, count = losses[NAMES[name]]
        assert torch.isclose(total / count, value, rtol=1e-5), name

    head.eval(), rpn.eval(), roi.eval()
    with torch.no_grad():
        ours = head(maps, batch["sizes"], SIZE)
        theirs = roi(named, rpn(images, named)[0], images.image_sizes)[0]
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine["boxes"]) > 0
        assert torch.equal(mine["labels"], other["labels"] - 1)
        for key in ("boxes", "scores"):
            torch.testing.assert_close(mine[key], other[key], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(mine["masks"], other["masks"][:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["no objects", "no weights", "no valid pixels", "no masks", "no positives"])
def test_every_parameter_takes_part_in_every_step(case: str) -> None:
    model = model_of("mask_rcnn", masks=case != "no masks", roi_positive_fraction=float(case != "no positives"))
    batch = batch_of("mask_rcnn")
    if case in ("no objects", "no valid pixels"):
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        batch["targets"] = [empty | {"masks": torch.zeros(0, 64, 64, dtype=torch.uint8)}] * 2
    if case in ("no weights", "no valid pixels"):
        batch["weights"] = torch.zeros(2)
    if case == "no valid pixels":
        batch["sizes"] = torch.zeros(2, 2, dtype=torch.int64)
    losses = model(**batch)
    loss_of(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    if case in ("no weights", "no valid pixels"):
        assert all(term.count == 0 and term.total == 0 for term in losses.values())
        assert all(gradient.abs().max() == 0 for gradient in gradients.values())
    if case in ("no objects", "no positives"):
        assert losses["mask"].count == 0
        assert losses["box_class"].count > 0


def test_nothing_is_proposed_or_sampled_in_the_padding() -> None:
    model = model_of("mask_rcnn", roi_batch=10000, rpn_batch=10000)
    batch = batch_of("mask_rcnn")
    for target in batch["targets"]:
        target["boxes"] = target["boxes"].clamp(max=31)
    batch["sizes"] = torch.tensor([[32, 48], [64, 64]])
    maps = model.adapter.maps(model.backbone, batch["images"])
    levels = [maps[stride] for stride in (4, 8, 16)]
    proposals, losses = model.head.rpn(levels, batch["sizes"], batch["targets"], torch.tensor([1.0, 0.0]))
    assert len(proposals[0]) > 0
    assert (proposals[0] <= torch.tensor([48, 32, 48, 32])).all()
    places = sum((32 // stride) * (48 // stride) for stride in (4, 8, 16))
    # Three ratios at each valid place; those between the thresholds are not sampled.
    assert 0 < losses["rpn_objectness"].count <= 3 * places
    with torch.no_grad():
        predictions = model.eval()(batch["images"], batch["sizes"])
    assert (predictions[0]["boxes"] <= torch.tensor([48, 32, 48, 32])).all()


def test_levels_are_those_of_the_pyramid_paper() -> None:
    side = torch.tensor([1.0, 50, 111.9, 112, 200, 223.9, 224, 447, 448, 2000])
    boxes = [torch.stack([torch.zeros_like(side), torch.zeros_like(side), side, side], 1)]
    assert torch.equal(Level([4, 8, 16, 32])(boxes), LevelMapper(2, 5)(boxes))
    assert Level([4, 8, 16])(boxes).max() == 2
    assert Level([7, 14])(boxes).tolist() == [0] * 4 + [1] * 6  # 14 × 14 = 196 pixels


def test_a_fifth_level_only_proposes() -> None:
    strides = [4, 8, 16, 32, 64]
    config = MaskRCNNConfig.model_validate(
        HEADS["mask_rcnn"] | {"anchor_sizes": [8, 16, 32, 64, 128], "rpn_batch": 10000}
    )
    head = MaskRCNN(config, channels=dict.fromkeys(strides, 16), num_classes=CLASSES)
    maps = {stride: torch.randn(2, 16, 64 // stride, 64 // stride, requires_grad=True) for stride in strides}
    batch = batch_of("mask_rcnn")
    losses = head(maps, batch["sizes"], (64, 64), batch["targets"])
    (of_boxes,) = torch.autograd.grad(losses["box_class"].total, maps[64], allow_unused=True, retain_graph=True)
    (of_proposals,) = torch.autograd.grad(losses["rpn_objectness"].total, maps[64])
    assert of_boxes is None
    assert of_proposals.abs().max() > 0


def test_one_anchor_size_for_each_stride() -> None:
    with pytest.raises(ConfigError, match=r"\[8\] for the maps of strides \[4, 8\]"):
        MaskRCNN(MaskRCNNConfig(anchor_sizes=[8]), channels={4: 16, 8: 16}, num_classes=3)


def test_pasted_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.zeros(3, 28, 28)
    masks[0] = 1
    masks[1, :, :14] = 1
    boxes = torch.tensor([[2.0, 3, 12, 9], [4, 4, 14, 10], [0, 0, 20, 16]])
    pasted = paste_masks(masks, boxes, (16, 20))
    assert pasted.dtype == torch.uint8
    assert pasted.shape == (3, 16, 20)
    expected = np.zeros((16, 20), np.uint8)
    expected[3:9, 2:12] = 1
    # Probabilities are interpolated across the edge, so the outermost pixels may go either way.
    assert np.array_equal(pasted[0].numpy()[4:8, 3:11], expected[4:8, 3:11])
    assert pasted[0].sum() <= 8 * 12
    assert pasted[1][:, 11:].sum() == 0
    assert pasted[1][5:9, 5:8].all()
    assert pasted[2].sum() == 0
    monkeypatch.setattr(mask_rcnn, "PASTE_BYTES", 1)
    assert torch.equal(paste_masks(masks, boxes, (16, 20)), pasted)
    assert paste_masks(masks[:0], boxes[:0], (16, 20)).shape == (0, 16, 20)
