"""The region proposal network (arXiv 1506.01497) over maps of any strides, with losses as sums.

Anchors, matching, sampling and box coding are torchvision's. Two things are this file's own: losses are sums with
per-image weights beside their normaliser, and anchors whose centre lies in an image's padding are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import boxes as box_ops

from vitgraft.models.contract import DetectionTarget, Losses, LossTerm

POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
NMS_IOU = 0.7
SMALLEST = 1e-3
"""Proposals with a shorter side (pixels) are dropped."""
SMOOTH_L1_BETA = 1 / 9


class RegionProposalNetwork(nn.Module):
    """Proposals from maps of several strides.

    ``channels``: of every map. ``strides``: ascending. ``sizes``: one anchor size (pixels) for each stride. ``ratios``:
    height / width. ``batch``: anchors sampled per image. ``proposals``: kept per image; at most as many enter
    non-maximum suppression from each stride.
    """

    def __init__(
        self, channels: int, strides: list[int], sizes: list[int], ratios: list[float], batch: int, proposals: int
    ) -> None:
        super().__init__()
        self.strides = strides
        self.head = RPNHead(channels, len(ratios))
        self.anchor_generator = AnchorGenerator(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))
        self.proposals = proposals
        self._coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self._matcher = Matcher(POSITIVE_IOU, NEGATIVE_IOU, allow_low_quality_matches=True)
        self._sampler = BalancedPositiveNegativeSampler(batch, 0.5)

    def forward(
        self, maps: list[Tensor], sizes: Tensor, targets: list[DetectionTarget] | None, weights: Tensor
    ) -> tuple[list[Tensor], Losses]:
        """maps: (B, C, H/stride, W/stride) by stride; sizes: (B, 2) valid height and width; weights: (B,).

        Returns the proposals of each image, (P, 4) float32 xyxy by falling score, and the losses ``rpn_objectness`` and
        ``rpn_box`` (none without targets).
        """
        logits_by_level, deltas_by_level = self.head(maps)
        with torch.autocast(maps[0].device.type, enabled=False):
            anchors = self._anchors(maps)
            logits = torch.cat([_flat(level, 1) for level in logits_by_level], 1).squeeze(2).float()
            deltas = torch.cat([_flat(level, 4) for level in deltas_by_level], 1).float()
            padding = _centre_in_padding(torch.cat(anchors), sizes)
            proposals = self._propose(logits.detach(), deltas.detach(), anchors, padding, sizes)
            losses = {} if targets is None else self._losses(logits, deltas, anchors, padding, targets, weights)
        return proposals, losses

    def _anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """(A, 4) float32 xyxy of each stride, in the order of the flattened maps."""
        self.anchor_generator.set_cell_anchors(torch.float32, maps[0].device)
        grids = [list(level.shape[-2:]) for level in maps]
        anchors: list[Tensor] = self.anchor_generator.grid_anchors(grids, [[stride, stride] for stride in self.strides])
        return anchors

    @torch.no_grad()
    def _propose(
        self, logits: Tensor, deltas: Tensor, anchors: list[Tensor], padding: Tensor, sizes: Tensor
    ) -> list[Tensor]:
        logits = logits.masked_fill(padding, -torch.inf)
        chosen, levels, start = [], [], 0
        for level, level_anchors in enumerate(anchors):
            count = min(self.proposals, len(level_anchors))
            top = logits[:, start : start + len(level_anchors)].topk(count, dim=1).indices + start
            chosen.append(top)
            levels.append(torch.full((count,), level, device=logits.device))
            start += len(level_anchors)
        index, level_of = torch.cat(chosen, 1), torch.cat(levels)
        scores = logits.gather(1, index)
        picked = deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = self._coder.decode_single(picked.reshape(-1, 4), torch.cat(anchors)[index.reshape(-1)])
        boxes = clip_boxes(boxes.reshape(len(logits), -1, 4), sizes)
        usable = (scores > -torch.inf) & ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST).all(2)
        return [self._suppress(*image, level_of) for image in zip(boxes, scores, usable, strict=True)]

    def _suppress(self, boxes: Tensor, scores: Tensor, usable: Tensor, level_of: Tensor) -> Tensor:
        boxes, scores, level_of = boxes[usable], scores[usable], level_of[usable]
        kept: Tensor = boxes[box_ops.batched_nms(boxes, scores, level_of, NMS_IOU)[: self.proposals]]
        return kept

    def _losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: list[Tensor],
        padding: Tensor,
        targets: list[DetectionTarget],
        weights: Tensor,
    ) -> Losses:
        every = torch.cat(anchors)
        labels, matched = self._match(every, padding, targets)
        positive, negative = (torch.stack(masks).bool() for masks in self._sampler(labels))
        image, anchor = torch.where(positive | negative)
        weight = weights[image]
        wanted = torch.stack(labels)[image, anchor].clamp(min=0)
        objectness = F.binary_cross_entropy_with_logits(logits[image, anchor], wanted, weight, reduction="sum")
        count = weight.sum()
        image, anchor = torch.where(positive)
        shift = self._coder.encode_single(torch.stack(matched)[image, anchor], every[anchor])
        error = F.smooth_l1_loss(deltas[image, anchor], shift, beta=SMOOTH_L1_BETA, reduction="none").sum(1)
        return {
            "rpn_objectness": LossTerm(objectness, count),
            "rpn_box": LossTerm((error * weights[image]).sum(), count),
        }

    @torch.no_grad()
    def _match(
        self, anchors: Tensor, padding: Tensor, targets: list[DetectionTarget]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each image the anchors' labels (1 object, 0 background, -1 ignored), (A,) float32, and boxes, (A, 4)."""
        labels, matched = [], []
        for target, outside in zip(targets, padding, strict=True):
            boxes = target["boxes"].float()
            if len(boxes) == 0:
                label, box = torch.zeros(len(anchors), device=anchors.device), anchors
            else:
                match = self._matcher(box_ops.box_iou(boxes, anchors))
                label = (match >= 0).float()
                label[match == Matcher.BETWEEN_THRESHOLDS] = -1.0
                box = boxes[match.clamp(min=0)]
            label[outside] = -1.0
            labels.append(label)
            matched.append(box)
        return labels, matched


class Level(NamedTuple):
    """Assignment of RoIs to pyramid levels: the thresholds on the square root of their area, for any strides."""

    strides: list[int]

    def __call__(self, boxes: list[Tensor]) -> Tensor:
        """The index of the map that each RoI, (N, 4) xyxy in pixels, is read from: (N,) int64.

        Equation 1 of the feature pyramid networks (arXiv 1612.03144) says that a RoI of 224 pixels belongs to stride
        16; so it covers at least 14 places of its map, which is a rule for strides that are no powers of two as well.
        """
        side = torch.cat([box_ops.box_area(box) for box in boxes]).sqrt()
        bounds = torch.tensor([14.0 * stride for stride in self.strides[1:]], device=side.device)
        return torch.bucketize(side * (1 + 1e-6), bounds, right=True)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (B, P, 4) xyxy cut to each image's valid part; sizes: (B, 2) height and width."""
    limit = sizes.to(boxes.dtype).flip(1).repeat(1, 2)[:, None]
    return boxes.clamp(min=0).minimum(limit)


def _flat(level: Tensor, width: int) -> Tensor:
    """(B, A · width, h, w) → (B, h · w · A, width)."""
    batch, channels, height, columns = level.shape
    split = level.reshape(batch, channels // width, width, height, columns)
    return split.permute(0, 3, 4, 1, 2).flatten(1, 3)


def _centre_in_padding(anchors: Tensor, sizes: Tensor) -> Tensor:
    """(B, A) bool: the anchor's centre lies beyond the image's valid height or width."""
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centres >= sizes.to(centres.dtype).flip(1)[:, None]).any(2)
