"""Images, boxes, masks, label maps and clips transformed together, then put on the canvas.

Geometry of a resize: factor min(H / h, W / w) for a canvas (H, W), new sides rounded to whole pixels, at least 1 and at
most the canvas; boxes are scaled by the exact ratio of new to old sides, so that dividing by it inverts the resize.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitgraft.configs.schema import data as schema
from vitgraft.data_shards.manifest import IGNORE

MIN_SIDE = 1.0
MIN_AREA = 4
"""Instances whose box has a shorter side, or whose mask has fewer pixels, after the transforms, are dropped."""


@dataclass
class Sample:
    """What is transformed together.

    ``image``: (3, h, w) or a clip (T, 3, h, w), uint8. ``boxes``: (N, 4) float32 xyxy in pixels; ``labels``: (N,)
    int64; ``masks``: (N, h, w) uint8. ``label_map``: (h, w) uint8 with 255 ignored.
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


class Prepared(NamedTuple):
    """An image or clip on the canvas, for evaluation and prediction.

    ``canvas``: (3, H, W) or (3, T, H, W) float32, normalised, zero beyond ``size``. ``size``: valid (height, width).
    ``scale``: (vertical, horizontal) factor from stored pixels to canvas pixels: divide to get back.
    """

    canvas: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]


Step = Callable[[Sample], Sample]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator at ``seed`` inside the block, untouched outside; generators of GPUs are left alone."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def fitted(size: tuple[int, int], canvas: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """(height, width) after a resize that makes ``size`` fit ``canvas``, times ``factor``."""
    ratio = min(canvas[0] / size[0], canvas[1] / size[1]) * factor
    limits = (math.ceil(canvas[0] * factor), math.ceil(canvas[1] * factor))
    height, width = (min(max(1, round(side * ratio)), limit) for side, limit in zip(size, limits, strict=True))
    return height, width


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Bilinear with antialiasing for pixels; nearest, aligned with it, for masks and labels."""
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

    image = F.resize_image(sample.image, list(size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    return Sample(image, boxes, sample.labels, nearest(sample.masks), nearest(sample.label_map))


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """A part of the image. Boxes are clipped to it; one that was cut is tightened around what its mask still shows."""
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
    """Mirrored left and right."""
    boxes = sample.boxes
    if boxes is not None:
        fmt = tv_tensors.BoundingBoxFormat.XYXY
        boxes = F.horizontal_flip_bounding_boxes(boxes, format=fmt, canvas_size=sample.size)
    masks = None if sample.masks is None else sample.masks.flip(-1)
    label_map = None if sample.label_map is None else sample.label_map.flip(-1)
    return Sample(sample.image.flip(-1), boxes, sample.labels, masks, label_map)


def tight_boxes(masks: Tensor) -> Tensor:
    """Boxes (N, 4) float32 xyxy tight around masks (N, H, W); an empty mask gives zeros."""

    def edges(line: Tensor) -> tuple[Tensor, Tensor]:
        first = line.to(torch.int8).argmax(1)
        last = line.shape[1] - line.flip(1).to(torch.int8).argmax(1)
        return first, torch.where(line.any(1), last, 0)

    filled = masks.bool()
    (left, right), (top, bottom) = edges(filled.any(1)), edges(filled.any(2))
    return torch.stack([left, top, right, bottom], dim=1).float()


def _clamp(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def _intersect(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], dim=1)


def _random(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _scale_jitter(config: schema.ScaleJitter, canvas: tuple[int, int]) -> Step:
    def apply(sample: Sample) -> Sample:
        return resize(sample, fitted(sample.size, canvas, _random(config.min, config.max)))

    return apply


def _random_crop(canvas: tuple[int, int]) -> Step:
    def apply(sample: Sample) -> Sample:
        height, width = min(sample.size[0], canvas[0]), min(sample.size[1], canvas[1])
        top = int(torch.randint(0, sample.size[0] - height + 1, ()))
        left = int(torch.randint(0, sample.size[1] - width + 1, ()))
        return crop(sample, top, left, height, width)

    return apply


def _random_resized_crop(config: schema.RandomResizedCrop, canvas: tuple[int, int]) -> Step:
    drawer = v2.RandomResizedCrop(canvas, scale=(config.min_area, config.max_area))

    def apply(sample: Sample) -> Sample:
        place = drawer.make_params([tv_tensors.Image(sample.image)])
        return resize(crop(sample, place["top"], place["left"], place["height"], place["width"]), canvas)

    return apply


def _horizontal_flip(config: schema.HorizontalFlip) -> Step:
    return lambda sample: flip(sample) if _random(0, 1) < config.probability else sample


def _photometric(config: schema.Photometric) -> Step:
    jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)

    def apply(sample: Sample) -> Sample:
        image = jitter(tv_tensors.Image(sample.image)).as_subclass(Tensor)
        return Sample(image, sample.boxes, sample.labels, sample.masks, sample.label_map)

    return apply


def _resize(canvas: tuple[int, int]) -> Step:
    return lambda sample: resize(sample, fitted(sample.size, canvas))


def _step(config: schema.TransformConfig, canvas: tuple[int, int]) -> Step:
    match config:
        case schema.ScaleJitter():
            return _scale_jitter(config, canvas)
        case schema.RandomCrop():
            return _random_crop(canvas)
        case schema.RandomResizedCrop():
            return _random_resized_crop(config, canvas)
        case schema.HorizontalFlip():
            return _horizontal_flip(config)
        case schema.Photometric():
            return _photometric(config)
        case schema.Resize():
            return _resize(canvas)


class Transforms:
    """A recipe's transforms.

    Training: ``data.transforms`` in order, then the canvas. An image that they leave larger than the canvas (scale
    jitter without a crop) is resized to fit. Evaluation: resize to fit, then the canvas.
    """

    def __init__(self, config: schema.DataConfig) -> None:
        self.canvas = (config.image_size[0], config.image_size[1])
        self._steps = [_step(item, self.canvas) for item in config.transforms]
        self._mean = torch.tensor(config.mean).view(3, 1, 1)
        self._std = torch.tensor(config.std).view(3, 1, 1)

    def train(self, sample: Sample) -> Sample:
        """Randomly transformed, at most as large as the canvas, instances that vanished dropped; still uint8.

        Draws from torch's global CPU generator: call it inside :func:`seeded`.
        """
        for step in self._steps:
            sample = step(sample)
        if sample.size[0] > self.canvas[0] or sample.size[1] > self.canvas[1]:
            sample = resize(sample, fitted(sample.size, self.canvas))
        return drop_vanished(sample)

    def evaluation(self, sample: Sample) -> Sample:
        """Resized to fit the canvas; still uint8."""
        return resize(sample, fitted(sample.size, self.canvas))

    def place(self, sample: Sample) -> Sample:
        """Normalised and padded at the bottom and right: image zero, masks 0, labels 255; clips become (3, T, H, W)."""
        pixels = (sample.image.float() / 255 - self._mean) / self._std
        image = self._pad(pixels, 0.0)
        if image.ndim == 4:
            image = image.transpose(0, 1).contiguous()
        masks = None if sample.masks is None else self._pad(sample.masks, 0)
        label_map = None if sample.label_map is None else self._pad(sample.label_map, IGNORE).long()
        return Sample(image, sample.boxes, sample.labels, masks, label_map)

    def prepare(self, image: Tensor) -> Prepared:
        """Evaluation transform of an image (3, h, w) or clip (T, 3, h, w), uint8."""
        before = Sample(image)
        after = self.evaluation(before)
        scale = after.size[0] / before.size[0], after.size[1] / before.size[1]
        return Prepared(self.place(after).image, after.size, scale)

    def _pad(self, tensor: Tensor, value: float) -> Tensor:
        height, width = tensor.shape[-2:]
        if (height, width) == self.canvas:
            return tensor.contiguous()
        padded = tensor.new_full((*tensor.shape[:-2], *self.canvas), value)
        padded[..., :height, :width] = tensor
        return padded


def drop_vanished(sample: Sample) -> Sample:
    """Without the instances that the transforms left (nearly) empty."""
    if sample.boxes is None or sample.labels is None:
        return sample
    boxes = _clamp(sample.boxes, sample.size)
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
    masks = sample.masks
    if masks is not None:
        keep &= masks.flatten(1).sum(1, dtype=torch.int64) >= MIN_AREA
        masks = masks[keep]
    return Sample(sample.image, boxes[keep], sample.labels[keep], masks, sample.label_map)
