"""From bytes to tensors: label maps, annotations and frames, with bounded sizes and clear errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitgraft.configs.errors import DataError, printable
from vitgraft.configs.schema.data import ClipConfig
from vitgraft.data_shards.frame_stack import FrameStack, Target
from vitgraft.data_shards.images import MAX_PIXELS, opened, read_header
from vitgraft.data_shards.listing import VIDEO_SUFFIXES
from vitgraft.data_shards.video import MAX_FRAMES, Decoder, Video, open_video

MAX_JSON_BYTES = 256 << 20
MAX_MASK_BYTES = 2 << 30
"""All masks of one image together, a byte for each pixel."""
MAX_COORDINATE = 1e9
MAX_AREA = MAX_COORDINATE**2
_MORE_VIDEOS = {suffix.removeprefix(".") for suffix in VIDEO_SUFFIXES} - {"mp4", "avi", "mkv", "webm", "mov"}
VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "webm", "mov", *sorted(_MORE_VIDEOS))
"""Of members, the usual ones first; decoders look at the content."""

_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
NO_JPEG = (
    "label maps in JPEG or WebP are refused, as they change ids at every edge; save them as PNG from their "
    "source: what was a JPEG once stays wrong"
)


def check_lossless(path: Path) -> None:
    """Refuse a file of ids or colours in a format that changes pixels.

    Raises:
        DataError: it is one, or no image.
    """
    if read_header(path, str(path)).format in _LOSSY:
        raise DataError(f"{path}: {NO_JPEG}")


def decode_label(data: bytes | Path, where: str) -> Tensor:
    """Decode a label map as class ids: (H, W) int32; palette images give their indices, 16-bit ones their values.

    Colour images whose channels are equal are taken for the grey ones that they are, as is opaque transparency.

    Raises:
        DataError: broken, too large, in a format that changes pixels, a colour image, or one with transparency.
    """
    with opened(data, where) as image:
        if image.format in _LOSSY or image.info.get("compression") == "jpeg":
            raise DataError(f"{where}: {NO_JPEG}")
        if image.mode in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
            values = np.asarray(image).astype(np.int32)
        elif image.mode in ("LA", "RGB", "RGBA"):
            values = _grey(np.asarray(image), image.mode, where).astype(np.int32)
        else:
            raise DataError(
                f"{where}: label map of mode {image.mode}; expected one channel of class ids (8-bit, palette or 16-bit)"
            )
    return torch.from_numpy(values)


def _grey(pixels: np.ndarray, mode: str, where: str) -> np.ndarray:
    """Return the one channel (H, W) that an image (H, W, channels) of several holds."""
    if mode.endswith("A") and not (pixels[..., -1] == 255).all():
        raise DataError(f"{where}: label map with transparent pixels; save it with one channel of class ids")
    colours = pixels[..., :-1] if mode.endswith("A") else pixels
    if not (colours == colours[..., :1]).all():
        y, x = np.argwhere((colours != colours[..., :1]).any(-1))[0].tolist()
        raise DataError(
            f"{where}: label map in colours (mode {mode}, {' '.join(map(str, colours[y, x]))} at x {x}, y {y}); "
            "expected one channel of class ids, or --colours FILE where shards pack semantic is to translate colours"
        )
    return colours[..., 0]


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """Return a sample's metadata: a JSON object of bounded size.

    Raises:
        DataError: not a JSON object, or too large.
    """
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"{len(data)} bytes")
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: metadata is not readable JSON ({error}); pack again") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: metadata is not a JSON object; pack again")
    return value


def shown(value: Any) -> str:
    """Return an untrusted value as short text in one line, for error messages."""
    return printable(str(value)[:100])


def stated_size(metadata: dict[str, Any], where: str) -> tuple[int, int]:
    """Return (height, width) that a sample's metadata states.

    Raises:
        DataError: absent, not positive integers, or of more than ``MAX_PIXELS``.
    """
    height, width = metadata.get("height"), metadata.get("width")
    if not (type(height) is int and type(width) is int and height > 0 and width > 0):
        raise DataError(
            f"{where}: metadata says height {shown(height)} and width {shown(width)}, expected positive integers; "
            "pack again"
        )
    if height * width > MAX_PIXELS:
        size = shown(f"{width}x{height}")
        raise DataError(f"{where}: metadata says {size} pixels, more than {MAX_PIXELS}; pack again")
    return height, width


def stated_frames(metadata: dict[str, Any], where: str) -> int:
    """Return the number of frames of a video by its sample's metadata.

    Raises:
        DataError: absent, no positive integer, or more than ``MAX_FRAMES``.
    """
    frames = metadata.get("frames")
    if type(frames) is not int or not 1 <= frames <= MAX_FRAMES:
        raise DataError(f"{where}: metadata says {shown(frames)} frames, expected 1 to {MAX_FRAMES}; pack again")
    return frames


def stated_label(metadata: dict[str, Any], classes: int, where: str) -> int:
    """Return the class of a sample that has one, as its metadata states.

    Raises:
        DataError: absent, or no class id.
    """
    label = metadata.get("label")
    if type(label) is not int or not 0 <= label < classes:
        raise DataError(f"{where}: label {shown(repr(label))} is not one of the {classes} classes; pack again")
    return label


def check_annotations(metadata: dict[str, Any], classes: int, where: str) -> list[dict[str, Any]]:
    """Return a detection sample's annotations after a check of everything that decoding and evaluation rely on.

    Raises:
        DataError: a size that is none, a box that is not four finite numbers, a class outside 0..classes-1, an area
            that is none, ``iscrowd`` that is neither 0 nor 1, or a mask of another size.
    """
    size = list(stated_size(metadata, where))
    try:
        annotations: list[dict[str, Any]] = metadata["annotations"]
        for item in annotations:
            box, number, segmentation = item["bbox"], item["class"], item["segmentation"]
            area, crowd = item["area"], item["iscrowd"]
            # Comparing takes integers of any length, and is false for NaN.
            if len(box) != 4 or not all(type(v) in (int, float) and abs(v) < MAX_COORDINATE for v in box):
                raise ValueError(f"box {box}")
            if type(number) is not int or not 0 <= number < classes:
                raise ValueError(f"class {number} of {classes}")
            if type(area) not in (int, float) or not 0 <= area < MAX_AREA:
                raise ValueError(f"area {area}")
            if type(crowd) is not int or crowd not in (0, 1):
                raise ValueError(f"iscrowd {crowd}, expected 0 or 1")
            if segmentation is not None and (list(segmentation["size"]) != size or not segmentation["counts"]):
                raise ValueError(f"mask of {segmentation['size']} on an image of {size}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: annotations are damaged ({shown(error)}); pack again") from None
    return annotations


def covered(counts: bytes) -> int:
    """Return the number of pixels in COCO's compressed run lengths; pycocotools leaves any further uninitialised.

    Each number is of six-bit characters, low bits first, bit 5 for more to come and bit 4 of the last for the sign;
    from the fourth on they are differences to the one before the last (``rleFrString`` in maskApi.c).

    Raises:
        ValueError: no such text, or a negative length.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError("no run lengths")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 8:
        raise ValueError("run length too large")
    numbers = np.add.reduceat((codes & 31) << 5 * places, starts)
    numbers -= np.where(codes[ends] & 16, np.int64(32) << 5 * places[ends], 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    if numbers.min() < 0:
        raise ValueError("negative run length")
    return int(numbers.sum())


def decode_masks(annotations: Sequence[dict[str, Any]], size: tuple[int, int], where: str) -> Tensor:
    """Decode instance masks (N, H, W) uint8 of checked annotations; one without segmentation gets its box, filled.

    Raises:
        DataError: run lengths that do not describe a mask of this size.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    if len(annotations) * height * width > MAX_MASK_BYTES:
        raise DataError(
            f"{where}: {len(annotations)} masks of {width}x{height} pixels take more than {MAX_MASK_BYTES} bytes; "
            "cut the image into tiles"
        )
    masks = np.zeros((len(annotations), height, width), dtype=np.uint8)
    for mask, item in zip(masks, annotations, strict=True):
        if item["segmentation"] is None:
            x, y, w, h = item["bbox"]
            mask[max(0, round(y)) : max(0, round(y + h)), max(0, round(x)) : max(0, round(x + w))] = 1
            continue
        try:
            counts = item["segmentation"]["counts"].encode("ascii")
            if (found := covered(counts)) != height * width:
                raise ValueError(f"run lengths of {found} pixels")
            mask[:] = coco_mask.decode({"size": [height, width], "counts": counts})
        except (ValueError, AttributeError, TypeError) as error:
            number = shown(item.get("id"))
            raise DataError(f"{where}: annotation {number}: damaged mask ({error}); pack again") from None
    return torch.from_numpy(masks)


def sample_frames(count: int, clip: ClipConfig, train: bool, generator: torch.Generator | None = None) -> list[int]:
    """Return the frame numbers of a clip from a video of ``count`` frames.

    dense: ``clip.frames`` frames ``clip.stride`` apart, from a random window in training and the central one in
    evaluation. uniform: one frame of each of ``clip.frames`` equal segments, a random one in training, the middle one
    in evaluation. Where the video is too short, its last frame is repeated.

    Args:
        generator: of the random numbers; ``None``: torch's global one.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator)) if train else (low + high - 1) // 2

    if clip.sampling == "dense":
        span = (clip.frames - 1) * clip.stride + 1
        start = draw(0, max(count - span, 0) + 1)
        return [min(start + i * clip.stride, count - 1) for i in range(clip.frames)]
    if count < clip.frames:
        return [min(i, count - 1) for i in range(clip.frames)]
    edges = [i * count // clip.frames for i in range(clip.frames + 1)]
    return [draw(low, high) for low, high in itertools.pairwise(edges)]


def probe_video(data: bytes | Path | Video, where: str) -> dict[str, Any]:
    """Return {frames, fps, height, width} by decoding everything: headers are often one frame off or lack them.

    Height and width are those after the rotation tag. Always by PyAV: what a packed data set says of its videos must
    not depend on what else is installed.

    Raises:
        DataError: broken, without a frame, or too large.
    """
    video = open_video(data, where, "pyav")
    height, width = video.size
    return {"frames": video.length, "fps": video.fps, "height": height, "width": width}


def decode_frames(
    data: bytes | Path | Video,
    indices: Sequence[int],
    where: str,
    decoder: Decoder | None = None,
    length: int | None = None,
) -> Tensor:
    """Decode the frames with these ascending numbers (repetitions allowed): (T, 3, H, W) uint8 RGB, rotation tags
    applied.

    Args:
        decoder, length: see :func:`~vitgraft.data_shards.video.open_video`.

    Raises:
        DataError: broken, shorter than the numbers ask for, or more than ``MAX_CLIP_PIXELS``.
        ConfigError: ``decoder`` is not installed.
    """
    stack = FrameStack(indices, where)
    open_video(data, where, decoder, length).fill(stack)
    return stack.frames()


def decode_resized(
    data: bytes | Path | Video,
    indices: Sequence[int],
    where: str,
    target: Target,
    decoder: Decoder | None = None,
    length: int | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Decode frames like :func:`decode_frames`, each resized as it is decoded; also return the former (height, width).

    Args:
        target: from that size to the one that is kept, for which ``MAX_CLIP_PIXELS`` counts.
    """
    stack = FrameStack(indices, where, target)
    open_video(data, where, decoder, length).fill(stack)
    frames = stack.frames()
    assert stack.size is not None
    return frames, stack.size
