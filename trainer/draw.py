"""Pictures of predictions beside ground truth, from what data_shards.draw draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vitgraft.data_shards.pictures import encoded
from vitgraft.data_shards.text import written

_TITLE_HEIGHT = 20
_FONT_SIZE = 13
_MIN_SIDE = 320
_CONFUSION_SIDE = 640


def enlarge(image: Tensor) -> tuple[Tensor, int]:
    """Scale a small image (…, H, W) by a whole factor, so that text on it can be read; (image, factor)."""
    factor = max(1, -(-_MIN_SIDE // max(image.shape[-2:])))
    return repeat(image, factor), factor


def repeat(image: Tensor, factor: int) -> Tensor:
    """Enlarge each pixel of (…, H, W) to factor × factor pixels."""
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def titled(image: Tensor, text: str) -> Tensor:
    """Draw one line of text above an image (3, H, W) uint8."""
    bar = Image.new("RGB", (image.shape[2], _TITLE_HEIGHT))
    font, shown = written(text, _FONT_SIZE)
    ImageDraw.Draw(bar).text((4, 1), shown, fill=(255, 255, 255), font=font)
    return torch.cat([F.pil_to_tensor(bar), image], dim=1)


def remarked(image: Tensor, text: str | None) -> Tensor:
    """Draw a line of text, if there is one, at the bottom of an image (3, H, W) uint8."""
    if text is None:
        return image
    picture = F.to_pil_image(image)
    draw, (font, shown) = ImageDraw.Draw(picture), written(text, _FONT_SIZE)
    place = (4, image.shape[1] - _TITLE_HEIGHT)
    draw.rectangle(draw.textbbox(place, shown, font=font), fill="black")
    draw.text(place, shown, fill="white", font=font)
    drawn: Tensor = F.pil_to_tensor(picture)
    return drawn


def beside(left: Tensor, right: Tensor, gap: int = 6) -> Tensor:
    """Join two images side by side, or one above the other when they are wide; differing sides are padded."""
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


def png(image: Tensor) -> bytes:
    """Encode (3, H, W) uint8 as a PNG file, whose metadata names vitgraft."""
    return encoded(F.to_pil_image(image))


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 as PNG, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(png(image))
    temporary.replace(path)


def load_picture(path: Path) -> Tensor:
    """Load a picture file as (3, H, W) uint8."""
    with Image.open(path) as image:
        loaded: Tensor = F.pil_to_tensor(image.convert("RGB"))
    return loaded


def draw_confusion(matrix: NDArray[np.int64], classes: list[str]) -> Tensor:
    """Draw a confusion matrix: a row for each true class, shares of the row from black to yellow, (3, H, W) uint8.

    Args:
        matrix: (K, K or more): rows truth, columns prediction.
    """
    count = len(classes)
    shares = torch.from_numpy(matrix[:, :count] / np.maximum(matrix.sum(1, keepdims=True), 1)).float()
    cell = max(1, min(24, _CONFUSION_SIDE // max(count, 1)))
    levels = repeat((shares * 255).round().to(torch.uint8), cell)
    cells = torch.stack([levels, (levels.float() * 0.85).to(torch.uint8), levels // 8 + 24])
    if cell < _FONT_SIZE:  # no room for names
        return titled(cells, f"{count} classes: truth down, prediction across")
    names = [written(name, _FONT_SIZE) for name in classes]
    margin = min(200, max(int(font.getlength(text)) for font, text in names) + 8)
    picture = Image.new("RGB", (margin + cells.shape[2], margin + cells.shape[1]))
    picture.paste(F.to_pil_image(cells), (margin, margin))
    for number, (font, text) in enumerate(names):
        word = Image.new("RGB", (margin, cell))
        ImageDraw.Draw(word).text((4, cell // 2), text, fill=(255, 255, 255), font=font, anchor="lm")
        picture.paste(word, (0, margin + number * cell))
        picture.paste(word.rotate(90, expand=True), (margin + number * cell, 0))
    return titled(F.pil_to_tensor(picture), "truth down, prediction across")
