"""Drawing digit scenes: a cluttered background and warped scans of handwritten digits on it.

Random numbers come from numpy's ``RandomState``, whose streams are frozen, so a seed gives the same pixels for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Colour = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

_SCAN = 12
"""Side of a scan with its margin: 8 pixels of digit and two empty ones around."""
_INK = (180, 255)
_SHADOW_EDGE = 0.04
_SHADOW = 0.7
_MIN_VISIBLE = 0.75


@dataclass
class Digit:
    """One digit of a scene: its class, and (H, W) bool, the pixels that are still visible."""

    label: int
    visible: Bools


def padded_scan(scan: npt.NDArray[np.float64]) -> Image.Image:
    """One 8×8 scan (values 0..16) with an empty margin, as an 8-bit image that can be warped."""
    canvas = np.zeros((_SCAN, _SCAN), dtype=np.uint8)
    canvas[2:-2, 2:-2] = np.clip(scan * (255 / 16), 0, 255)
    return Image.fromarray(canvas)


def digit_alpha(
    scan: Image.Image, side: int, centre: tuple[float, float], height: float, degrees: float, edge: float = 0.25
) -> Floats:
    """The digit's opacity on a square of ``side`` pixels: (side, side) float32 in 0..1.

    ``centre``: (x, y) of the digit's middle. ``height``: pixels that the scan's eight rows take. ``degrees``: turn,
    positive is counter-clockwise as seen. ``edge``: share of ink at which opacity begins; a lower one gives a wider
    digit.
    """
    scale = 8.0 / height
    cos, sin = math.cos(math.radians(degrees)) * scale, math.sin(math.radians(degrees)) * scale
    x, y = centre
    middle = _SCAN / 2
    # PIL wants the map from output to input pixels.
    matrix = (cos, -sin, middle - cos * x + sin * y, sin, cos, middle - sin * x - cos * y)
    warped = scan.transform((side, side), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC)
    alpha = np.clip((np.asarray(warped, dtype=np.float32) / 255 - edge) / 0.3, 0, 1)
    return (alpha * alpha * (3 - 2 * alpha)).astype(np.float32)


def background(random: np.random.RandomState, side: int) -> Bytes:
    """Smooth colour noise, distractor strokes and blobs that are no digits, and grain: (side, side, 3) uint8."""
    base = random.uniform(15, 85, size=3)
    swing = random.uniform(10, 40)
    coarse = base + random.uniform(-swing, swing, size=(5, 5, 3))
    small = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    image = small.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(random.randint(side // 12, side // 6)):
        _distractor(random, draw, side, base)
    pixels = np.asarray(image, dtype=np.float32)
    grain = random.randint(-8, 9, size=(side, side, 1))
    noisy: Bytes = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    return noisy


def _distractor(
    random: np.random.RandomState, draw: ImageDraw.ImageDraw, side: int, base: npt.NDArray[np.float64]
) -> None:
    colour = tuple(int(c) for c in np.clip(base + random.uniform(-50, 50, size=3), 0, 255))
    x, y = (float(v) for v in random.uniform(0, side, size=2))
    reach = float(random.uniform(4, 18))
    turn = float(random.uniform(0, 2 * math.pi))
    dx, dy = reach * math.cos(turn), reach * math.sin(turn)
    width = int(random.randint(1, 4))
    shape = random.randint(4)
    if shape == 0:
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=width)
    elif shape == 1:
        box = (x - abs(dx) - 1, y - abs(dy) - 1, x + abs(dx) + 1, y + abs(dy) + 1)
        draw.ellipse(box, fill=colour)
    elif shape == 2:
        draw.polygon((x + dx, y + dy, x - dy, y + dx, x - dx / 2, y - dy / 2), fill=colour)
    else:
        draw.line((x - dx, y - dy, x, y, x + dy, y - dx), fill=colour, width=width)


def ink_colour(random: np.random.RandomState) -> Floats:
    """A bright, pale colour: (3,) float32 in 0..255."""
    return random.uniform(*_INK, size=3).astype(np.float32)


def blend(pixels: Bytes, alpha: Floats, colour: Floats) -> Bytes:
    """``pixels`` (H, W, 3) with ``colour`` laid over them at opacity ``alpha`` (H, W)."""
    mixed = pixels + (colour - pixels) * alpha[..., None]
    return np.rint(mixed).astype(np.uint8)


def scene(
    random: np.random.RandomState, scans: list[Image.Image], labels: npt.NDArray[np.int64], side: int = 128
) -> tuple[Bytes, list[Digit]]:
    """Three to five digits over a cluttered background; later ones cover earlier ones.

    A place that would leave less than three quarters of any digit visible is drawn again.

    Returns:
        (side, side, 3) uint8 and the digits in the order in which they were laid.
    """
    pixels = background(random, side)
    digits: list[Digit] = []
    whole: list[int] = []
    wanted = random.randint(3, 6)
    for _ in range(8 * wanted):
        if len(digits) == wanted:
            break
        which = random.randint(len(scans))
        height = float(random.uniform(36, 60))
        x, y = (float(v) for v in random.uniform(height * 0.55, side - height * 0.55, size=2))
        turn = float(random.uniform(-12, 12))
        alpha, window = _patch(scans[which], (x, y), height, turn, side)
        mask = np.zeros((side, side), dtype=np.bool_)
        mask[window] = alpha > 0.5
        left = [(digit.visible & ~mask).sum() for digit in digits]
        if mask.sum() < 20 or any(now < _MIN_VISIBLE * n for now, n in zip(left, whole, strict=True)):
            continue
        for digit in digits:
            digit.visible &= ~mask
        # A shadow around each digit parts it from the ones it lies on.
        shadow, _ = _patch(scans[which], (x, y), height, turn, side, _SHADOW_EDGE)
        pixels[window] = blend(pixels[window], shadow * _SHADOW, np.zeros(3, dtype=np.float32))
        pixels[window] = blend(pixels[window], alpha, ink_colour(random))
        digits.append(Digit(int(labels[which]), mask))
        whole.append(int(mask.sum()))
    return pixels, digits


def _patch(
    scan: Image.Image, centre: tuple[float, float], height: float, degrees: float, side: int, edge: float = 0.25
) -> tuple[Floats, tuple[slice, slice]]:
    """A digit's opacity on the part of the scene that it can touch, and that part as (rows, columns)."""
    reach = math.ceil(height * 0.85)
    left, top = (max(0, math.floor(v) - reach) for v in centre)
    right, bottom = (min(side, math.floor(v) + reach) for v in centre)
    span = max(right - left, bottom - top)
    alpha = digit_alpha(scan, span, (centre[0] - left, centre[1] - top), height, degrees, edge)
    return alpha[: bottom - top, : right - left], (slice(top, bottom), slice(left, right))


MOTIONS = ["left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking"]
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def moving_digit(
    random: np.random.RandomState, scan: Image.Image, motion: str, frames: int = 12, side: int = 64
) -> list[Bytes]:
    """One digit that moves over a still background: ``frames`` × (side, side, 3) uint8.

    No frame alone tells the motion: the digit starts anywhere and leaves one edge to enter at the opposite one; it
    starts turned by any angle, whatever the motion; and growing and shrinking are each other's reverse in time.
    """
    still = background(random, side)
    x, y = (float(v) for v in random.uniform(0, side, size=2))
    angle, turn = float(random.uniform(0, 360)), float(random.uniform(10, 24))
    small, large = float(random.uniform(16, 24)), float(random.uniform(34, 42))
    height, speed = float(random.uniform(18, 40)), float(random.uniform(2, 5))
    dx, dy = _STEPS.get(motion, (0, 0))
    shapes: list[Floats] = []
    for frame in range(frames):
        share = frame / max(frames - 1, 1)
        size, degrees = height, angle
        if motion in ("growing", "shrinking"):
            size = small * (large / small) ** (share if motion == "growing" else 1 - share)
        elif motion in ("clockwise", "counter-clockwise"):
            degrees = angle + frame * (turn if motion == "counter-clockwise" else -turn)
        alpha = digit_alpha(scan, side, (side / 2, side / 2), size, degrees)
        shift_x, shift_y = x + dx * speed * frame - side / 2, y + dy * speed * frame - side / 2
        shapes.append(np.roll(alpha, (round(shift_y), round(shift_x)), axis=(0, 1)))
    colour = ink_colour(random)
    return [blend(still, alpha, colour) for alpha in shapes]
