"""Samples, and the geometry that moves their images, boxes, masks and label maps together.

Geometry of a resize: factor min(H / h, W / w) for a canvas (H, W), new sides rounded to whole pixels, at least 1 and at
most the canvas; boxes are scaled by the exact ratio of new to old sides, so that dividing by it inverts the resize.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitgraft.data_shards.manifest import IGNORE

MIN_SIDE = 1.0
MIN_AREA = 4
"""Instances whose box has a shorter side, or whose mask has fewer pixels, after the transforms, are dropped."""


@dataclass
class Sample:
    """Image or clip and the targets that are transformed with it.

    ``image``: (3, h, w) or a clip (T, 3, h, w), uint8. ``boxes``: (N, 4) float32 xyxy in pixels; ``labels``: (N,)
    int64, or the class of a clip: () int64 or, mixed, (K,) float32; ``masks``: (N, h, w) uint8. ``label_map``: (h, w)
    uint8 with 255 ignored.
    """

    image: Tensor
    boxes: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None
    label_map: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])


def fitted(size: tuple[int, int], canvas: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """Return (height, width) after a resize that makes ``size`` fit ``canvas``, times ``factor``."""
    ratio = min(canvas[0] / size[0], canvas[1] / size[1]) * factor
    limits = (math.ceil(canvas[0] * factor), math.ceil(canvas[1] * factor))
    height, width = (min(max(1, round(side * ratio)), limit) for side, limit in zip(size, limits, strict=True))
    return height, width


def shortest(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Return (height, width) of ``size`` resized to short side ``short``, or less where its long side would pass
    ``long``."""
    factor = min(short / min(size), long / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def covering(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) after the smallest resize of ``size`` that leaves no part of ``canvas`` empty."""
    ratio = max(canvas[0] / size[0], canvas[1] / size[1])
    return max(canvas[0], round(size[0] * ratio)), max(canvas[1], round(size[1] * ratio))


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pixels (…, H, W) uint8 to another (height, width): bilinear with antialiasing, each image by itself."""
    if tuple(image.shape[-2:]) == size:
        return image
    bilinear = v2.InterpolationMode.BILINEAR
    if size == (1, 1):
        # Torch's kernel for bytes fails at this size, unless channels are last in memory.
        single: Tensor = F.resize_image(image.float(), [1, 1], interpolation=bilinear, antialias=True)
        return single.round().to(image.dtype)
    pixels: Tensor = F.resize_image(image, list(size), interpolation=bilinear, antialias=True)
    return pixels


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize a sample: bilinear with antialiasing for pixels; nearest, aligned with it, for masks and labels."""
    if sample.size == size:
        return sample
    boxes = sample.boxes
    if boxes is not None:
        (old_h, old_w), (new_h, new_w) = sample.size, size
        boxes = boxes * boxes.new_tensor([new_w / old_w, new_h / old_h, new_w / old_w, new_h / old_h])

    def nearest(mask: Tensor | None) -> Tensor | None:
        # v2's own kernel for masks is NEAREST, which is shifted by up to half a source pixel against bilinear.
        if mask is None:
            return None
        exact = v2.InterpolationMode.NEAREST_EXACT
        resized: Tensor = F.resize_image(mask[..., None, :, :], list(size), interpolation=exact)
        return resized[..., 0, :, :]

    return Sample(resized(sample.image, size), boxes, sample.labels, nearest(sample.masks), nearest(sample.label_map))


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Crop a sample. Boxes are clipped to the crop; a clipped box is tightened around the visible part of its mask."""
    boxes = sample.boxes
    masks = None if sample.masks is None else sample.masks[:, top : top + height, left : left + width]
    if boxes is not None:
        moved = boxes - boxes.new_tensor([left, top, left, top])
        boxes = _clamp(moved, (height, width))
        if masks is not None and len(boxes):
            cut = (moved != boxes).any(1) & masks.bool().flatten(1).any(1)
            boxes = torch.where(cut[:, None], _intersect(boxes, tight_boxes(masks)), boxes)
    label_map = sample.label_map
    if label_map is not None:
        label_map = label_map[top : top + height, left : left + width]
    return Sample(sample.image[..., top : top + height, left : left + width], boxes, sample.labels, masks, label_map)


def flip(sample: Sample) -> Sample:
    """Flip a sample horizontally."""
    boxes = sample.boxes
    if boxes is not None:
        fmt = tv_tensors.BoundingBoxFormat.XYXY
        boxes = F.horizontal_flip_bounding_boxes(boxes, format=fmt, canvas_size=sample.size)
    masks = None if sample.masks is None else sample.masks.flip(-1)
    label_map = None if sample.label_map is None else sample.label_map.flip(-1)
    return Sample(sample.image.flip(-1), boxes, sample.labels, masks, label_map)


def pad(tensor: Tensor, size: tuple[int, int], value: float | Tensor) -> Tensor:
    """Pad (…, h, w) to (…, H, W) at the bottom and right with ``value``: a number, or broadcast to the result."""
    height, width = tensor.shape[-2:]
    if (height, width) == size:
        return tensor.contiguous()
    padded = tensor.new_empty((*tensor.shape[:-2], *size))
    padded[...] = value
    padded[..., :height, :width] = tensor
    return padded


def extend(sample: Sample, size: tuple[int, int], colour: Sequence[int]) -> Sample:
    """Pad a sample to ``size`` at the bottom and right: image in this RGB colour, masks 0, labels 255."""
    masks = None if sample.masks is None else pad(sample.masks, size, 0)
    label_map = None if sample.label_map is None else pad(sample.label_map, size, IGNORE)
    image = pad(sample.image, size, torch.tensor(colour).view(3, 1, 1).to(sample.image.dtype))
    return Sample(image, sample.boxes, sample.labels, masks, label_map)


def tight_boxes(masks: Tensor) -> Tensor:
    """Return boxes (N, 4) float32 xyxy tight around masks (N, H, W); an empty mask gives zeros."""

    def edges(line: Tensor) -> tuple[Tensor, Tensor]:
        first = line.to(torch.int8).argmax(1)
        last = line.shape[1] - line.flip(1).to(torch.int8).argmax(1)
        return first, torch.where(line.any(1), last, 0)

    filled = masks.bool()
    (left, right), (top, bottom) = edges(filled.any(1)), edges(filled.any(2))
    return torch.stack([left, top, right, bottom], dim=1).float()


def drop_vanished(sample: Sample) -> Sample:
    """Drop the instances that the transforms left (nearly) empty."""
    if sample.boxes is None or sample.labels is None:
        return sample
    boxes = _clamp(sample.boxes, sample.size)
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
    masks = sample.masks
    if masks is not None:
        keep &= masks.flatten(1).sum(1, dtype=torch.int64) >= MIN_AREA
        masks = masks[keep]
    return Sample(sample.image, boxes[keep], sample.labels[keep], masks, sample.label_map)


def _clamp(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def _intersect(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], dim=1)
