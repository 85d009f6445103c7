"""RUN/skipped.jsonl: entries left out by ``data.on_error: {skip: N}``, up to N, or ``train.on_non_finite: skip``."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema.data import SkipConfig
from vitgraft.data_shards.batch import NOT_FINITE, Entry, Skipped
from vitgraft.trainer import comm
from vitgraft.trainer.monitor_files import attempts, read_rows

NAME = "skipped.jsonl"


class SkipLog:
    """Counts skipped samples over all ranks and all attempts of a run.

    A row: {step, epoch, position, sample, repetition, key, reason, attempt}. Rows of steps that a later attempt made
    again (RUN/events.jsonl says where it resumed) stay, but do not count; its own do. Nor do entries that were left out
    because of their loss. Every rank holds the same set, so all of them stop at the same step.

    Args:
        run: the run directory.
        policy: ``data.on_error``.
        first_step: steps done before this attempt.
    """

    def __init__(self, run: Path, policy: str | SkipConfig, first_step: int, attempt: int) -> None:
        self.path, self.attempt = run / NAME, attempt
        self.budget = policy.skip if isinstance(policy, SkipConfig) else 0
        starts = [(start.number, start.resumed_step) for start in attempts(read_rows(run / "events.jsonl"))]
        self.samples = {
            row["sample"]
            for row in read_skipped(run)
            if row.get("reason") != NOT_FINITE
            and row["step"] <= min([first_step, *(first for number, first in starts if number > row["attempt"])])
        }

    def record(self, step: int, skipped: list[Skipped]) -> None:
        """Write the entries that all ranks skipped in a step, and raise if the budget is exceeded. Collective.

        Args:
            step: as in the metrics, from 1.

        Raises:
            DataError: more different samples than the budget were skipped in this run; on every rank.
        """
        everyone = [
            Skipped(Entry(*entry), key, reason) for items in comm.gather(skipped) for entry, key, reason in items
        ]
        damaged = [item for item in everyone if item.reason != NOT_FINITE]
        self.samples |= {item.entry.sample for item in damaged}
        if comm.rank() == 0:
            with self.path.open("a+b") as file, io.TextIOWrapper(file, encoding="utf-8") as stream:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    # An earlier attempt was killed in the middle of a line.
                    stream.write("\n")
                for item in sorted(everyone):
                    row = {"step": step, **item.entry._asdict(), "key": item.key, "reason": item.reason}
                    stream.write(json.dumps(row | {"attempt": self.attempt}) + "\n")
        if damaged and len(self.samples) > self.budget:
            raise DataError(
                f"step {step}: {len(self.samples)} samples cannot be read, data.on_error.skip allows {self.budget}; "
                f"the last: {max(damaged).reason}; {self.path} lists all"
            )


def read_skipped(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, in the order of writing; invalid rows, e.g. cut off by a kill, are left out."""
    rows = read_rows(run / NAME)
    return [row for row in rows if all(type(row.get(key)) is int for key in ("sample", "step", "attempt"))]
