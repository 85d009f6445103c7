"""Mask R-CNN's predictions with outputs of fixed sizes and a batch of any size: what ``torch.export`` can capture.

The same weights and the same computation as :class:`vitgraft.models.heads.mask_rcnn.MaskRCNN`; only the bookkeeping is
another: all images are suppressed in one call, far apart from each other as classes are, and every image has as many
rows as it can have detections, those without one last.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from vitgraft.models.heads.mask_rcnn import BOX_BINS, MASK_BINS, SMALLEST_DETECTION, MaskRCNN
from vitgraft.models.heads.rpn import NMS_IOU, SMALLEST, Level, clip_boxes

NO_CLASS = -1


class FixedDetections(TypedDict):
    """By falling score, D rows for each image: ``boxes`` (B, D, 4) float32 xyxy in canvas pixels, ``scores`` (B, D)
    float32, ``labels`` (B, D) int64 and, with a mask head, ``masks`` (B, D, M, M) float32 probabilities inside each
    box (else (B, D, 0, 0)). Rows without a detection have score 0, label -1 and an empty box."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


class FixedMaskRCNN(nn.Module):
    """Wraps a head; takes the maps of one canvas.

    ``maps``: what the head reads of one image, {stride: (1, C, h, w)}. ``canvas``: (height, width) in pixels.
    """

    def __init__(self, head: MaskRCNN, maps: dict[int, Tensor], canvas: tuple[int, int]) -> None:
        super().__init__()
        self.head = head
        self.span = 2.0 * max(canvas)
        self.counts = []
        for level, anchors in enumerate(head.rpn._anchors([maps[stride] for stride in head.strides])):
            self.counts.append(len(anchors))
            self.register_buffer(f"anchors_{level}", anchors)

    def forward(self, maps: dict[int, Tensor], sizes: Tensor) -> FixedDetections:
        """maps: {stride: (B, C, H/stride, W/stride)}; sizes: (B, 2) valid height and width."""
        levels = [maps[stride] for stride in self.head.strides]
        proposals, real = self._propose(levels, sizes)
        batch, count = real.shape
        features = self._roi_features(levels, proposals, BOX_BINS)
        logits, shifts = self.head.box_predictor(self.head.box_head(features))
        scores = logits.float().softmax(1)[:, 1:].unflatten(0, (batch, count))
        classes = scores.shape[2]
        shifts = shifts.float().unflatten(1, (-1, 4))[:, 1:].flatten(1)
        boxes = self.head._coder.decode_single(shifts, proposals.flatten(0, 1)).reshape(batch, -1, 4)
        boxes = clip_boxes(boxes, sizes)  # (B, P · K, 4)
        scores = scores.flatten(1)
        usable = real[:, :, None].expand(-1, -1, classes).flatten(1) & (scores > self.head.score_threshold)
        usable = usable & ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST_DETECTION).all(2)
        labels = torch.arange(classes, device=boxes.device).repeat(count).expand(batch, -1)
        kept = self._suppress(boxes, scores, usable, labels, classes, self.head.nms_threshold)
        rows = min(self.head.detections_per_image, scores.shape[1])
        best, index = scores.masked_fill(~kept, 0.0).topk(rows, dim=1)
        found = best > 0
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * found[..., None]
        labels = labels.gather(1, index)
        masks = self._masks(levels, boxes, labels)
        return {"boxes": boxes, "scores": best, "labels": labels.masked_fill(~found, NO_CLASS), "masks": masks}

    def _propose(self, levels: list[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals (B, P, 4) and which of them are real (B, P)."""
        rpn: Any = self.head.rpn
        logits_by_level, deltas_by_level = rpn.head(levels)
        chosen, boxes_of, level_of = [], [], []
        limit = sizes.to(torch.float32).flip(1)[:, None]
        for level, (logits, deltas) in enumerate(zip(logits_by_level, deltas_by_level, strict=True)):
            anchors: Tensor = getattr(self, f"anchors_{level}")
            flat = _flat(logits, 1).squeeze(2).float()
            flat = flat.masked_fill((((anchors[:, :2] + anchors[:, 2:]) / 2)[None] >= limit).any(2), -torch.inf)
            top, index = flat.topk(min(rpn.proposals, self.counts[level]), dim=1)
            shifts = _flat(deltas, 4).float().gather(1, index[..., None].expand(-1, -1, 4))
            decoded = rpn._coder.decode_single(shifts.reshape(-1, 4), anchors[index.flatten()])
            boxes_of.append(decoded.reshape(shifts.shape))
            chosen.append(top)
            level_of.append(torch.full_like(index, level))
        boxes, scores = clip_boxes(torch.cat(boxes_of, 1), sizes), torch.cat(chosen, 1)
        usable = (scores > -torch.inf) & ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST).all(2)
        kept = self._suppress(boxes, scores, usable, torch.cat(level_of, 1), len(levels), NMS_IOU)
        best, index = scores.masked_fill(~kept, -torch.inf).topk(min(rpn.proposals, scores.shape[1]), dim=1)
        real = best > -torch.inf
        return boxes.gather(1, index[..., None].expand(-1, -1, 4)) * real[..., None], real

    def _suppress(
        self, boxes: Tensor, scores: Tensor, usable: Tensor, group: Tensor, groups: int, threshold: float
    ) -> Tensor:
        """Return the mask (B, N) bool of the valid boxes (B, N) kept by NMS, for each image and ``group`` (B, N)
        separately."""
        batch = scores.shape[0]
        image = torch.arange(batch, device=boxes.device)[:, None]
        # In float64 boxes of other images and groups lie apart without losing a digit.
        apart = boxes.double() + ((image * groups + group) * self.span)[..., None]
        index = torch.nonzero(usable.flatten())[:, 0]
        kept = index[nms(apart.flatten(0, 1)[index], scores.flatten().double()[index], threshold)]
        flags = torch.zeros_like(usable).flatten()
        return flags.index_fill(0, kept, True).view_as(usable)

    def _roi_features(self, levels: list[Tensor], boxes: Tensor, bins: int) -> Tensor:
        """Features of RoIs (B, P, 4): (B · P, C, bins, bins); every map is read, and each RoI takes its own's."""
        strides = self.head.roi_strides
        image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(boxes.shape[:2])
        rois = torch.cat([image.flatten()[:, None].to(boxes.dtype), boxes.flatten(0, 1)], 1)
        level_of = Level(strides)([boxes.flatten(0, 1)])
        total: Tensor | None = None
        for level, stride in enumerate(strides):
            read = roi_align(levels[level].float(), rois, (bins, bins), 1 / stride, 2, False)
            mine = read * (level_of == level)[:, None, None, None]
            total = mine if total is None else total + mine
        assert total is not None
        return total

    def _masks(self, levels: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        batch, rows = labels.shape
        if not self.head.has_masks:
            return boxes.new_zeros(batch, rows, 0, 0)
        features = self._roi_features(levels, boxes, MASK_BINS)
        logits = self.head.mask_predictor(self.head.mask_head(features)).float()
        index = labels.flatten()[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        masks: Tensor = logits.gather(1, index)[:, 0].sigmoid().unflatten(0, (batch, rows))
        return masks


def _flat(level: Tensor, width: int) -> Tensor:
    """(B, A · width, h, w) → (B, h · w · A, width)."""
    batch, channels, height, columns = level.shape
    split = level.reshape(batch, channels // width, width, height, columns)
    return split.permute(0, 3, 4, 1, 2).flatten(1, 3)
