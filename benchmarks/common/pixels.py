"""The work that all readers do alike, written out plainly: no vitgraft here."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SIZE, BATCH = (192, 256), 16
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

Timed = tuple[float, int, str]
"""Seconds by the clock, or of a core's time; samples; a digest of them."""


def decoded(jpg: bytes) -> Tensor:
    """A JPEG, resized to ``SIZE`` and normalised: (3, H, W) float32."""
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(jpg)))).permute(2, 0, 1)
    image = F.resize(image, list(SIZE), antialias=True)
    pixels = image.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255).sub_(_MEAN).div_(_STD)


def time_bytes(samples: Iterable[tuple[bytes, bytes]]) -> Timed:
    """Take all samples, images and metadata, by the clock."""
    started = time.perf_counter()
    found = list(samples)
    seconds = time.perf_counter() - started
    return seconds, len(found), digest(jpg + b"\0" + text for jpg, text in found)


def time_decoding(jpgs: Iterator[bytes]) -> Timed:
    """Make batches of all images. Taking their digest does not count."""

    def batches() -> Iterator[Tensor]:
        while images := [decoded(jpg) for jpg in islice(jpgs, BATCH)]:
            yield torch.stack(images)

    return time_batches(batches())


def time_batches(batches: Iterator[Tensor]) -> Timed:
    """Take batches (B, 3, H, W) one by one: this process's time on a core, without what digests take in between.

    It is pure computation, of which a core's time says more than the clock where others use the machine too.
    """
    seconds, images = 0.0, []
    while True:
        started = time.process_time()
        batch = next(batches, None)
        seconds += time.process_time() - started
        if batch is None:
            return seconds, len(images), digest(images)
        images += [image.numpy().tobytes() for image in batch]


def time_worker(batches: Iterator[Tensor], count: int) -> Timed:
    """As :func:`time_batches`, of ``count`` batches that another process makes: its time and this one's, from the first
    batch to the last."""
    first = next(batches)
    # At once: the other process makes the second one already.
    others = _descendants(os.getpid())
    here, there, pause = time.process_time(), sum(map(_core_seconds, others)), 0.0
    started = time.process_time()
    images = [image.numpy().tobytes() for image in first]
    pause += time.process_time() - started
    for number in range(1, count):
        batch = next(batches)
        if number == count - 1:
            # Before the iterator comes to its end and the process goes.
            there = sum(map(_core_seconds, others)) - there
        started = time.process_time()
        images += [image.numpy().tobytes() for image in batch]
        pause += time.process_time() - started
    here = time.process_time() - here - pause
    for _ in batches:
        raise RuntimeError(f"more than {count} batches")
    return (there + here) * count / (count - 1), len(images), digest(images)


def _core_seconds(pid: int) -> float:
    """A process's time on cores, from the scheduler's nanoseconds: the usual figure has ticks of 10 ms."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def digest(samples: Iterable[bytes]) -> str:
    """Of samples as a multiset: their order does not count."""
    parts = sorted(hashlib.sha256(sample).digest() for sample in samples)
    return hashlib.sha256(b"".join(parts)).hexdigest()
