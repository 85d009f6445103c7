"""Pictures of samples with their labels."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from vitgraft.configs.schema.data import ClipConfig
from vitgraft.data_shards.decode import (
    check_annotations,
    decode_frames,
    decode_json,
    decode_label,
    decode_masks,
    sample_frames,
    stated_frames,
    stated_label,
)
from vitgraft.data_shards.frames import clip_of
from vitgraft.data_shards.geometry import Sample, resize
from vitgraft.data_shards.images import IMAGE_EXTENSIONS, decode_image, orientation_of
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.stream import RawSample

Colour = tuple[int, int, int]

_STRIP = ClipConfig(frames=6, sampling="uniform")
_CAPTION = 14
_SMALLEST = 256


def class_colour(number: int) -> Colour:
    """A colour for a class id; neighbouring ids get colours far apart."""
    hue = (number * 0.61803398875) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65 + 0.35 * (number % 2), 1.0 - 0.25 * (number // 2 % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(
    image: Tensor, boxes: Tensor, labels: Sequence[int], captions: Sequence[str], masks: Tensor | None = None
) -> Tensor:
    """Boxes, captions and masks over an image.

    Args:
        image: (3, H, W) uint8. boxes: (N, 4) xyxy in pixels. labels: class ids, which decide the colours.
        masks: (N, H, W) bool or uint8.
    """
    if not len(boxes):
        return image
    colours = [class_colour(label) for label in labels]
    if masks is not None:
        image = draw_segmentation_masks(image, masks.bool(), alpha=0.5, colors=colours)
    height, width = image.shape[1:]
    inside = torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2] - 1) for i in range(4)], dim=1)
    drawn: Tensor = draw_bounding_boxes(
        image,
        inside,
        colors=colours,
        labels=list(captions),
        width=2,
        label_colors=colours,
        label_background_colors=["black"] * len(colours),
        fill_labels=True,
    )
    return drawn


def draw_label_map(image: Tensor, label_map: Tensor, classes: Sequence[str]) -> Tensor:
    """A label map over an image, with a legend of the classes in it below.

    Args:
        image: (3, H, W) uint8. label_map: (H, W) integers; 255 stays undrawn.
    """
    present = [int(value) for value in torch.unique(label_map) if int(value) != IGNORE]
    if not present:
        return image
    masks = torch.stack([label_map == value for value in present])
    drawn = draw_segmentation_masks(image, masks, alpha=0.6, colors=[class_colour(value) for value in present])
    lines = [(classes[value], class_colour(value)) for value in present]
    return torch.cat([drawn, _legend(lines, int(image.shape[2]))], dim=1)


def draw_clip(frames: Tensor, caption: str) -> Tensor:
    """Frames (T, 3, H, W) uint8 side by side, with a caption below: (3, H', W')."""
    strip: Tensor = make_grid(frames, nrow=len(frames), padding=2)
    return torch.cat([strip, _legend([(caption, (255, 255, 255))], int(strip.shape[2]))], dim=1)


def draw_sample(raw: RawSample, manifest: Manifest) -> Image.Image:
    """A packed sample with its labels.

    Raises:
        DataError: it cannot be decoded.
    """
    metadata = decode_json(raw.first(("json",)), raw.where)
    if manifest.kind == "video":
        count = stated_frames(metadata, raw.where)
        indices = sample_frames(count, _STRIP, train=False)
        frames = decode_frames(clip_of(raw, metadata), indices, raw.where, length=count)
        picture = draw_clip(frames, _class_name(raw, metadata, manifest))
    else:
        orientation = orientation_of(metadata, raw.where)
        sample = Sample(decode_image(raw.first(IMAGE_EXTENSIONS), raw.where, orientation))
        if manifest.kind == "semantic":
            sample.label_map = decode_label(raw.first(("label.png",)), raw.where)
            sample = _enlarged(sample)
            assert sample.label_map is not None
            picture = draw_label_map(sample.image, sample.label_map, manifest.classes)
        elif manifest.kind == "image":
            picture = draw_clip(_enlarged(sample).image[None], _class_name(raw, metadata, manifest))
        else:
            picture = _draw_annotations(sample, raw, metadata, manifest)
    drawn: Image.Image = F.to_pil_image(picture)
    return drawn


def _class_name(raw: RawSample, metadata: dict[str, Any], manifest: Manifest) -> str:
    return manifest.classes[stated_label(metadata, len(manifest.classes), raw.where)]


def _draw_annotations(sample: Sample, raw: RawSample, metadata: dict[str, Any], manifest: Manifest) -> Tensor:
    items = check_annotations(metadata, len(manifest.classes), raw.where)
    sample.boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float32).reshape(-1, 4)
    sample.boxes[:, 2:] += sample.boxes[:, :2]
    sample.masks = decode_masks(items, sample.size, raw.where)
    sample = _enlarged(sample)
    assert sample.boxes is not None
    captions = [manifest.classes[item["class"]] + (" (crowd)" if item.get("iscrowd") else "") for item in items]
    return draw_instances(sample.image, sample.boxes, [item["class"] for item in items], captions, sample.masks)


def _enlarged(sample: Sample) -> Sample:
    """Tiny images grow, so that captions can be read on them."""
    factor = -(-_SMALLEST // min(sample.size))
    return resize(sample, (sample.size[0] * factor, sample.size[1] * factor))


def _legend(lines: Sequence[tuple[str, Colour]], width: int) -> Tensor:
    """(3, h, width) uint8: coloured words, in as many rows as they need."""
    scratch = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, row = [], 2, 0
    for text, colour in lines:
        length = int(scratch.textlength(text)) + 8
        if x > 2 and x + length > width:
            x, row = 2, row + 1
        places.append((x, row * _CAPTION + 1, text, colour))
        x += length
    legend = Image.new("RGB", (width, (row + 1) * _CAPTION))
    draw = ImageDraw.Draw(legend)
    for left, top, text, colour in places:
        draw.text((left, top), text, fill=colour)
    pixels: Tensor = F.pil_to_tensor(legend)
    return pixels
