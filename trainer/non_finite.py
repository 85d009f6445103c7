"""Non-finite losses: their entries (RUN/non_finite.jsonl), and the entries to leave out (RUN/left_out.jsonl).

The ranks write the first and read the second; the supervisor reads the first and writes the second (launch/replay.py).
Both are append-only, and a row is on the disk before it takes effect.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema import Recipe
from vitgraft.trainer.checkpoint.commit import all_step_names
from vitgraft.trainer.checkpoint.files import sync_folder
from vitgraft.trainer.monitor_files import read_rows
from vitgraft.trainer.new_run import new_run, same_run

if TYPE_CHECKING:  # the supervisor reads these files without torch
    from vitgraft.data_shards.batch import Entry

NON_FINITE = "non_finite.jsonl"
LEFT_OUT = "left_out.jsonl"


def record_non_finite(
    run: Path, *, attempt: int, step: int, losses: Sequence[str], entries: Sequence[tuple[Entry, str]]
) -> None:
    """Append what was not finite.

    Args:
        step: as in the metrics, from 1.
        losses: names of the losses.
        entries: each with its sample's key.

    Raises:
        OSError: it cannot be written.
    """
    found = [[*entry, key] for entry, key in entries]
    append_durably(run / NON_FINITE, {"attempt": attempt, "step": step, "losses": [*losses], "entries": found})


def read_left_out(run: Path) -> frozenset[tuple[int, int]]:
    """Return the entries (epoch, position) that are left out.

    Raises:
        DataError: a row is none.
    """
    found: set[tuple[int, int]] = set()
    for row in read_rows(run / LEFT_OUT):
        entries = row.get("entries")
        if not isinstance(entries, list) or not all(_is_place(entry) for entry in entries):
            raise DataError(
                f"{run / LEFT_OUT}: {json.dumps(row)[:200]}: expected entries as a list of [epoch, position]; remove it"
            )
        found |= {(epoch, position) for epoch, position in entries}
    return frozenset(found)


def remedy(run: Path, recipe: Recipe) -> str:
    """Return the remedy for a non-finite loss or gradient, ending with the command to run.

    A run that has committed a checkpoint keeps its rate; one that has not may be started again with another.
    """
    slower = {"train.optimizer.lr": recipe.train.optimizer.lr / 2}
    if all_step_names(run):
        return (
            "look at the samples, leave them out by train.on_non_finite: skip, or start a new run from this one's "
            f"weights at a lower rate or with train.clip_grad: {new_run(run, recipe, slower)}"
        )
    return (
        "look at the samples, leave them out by train.on_non_finite: skip, or start again at a lower rate or with "
        f"train.clip_grad: {same_run(run, slower)}"
    )


def append_durably(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row that is on the disk on return; what a kill left of an earlier one stays a line of its own.

    Raises:
        OSError: e.g. a full disk.
    """
    new = not path.exists()
    with path.open("a+b") as stream:
        torn = stream.tell() > 0 and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n"
        stream.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    if new:
        sync_folder(path.parent)


def _is_place(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int and number >= 0 for number in value)
