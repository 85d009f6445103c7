"""Pictures of samples with their labels."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

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
from vitgraft.data_shards.text import written

Colour = tuple[int, int, int]

_STRIP = ClipConfig(frames=6, sampling="uniform")
_LETTERS = 13
"""Height of the letters beside a picture, and of the smallest on one."""
_SMALLEST = 256
_WHITE = (255, 255, 255)


def class_colour(number: int) -> Colour:
    """Return a colour for a class id; neighbouring ids get colours far apart."""
    hue = (number * 0.61803398875) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65 + 0.35 * (number % 2), 1.0 - 0.25 * (number // 2 % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(
    image: Tensor, boxes: Tensor, labels: Sequence[int], captions: Sequence[str], masks: Tensor | None = None
) -> Tensor:
    """Draw boxes, captions and masks over an image. Masks are drawn from the largest to the smallest.

    Args:
        image: (3, H, W) uint8. boxes: (N, 4) xyxy in pixels. labels: class ids, which decide the colours.
        masks: (N, H, W) bool or uint8.
    """
    if not len(boxes):
        return image
    colours = [class_colour(label) for label in labels]
    if masks is not None:
        image = _blended(image, masks.bool(), colours)
    height, width = image.shape[1:]
    picture = F.to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    size = max(_LETTERS, min(48, min(height, width) // 32))
    line = max(2, size // 8)
    limit = torch.tensor([width - 1, height - 1] * 2)
    corners = boxes.float().nan_to_num().clamp(min=torch.zeros(4), max=limit)
    # A box from outside may have its corners exchanged.
    places = torch.cat([corners.reshape(-1, 2, 2).amin(1), corners.reshape(-1, 2, 2).amax(1)], 1).round().int().tolist()
    for place, colour in zip(places, colours, strict=True):
        draw.rectangle(place, outline=colour, width=line)
    for (left, top, _, _), caption, colour in zip(places, captions, colours, strict=True):
        font, text = written(caption, size)
        x = max(0, min(left + line, width - int(draw.textlength(text, font=font)) - 2))
        y = max(0, min(top + line, height - size - 4))
        draw.rectangle(draw.textbbox((x, y), text, font=font), fill=colour)
        draw.text((x, y), text, fill=_readable_on(colour), font=font)
    drawn: Tensor = F.pil_to_tensor(picture)
    return drawn


def draw_label_map(image: Tensor, label_map: Tensor, classes: Sequence[str]) -> Tensor:
    """Draw a label map over an image, with a legend of the classes in it below.

    Args:
        image: (3, H, W) uint8. label_map: (H, W) integers; 255 stays undrawn.
    """
    numbers, places = torch.unique(label_map, return_inverse=True)
    present = [value for value in numbers.tolist() if value != IGNORE]
    if not present:
        return image
    palette = torch.tensor([class_colour(value) for value in numbers.tolist()], dtype=torch.float32)
    drawn, shown = image.clone(), label_map != IGNORE
    drawn[:, shown] = _mixed(image[:, shown], palette[places[shown]].T, 0.6)
    # Inspection draws unchecked data.
    lines = [(classes[v] if 0 <= v < len(classes) else f"class {v}", class_colour(v)) for v in present]
    return torch.cat([drawn, text_below(lines, int(image.shape[2]))], dim=1)


def _readable_on(colour: Colour) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"


def _blended(image: Tensor, masks: Tensor, colours: Sequence[Colour]) -> Tensor:
    image = image.clone()
    for number in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        colour = torch.tensor(colours[number], dtype=torch.float32)[:, None]
        image[:, masks[number]] = _mixed(image[:, masks[number]], colour, 0.5)
    return image


def _mixed(pixels: Tensor, colours: Tensor, share: float) -> Tensor:
    """Blend ``colours`` at this share over ``pixels``, both (3, N)."""
    return (pixels.float() * (1 - share) + colours * share).to(torch.uint8)


def draw_clip(frames: Tensor, caption: str) -> Tensor:
    """Draw frames (T, 3, H, W) uint8 side by side, with a caption below: (3, H', W')."""
    strip: Tensor = make_grid(frames, nrow=len(frames), padding=2)
    return torch.cat([strip, text_below([(caption, _WHITE)], int(strip.shape[2]))], dim=1)


def draw_sample(raw: RawSample, manifest: Manifest) -> Image.Image:
    """Draw a packed sample with its labels.

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
    """Enlarge a tiny image so that captions are readable."""
    factor = -(-_SMALLEST // min(sample.size))
    return resize(sample, (sample.size[0] * factor, sample.size[1] * factor))


def text_below(lines: Sequence[tuple[str, Colour]], width: int) -> Tensor:
    """Draw coloured words on black, in as many rows as they need: (3, h, ``width``) uint8."""
    places, x, row = [], 2, 0
    words = [(*written(text, _LETTERS), colour) for text, colour in lines]
    heights = [sum(font.getmetrics()) for font, _, _ in words]
    height = max([_LETTERS, *heights]) + 1
    for font, text, colour in words:
        length = int(font.getlength(text)) + 8
        if x > 2 and x + length > width:
            x, row = 2, row + 1
        places.append((x, row * height, text, colour, font))
        x += length
    below = Image.new("RGB", (width, (row + 1) * height))
    draw = ImageDraw.Draw(below)
    for left, top, text, colour, font in places:
        draw.text((left, top), text, fill=colour, font=font)
    pixels: Tensor = F.pil_to_tensor(below)
    return pixels
