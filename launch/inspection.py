"""What ``vitgraft checkpoints`` prints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from vitgraft.configs.errors import CheckpointError
from vitgraft.trainer.checkpoint.layout import MANIFEST
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint, scan, verify


def list_lines(run: Path) -> Iterator[str]:
    """One line for each checkpoint, oldest first.

    Raises:
        CheckpointError: no such run, or it has none.
    """
    found = _scan(run)
    for path, checkpoint in found:
        if isinstance(checkpoint, CheckpointError):
            yield f"{path.name}  INVALID  {checkpoint}"
            continue
        manifest = checkpoint.manifest
        size = sum(record.bytes for record in manifest.files) / 1e6
        age = (time.time() - manifest.created) / 60
        yield (
            f"{path.name}  complete  {manifest.samples:>10,} samples  {size:9.1f} MB  {age:8.1f} min old  "
            f"world {manifest.world}  ZeRO-{manifest.zero_stage}"
        )


def verify_lines(target: Path) -> Iterator[str]:
    """One line for each checkpoint as its hashes are checked.

    Raises:
        CheckpointError: at the end, when one is damaged.
    """
    if (target / MANIFEST).is_file():
        verify(open_checkpoint(target))
        yield f"{target.name}  valid"
        return
    damaged = []
    for path, checkpoint in _scan(target):
        try:
            if isinstance(checkpoint, CheckpointError):
                raise checkpoint
            verify(checkpoint)
            yield f"{path.name}  valid"
        except CheckpointError as error:
            damaged.append(path.name)
            yield f"{path.name}  INVALID  {error}"
    if damaged:
        raise CheckpointError(f"{target}: damaged: {', '.join(damaged)}; training goes on from the newest valid one")


def _scan(run: Path) -> list[tuple[Path, Checkpoint | CheckpointError]]:
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run directory")
    found = scan(run)
    if not found:
        raise CheckpointError(f"{run}: no checkpoints yet")
    return found
