"""The built-in data set: scenes and clips made from scikit-learn's 1,797 scans of handwritten digits (8×8, UCI)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.hashing import seed_of
from vitgraft.data_shards.manifest import Kind, Manifest
from vitgraft.data_shards.pack.reencode import encode_mp4
from vitgraft.data_shards.pack.scenes import MOTIONS, Bytes, Digit, moving_digit, padded_scan, scene
from vitgraft.data_shards.pack.writer import DatasetWriter, Progress
from vitgraft.data_shards.plan import permutation

Split = Literal["train", "val"]

VERSION = 1
"""Changes when the pixels of a given seed change; part of the cache folder's name."""
DIGIT_NAMES = [str(digit) for digit in range(10)]
DEFAULT_SAMPLES: dict[tuple[str, str], int] = {
    ("detection", "train"): 3000,
    ("detection", "val"): 200,
    ("semantic", "train"): 3000,
    ("semantic", "val"): 200,
    ("video", "train"): 1600,
    ("video", "val"): 160,
}
FRAMES = 12
FPS = 12


def pack_digits(
    task: Kind,
    split: Split,
    out: Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
) -> Manifest:
    """Draw and pack one split of the built-in data set.

    detection: 128×128 scenes of 3-5 overlapping digits, masks are the visible pixels, boxes tight around them.
    semantic: the same scenes, classes background and the digits. video: 64×64 clips of 12 frames of one moving digit,
    eight classes by motion. Training and validation use different scans at every seed.

    Args:
        samples: how many; ``None``: 3000 / 200 scenes, 1600 / 160 clips.

    Raises:
        ConfigError: unknown task or split, or scikit-learn is not installed.
        DataError: the disk is full.
    """
    if (task, split) not in DEFAULT_SAMPLES:
        valid = ", ".join("/".join(pair) for pair in DEFAULT_SAMPLES)
        raise ConfigError(f"digits: no such set {task}/{split}; valid ones: {valid}")
    count = DEFAULT_SAMPLES[task, split] if samples is None else samples
    if count < 1:
        raise ConfigError(f"digits: samples is {count}; give at least 1")
    scans, labels = scans_of(split)
    images = [padded_scan(scan) for scan in scans]
    classes = {"detection": DIGIT_NAMES, "semantic": ["background", *DIGIT_NAMES], "video": MOTIONS}[task]
    source = {"packer": "digits", "version": VERSION, "task": task, "split": split, "samples": count, "seed": seed}
    writer = DatasetWriter(
        out,
        task,
        list(classes),
        category_ids=list(range(1, 11)) if task == "detection" else None,
        source=cast(dict[str, Any], source),
        total=count,
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )
    # Motions are dealt out in a shuffled order, so that each has its equal share.
    deal = permutation(seed_of("digits", "motions", split, seed), count)
    with writer:
        for number in range(count):
            # Semantic scenes are the detection scenes: their seeds do not name the task.
            random = np.random.RandomState(seed_of("digits", VERSION, split, seed, number) % (1 << 32))
            if task == "video":
                which = int(random.randint(len(images)))
                writer.add(*_clip(random, images[which], int(deal[number]) % len(MOTIONS), number))
            else:
                pixels, digits = scene(random, images, labels)
                writer.add(*(_detection if task == "detection" else _semantic)(pixels, digits, number))
    return writer.result()


def scans_of(split: Split) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The scans (N, 8, 8) with values 0..16 and their digits (N,) of one split: about 80 % train, 20 % val, disjoint.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the built-in digits need scikit-learn, which is not installed: pip install 'vitgraft[demo]'"
        ) from None
    data = load_digits()
    order = permutation(seed_of("digits", "split"), len(data.images))
    cut = len(order) * 4 // 5
    chosen = np.sort(order[:cut] if split == "train" else order[cut:])
    return np.asarray(data.images[chosen], dtype=np.float64), np.asarray(data.target[chosen], dtype=np.int64)


def _jpeg(pixels: Bytes) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _file_name(number: int, extension: str) -> str:
    return f"digits-{number:09d}.{extension}"


def _detection(pixels: Bytes, digits: list[Digit], number: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    from pycocotools import mask as coco_mask

    annotations = []
    for index, digit in enumerate(digits):
        rows, columns = np.flatnonzero(digit.visible.any(1)), np.flatnonzero(digit.visible.any(0))
        x, y = int(columns[0]), int(rows[0])
        rle = coco_mask.encode(np.asfortranarray(digit.visible, dtype=np.uint8))
        annotations.append(
            {
                "id": number * 100 + index + 1,
                "bbox": [float(x), float(y), float(columns[-1] + 1 - x), float(rows[-1] + 1 - y)],
                "class": digit.label,
                "area": float(digit.visible.sum()),
                "iscrowd": 0,
                "segmentation": {"size": list(digit.visible.shape), "counts": rle["counts"].decode("ascii")},
            }
        )
    height, width = pixels.shape[0], pixels.shape[1]
    metadata = {"image_id": number + 1, "file_name": _file_name(number, "jpg"), "height": height, "width": width}
    return {"jpg": _jpeg(pixels)}, {**metadata, "annotations": annotations}


def _semantic(pixels: Bytes, digits: list[Digit], number: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    height, width = pixels.shape[0], pixels.shape[1]
    label = np.zeros((height, width), dtype=np.uint8)
    for digit in digits:
        label[digit.visible] = digit.label + 1
    stream = io.BytesIO()
    Image.fromarray(label).save(stream, "PNG")
    metadata = {"file_name": _file_name(number, "jpg"), "height": height, "width": width}
    return {"jpg": _jpeg(pixels), "label.png": stream.getvalue()}, metadata


def _clip(
    random: np.random.RandomState, scan: Image.Image, label: int, number: int
) -> tuple[dict[str, bytes], dict[str, Any]]:
    frames = moving_digit(random, scan, MOTIONS[label], FRAMES)
    height, width = frames[0].shape[:2]
    metadata = {"label": label, "file_name": _file_name(number, "mp4"), "frames": len(frames), "fps": float(FPS)}
    return {"mp4": encode_clip(frames, FPS)}, {**metadata, "height": height, "width": width}


def encode_clip(frames: list[Bytes], fps: int) -> bytes:
    """An mp4 of the frames (H, W, 3) uint8 at high quality."""
    return encode_mp4(frames, fps, crf=12)
