"""Small committed checkpoints, written without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.files import write_safetensors

VALUES = np.arange(10, dtype=np.float32)


def manifest_of(run: Path, step: int, files: list[layout.FileRecord], world: int, attempt: int = 1) -> layout.Manifest:
    return layout.Manifest(
        run=run.name,
        attempt=attempt,
        step=step,
        samples=step,
        data=layout.DataState(fingerprint="f", seed=0, epoch=0, cursor=step),
        world=world,
        zero_stage=2,
        recipe_hash="h",
        classes=["a"],
        normalisation=layout.Normalisation(mean=[0, 0, 0], std=[1, 1, 1], image_size=[8, 8]),
        parameters={"w": [2, 5]},
        kinds=[layout.MASTER],
        scalars={},
        groups=[],
        frozen=None,
        code_version="0",
        created=0.0,
        files=files,
    )


def write(run: Path, step: int, world: int = 2, attempt: int = 1) -> Path:
    """Commit a checkpoint of one vector of ten numbers (times the step), cut over the ranks."""
    folder = commit.temporary_folder(run, step, attempt)
    folder.mkdir(parents=True)
    records = [write_safetensors(folder / layout.BUFFERS, {"steps": np.array(step)})]
    for rank in range(world):
        start, stop = layout.even_range(10, rank, world)
        key = layout.range_key(layout.MASTER, "w", start)
        records.append(write_safetensors(folder / layout.shard_name(rank), {key: VALUES[start:stop] * step}))
    return commit.commit(run, manifest_of(run, step, records, world, attempt))
