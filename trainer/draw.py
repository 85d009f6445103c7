"""Pictures of predictions: boxes, masks, label maps and clips on uint8 images."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TEXT_HEIGHT = 16
MIN_SIDE = 320


def palette(index: int) -> tuple[int, int, int]:
    """A colour for a class: hues by the golden ratio, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def enlarge(image: Tensor) -> tuple[Tensor, int]:
    """Scale a small image by a whole factor so that text on it can be read; (image, factor)."""
    factor = max(1, -(-MIN_SIDE // max(image.shape[-2:])))
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2), factor


def draw_instances(
    image: Tensor, boxes: list[list[float]], labels: list[int], captions: list[str], masks: list[Tensor] | None
) -> Tensor:
    """Boxes (xyxy pixels), captions and masks (H, W) bool on an image (3, H, W) uint8; enlarged when small."""
    big, factor = enlarge(image)
    canvas = big.float()
    for number, label in enumerate(labels):
        if masks is not None:
            mask = masks[number].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            colour = torch.tensor(palette(label), dtype=torch.float32)[:, None, None]
            canvas = torch.where(mask, 0.5 * canvas + 0.5 * colour, canvas)
    picture = to_pil(canvas.to(torch.uint8))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(TEXT_HEIGHT - 3)
    for box, label, caption in zip(boxes, labels, captions, strict=True):
        left, top, right, bottom = (value * factor for value in box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=palette(label), width=2)
        anchor = (left + 2, max(0, top - TEXT_HEIGHT))
        pen.rectangle(pen.textbbox(anchor, caption, font=font), fill=(0, 0, 0))
        pen.text(anchor, caption, fill=palette(label), font=font)
    return from_pil(picture)


def draw_label_map(image: Tensor, labels: Tensor) -> Tensor:
    """A label map (H, W) with 255 ignored over an image (3, H, W) uint8; enlarged when small."""
    table = torch.tensor([palette(i) for i in range(256)], dtype=torch.float32)
    colours = table[labels.long()].permute(2, 0, 1)
    mixed = torch.where(labels == 255, image.float() * 0.3, 0.4 * image.float() + 0.6 * colours)
    return enlarge(mixed.to(torch.uint8))[0]


def draw_strip(frames: Tensor, caption: str, label: int, columns: int = 6) -> Tensor:
    """At most ``columns`` evenly spaced frames (T, 3, H, W) uint8 side by side under a caption."""
    count = min(columns, len(frames))
    picks = [round(i * (len(frames) - 1) / max(count - 1, 1)) for i in range(count)]
    strip = torch.cat([frames[pick] for pick in picks], dim=2)
    big, _ = enlarge(strip)
    return titled(big, caption, palette(label))


def titled(image: Tensor, text: str, colour: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """The image (3, H, W) uint8 under one line of text."""
    bar = Image.new("RGB", (image.shape[2], TEXT_HEIGHT + 4))
    ImageDraw.Draw(bar).text((4, 1), text, fill=colour, font=ImageFont.load_default(TEXT_HEIGHT - 3))
    return torch.cat([from_pil(bar), image], dim=1)


def beside(left: Tensor, right: Tensor, gap: int = 6) -> Tensor:
    """Two images of one height side by side, or of one width one above the other when they are wide."""
    if left.shape[2] > 2 * left.shape[1]:
        return torch.cat([left, torch.zeros(3, gap, left.shape[2], dtype=torch.uint8), right], dim=1)
    return torch.cat([left, torch.zeros(3, left.shape[1], gap, dtype=torch.uint8), right], dim=2)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 → a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image → (3, H, W) uint8."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 as PNG, whole or not at all."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def load_picture(path: Path) -> Tensor:
    """A picture file → (3, H, W) uint8."""
    with Image.open(path) as image:
        return from_pil(image)
