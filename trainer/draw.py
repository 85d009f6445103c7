"""Pictures of predictions beside ground truth, from what data_shards.draw draws."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

_TITLE_HEIGHT = 20
_FONT_SIZE = 13
_MIN_SIDE = 320


def enlarge(image: Tensor) -> tuple[Tensor, int]:
    """Scale a small image (…, H, W) by a whole factor, so that text on it can be read; (image, factor)."""
    factor = max(1, -(-_MIN_SIDE // max(image.shape[-2:])))
    return repeat(image, factor), factor


def repeat(image: Tensor, factor: int) -> Tensor:
    """Each pixel of (…, H, W) as factor × factor pixels."""
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def titled(image: Tensor, text: str) -> Tensor:
    """The image (3, H, W) uint8 under one line of text."""
    bar = Image.new("RGB", (image.shape[2], _TITLE_HEIGHT))
    ImageDraw.Draw(bar).text((4, 1), text, fill=(255, 255, 255), font=ImageFont.load_default(_FONT_SIZE))
    return torch.cat([F.pil_to_tensor(bar), image], dim=1)


def beside(left: Tensor, right: Tensor, gap: int = 6) -> Tensor:
    """Two images side by side, or one above the other when they are wide; differing sides are padded."""
    wide = left.shape[2] > 2 * left.shape[1]
    across, along = (2, 1) if wide else (1, 2)
    size = max(left.shape[across], right.shape[across])
    parts = [_padded(part, across, size) for part in (left, right)]
    shape = [3, gap, size] if wide else [3, size, gap]
    return torch.cat([parts[0], torch.zeros(shape, dtype=torch.uint8), parts[1]], dim=along)


def _padded(image: Tensor, dimension: int, size: int) -> Tensor:
    missing = size - image.shape[dimension]
    padded: Tensor = F.pad(image, [0, 0, missing, 0] if dimension == 2 else [0, 0, 0, missing])
    return padded


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 as PNG, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    F.to_pil_image(image).save(temporary, "PNG")
    temporary.replace(path)


def load_picture(path: Path) -> Tensor:
    """A picture file → (3, H, W) uint8."""
    with Image.open(path) as image:
        loaded: Tensor = F.pil_to_tensor(image.convert("RGB"))
    return loaded
