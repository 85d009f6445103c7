"""Data sets for measuring: JPEG images that compress like photographs, from a fixed seed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.writer import DatasetWriter


def pack(out: Path, samples: int, per_shard: int, size: tuple[int, int]) -> Manifest:
    """A data set of images of one (height, width), with a class each."""
    generator = np.random.default_rng(0)
    height, width = size
    with DatasetWriter(out, "image", ["even", "odd"], samples_per_shard=per_shard) as writer:
        for number in range(samples):
            coarse = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            stream = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
            facts = {"height": height, "width": width, "label": number % 2, "file_name": f"{number}.jpg"}
            writer.add({"jpg": stream.getvalue()}, facts)
    return writer.result()
