"""From bytes to tensors: images, label maps, annotations and frames, with bounded sizes and clear errors."""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema.data import ClipConfig

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded."""
MAX_JSON_BYTES = 256 << 20
MAX_FRAMES = 1_000_000
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "webm", "mov")

_FORMATS = ("JPEG", "PNG", "WEBP")
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError, OverflowError)


@contextmanager
def _opened(data: bytes | Path, where: str) -> Iterator[Image.Image]:
    """A PIL image of bounded size; whatever goes wrong inside the block becomes a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width}x{image.height}"
                    raise DataError(f"{where}: {size} pixels, more than {MAX_PIXELS}; shrink the image")
                yield image
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; check the path") from None
    except _BROKEN as error:
        raise DataError(f"{where}: broken image ({error}); expected a whole JPEG, PNG or WebP; replace it") from None


def image_size(data: bytes | Path, where: str) -> tuple[int, int]:
    """(height, width) from the header, without decoding.

    Raises:
        DataError: no such file, not an image, or more than ``MAX_PIXELS``.
    """
    with _opened(data, where) as image:
        return image.height, image.width


def image_format(data: bytes | Path, where: str) -> str:
    """The member extension of an image by its content: jpg, png or webp."""
    with _opened(data, where) as image:
        return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[str(image.format)]


def decode_image(data: bytes | Path, where: str) -> Tensor:
    """Pixels as stored: (3, H, W) uint8 RGB.

    An EXIF orientation is not applied: annotations are in the coordinates of the stored pixels. 16-bit grey is scaled
    to 8 bits, transparency dropped.

    Raises:
        DataError: broken or too large; names ``where``.
    """
    with _opened(data, where) as image:
        if image.mode.startswith("I"):
            values = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8)
            pixels = np.repeat(values[..., None], 3, axis=2)
        else:
            pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def decode_label(data: bytes | Path, where: str) -> Tensor:
    """A label map as class ids: (H, W) int32; palette images give their indices, 16-bit ones their values.

    Raises:
        DataError: broken, too large, or a colour image.
    """
    with _opened(data, where) as image:
        if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
            raise DataError(
                f"{where}: label map of mode {image.mode}; expected one channel of class ids (8-bit, palette or 16-bit)"
            )
        values = np.asarray(image).astype(np.int32)
    return torch.from_numpy(values)


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """A sample's metadata: a JSON object of bounded size.

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


def check_annotations(metadata: dict[str, Any], classes: int, where: str) -> list[dict[str, Any]]:
    """A detection sample's annotations after a check of everything that decoding relies on.

    Raises:
        DataError: a box that is not four finite numbers, a class outside 0..classes-1, or a mask of another size.
    """
    try:
        size = [int(metadata["height"]), int(metadata["width"])]
        annotations: list[dict[str, Any]] = metadata["annotations"]
        for item in annotations:
            box, segmentation = item["bbox"], item["segmentation"]
            if len(box) != 4 or not all(math.isfinite(float(v)) for v in box):
                raise ValueError(f"box {box}")
            if not isinstance(item["class"], int) or not 0 <= item["class"] < classes:
                raise ValueError(f"class {item['class']} of {classes}")
            if segmentation is not None and (list(segmentation["size"]) != size or not segmentation["counts"]):
                raise ValueError(f"mask of {segmentation['size']} on an image of {size}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: annotations are damaged ({error}); pack again") from None
    return annotations


def decode_masks(annotations: Sequence[dict[str, Any]], size: tuple[int, int], where: str) -> Tensor:
    """Instance masks (N, H, W) uint8 of checked annotations; one without segmentation gets its box, filled.

    Raises:
        DataError: run lengths that do not describe a mask of this size.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    masks = np.zeros((len(annotations), height, width), dtype=np.uint8)
    for mask, item in zip(masks, annotations, strict=True):
        if item["segmentation"] is None:
            x, y, w, h = item["bbox"]
            mask[max(0, round(y)) : max(0, round(y + h)), max(0, round(x)) : max(0, round(x + w))] = 1
            continue
        try:
            counts = item["segmentation"]["counts"].encode("ascii")
            mask[:] = coco_mask.decode({"size": [height, width], "counts": counts})
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{where}: annotation {item.get('id')}: damaged mask ({error}); pack again") from None
    return torch.from_numpy(masks)


def sample_frames(count: int, clip: ClipConfig, train: bool, generator: torch.Generator | None = None) -> list[int]:
    """Which frames of a video of ``count`` frames make the clip.

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


@contextmanager
def _video(data: bytes | Path, where: str) -> Iterator[tuple[Any, Any]]:
    """An open container and its first video stream; whatever goes wrong inside the block becomes a DataError."""
    import av

    try:
        # Metadata in any encoding: titles are never read, so they must not stop the decoding.
        source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
        with av.open(source, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DataError(f"{where}: no video stream; expected a video")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            if stream.width * stream.height > MAX_PIXELS:
                raise DataError(f"{where}: frames of {stream.width}x{stream.height} pixels; shrink the video")
            yield container, stream
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; check the path") from None
    except (av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
        raise DataError(f"{where}: broken video ({error}); expected one that FFmpeg decodes; replace it") from None


def probe_video(data: bytes | Path, where: str) -> dict[str, Any]:
    """{frames, fps, height, width} by decoding everything: what headers claim is often one frame off or absent.

    Height and width are those after the rotation tag.

    Raises:
        DataError: broken, without a frame, or too large.
    """
    with _video(data, where) as (container, stream):
        frames, size = 0, (0, 0)
        for frame in container.decode(stream):
            if frames == 0:
                turned = int(getattr(frame, "rotation", 0)) % 180 != 0
                size = (frame.width, frame.height) if turned else (frame.height, frame.width)
            frames += 1
            if frames > MAX_FRAMES:
                raise DataError(f"{where}: more than {MAX_FRAMES} frames; cut the video")
        rate = stream.average_rate or stream.guessed_rate
    if not frames:
        raise DataError(f"{where}: not one frame can be decoded; replace the video")
    return {"frames": frames, "fps": float(rate) if rate else 0.0, "height": size[0], "width": size[1]}


def decode_frames(data: bytes | Path, indices: Sequence[int], where: str) -> Tensor:
    """The frames with these ascending numbers (repetitions allowed): (T, 3, H, W) uint8 RGB, rotation tags applied.

    Decodes from the start, as seeking is not exact in all containers.

    Raises:
        DataError: broken, or shorter than the numbers ask for.
    """
    wanted = set(indices)
    found: dict[int, np.ndarray[Any, Any]] = {}
    with _video(data, where) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                pixels = frame.to_ndarray(format="rgb24")
                turns = round(int(getattr(frame, "rotation", 0)) / 90) % 4
                found[number] = np.rot90(pixels, turns)
            if len(found) == len(wanted):
                break
    if missing := sorted(wanted - found.keys()):
        raise DataError(
            f"{where}: frame {missing[0]} cannot be decoded, {len(found)} of {len(wanted)} found; pack again"
        )
    shapes = {value.shape for value in found.values()}
    if len(shapes) > 1:
        raise DataError(f"{where}: frames change their size ({sorted(shapes)}); convert the video to one size")
    stacked = np.stack([found[index] for index in indices])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
