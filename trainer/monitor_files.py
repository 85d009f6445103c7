"""Append-only JSON-lines files of a run: torn last lines, which row of which attempt counts, and the attempts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def drop_torn_line(path: Path) -> None:
    """Cut off the incomplete last line that a kill may have left."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def audited_history(path: Path) -> dict[int, dict[str, Any]]:
    """The last attempt's row for each step: what the run that counts did."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["step"] not in rows or row["attempt"] >= rows[row["step"]]["attempt"]:
            rows[row["step"]] = row
    return rows


def read_rows(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The whole rows of a file that somebody may be writing to; of a missing one, none.

    Args:
        last_bytes: read so much from the end only; the row that this cuts is left out.
    """
    try:
        with path.open("rb") as stream:
            start = 0 if last_bytes is None else max(0, stream.seek(0, os.SEEK_END) - last_bytes)
            stream.seek(start)
            lines = stream.read().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    # What follows the last newline is torn, or still being written.
    return [row for line in lines[1 if start else 0 : -1] if (row := _row(line)) is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # two kills may have left a torn line within the file
        return None
    return row if isinstance(row, dict) else None


@dataclass(frozen=True)
class Attempt:
    """One start of a run. ``code`` and ``reason``: how it ended; ``None`` while it lives, or when nobody could say."""

    number: int
    started: float
    resumed_step: int
    world: int
    code: int | None = None
    reason: str | None = None
    ended: float | None = None


def attempts(events: list[dict[str, Any]]) -> list[Attempt]:
    """The starts in RUN/events.jsonl, in order, each with its end. What is no proper event is passed over."""
    found: dict[int, Attempt] = {}
    for event in events:
        try:
            number, when = int(event["attempt"]), float(event["time"])
            if event["event"] == "start":
                found[number] = Attempt(number, when, int(event.get("resume") or 0), int(event["world"]))
            elif event["event"] == "end" and number in found:
                start = found[number]
                code, reason = int(event["code"]), str(event.get("reason", ""))
                found[number] = Attempt(number, start.started, start.resumed_step, start.world, code, reason, when)
        except (KeyError, TypeError, ValueError):
            continue
    return list(found.values())
