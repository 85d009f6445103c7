"""Append-only JSON-lines files of a run: incomplete last lines, the valid row of each step, and the attempts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgraft.configs.files import MAX_SMALL_BYTES, json_rows, open_regular

MAX_WHOLE = 1 << 53
"""Largest valid number in a row."""
_CHUNK = 1 << 16


def drop_torn_line(path: Path) -> None:
    """Cut off the incomplete last line that a kill may have left."""
    try:
        descriptor = open_regular(path, os.O_RDWR)
    except FileNotFoundError:
        return
    with open(descriptor, "r+b") as stream:
        end = size = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _CHUNK)
            stream.seek(start)
            cut = stream.read(end - start).rfind(b"\n")
            if cut >= 0:
                end = start + cut + 1
                break
            end = start
        if end < size:
            stream.truncate(end)


def audited_history(path: Path) -> dict[int, dict[str, Any]]:
    """Return the last attempt's row for each step, the valid history of the run."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        step, attempt = row.get("step"), row.get("attempt")
        if not isinstance(step, int) or not isinstance(attempt, int):
            continue
        if step not in rows or attempt >= rows[step]["attempt"]:
            rows[step] = row
    return rows


def read_rows(path: Path, last_bytes: int = MAX_SMALL_BYTES) -> list[dict[str, Any]]:
    """Return the complete rows of a file, which may still be written to; none if it is missing or not a file.

    Args:
        last_bytes: read so much from the end only; the row that this cuts is left out.
    """
    try:
        descriptor = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    with open(descriptor, "rb") as stream:
        start = max(0, stream.seek(0, os.SEEK_END) - last_bytes)
        stream.seek(start)
        data = stream.read(last_bytes)
    # What follows the last newline is torn, or still being written. Two kills may have left a torn line within.
    begin, end = data.find(b"\n") + 1 if start else 0, data.rfind(b"\n") + 1
    return list(json_rows(data[begin:end]))


def whole(value: Any) -> int:
    """Return an integer of an untrusted row.

    Raises:
        ValueError: it is none, or larger than any that a run counts up to.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_WHOLE < value < MAX_WHOLE:
        raise ValueError(f"{type(value).__name__} instead of a whole number")
    return int(value)


def moment(value: Any) -> float:
    """Return a time of a row, in seconds since 1970.

    Raises:
        ValueError: it is none that a calendar has.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
        raise ValueError(f"{type(value).__name__} instead of a time")
    return float(value)


@dataclass(frozen=True)
class Attempt:
    """One start of a run. ``code`` and ``reason``: how it ended; ``None`` while it runs, or if unknown."""

    number: int
    started: float
    resumed_step: int
    world: int
    code: int | None = None
    reason: str | None = None
    ended: float | None = None


def attempts(events: list[dict[str, Any]]) -> list[Attempt]:
    """Return the starts in RUN/events.jsonl, in order, each with its end. Invalid events are skipped."""
    found: dict[int, Attempt] = {}
    for event in events:
        try:
            number, when = whole(event["attempt"]), moment(event["time"])
            if event["event"] == "start":
                found[number] = Attempt(number, when, whole(event.get("resume") or 0), whole(event["world"]))
            elif event["event"] == "end" and number in found:
                start = found[number]
                code, reason = whole(event["code"]), str(event.get("reason", ""))
                found[number] = Attempt(number, start.started, start.resumed_step, start.world, code, reason, when)
        except (KeyError, TypeError, ValueError):
            continue
    return list(found.values())
