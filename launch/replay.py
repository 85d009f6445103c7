"""What a supervisor reads and writes about losses that were not finite.

An entry is named EPOCH:POSITION: the same at every world size, and another visit of the same sample is another entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vitgraft.trainer.monitor_files import read_rows
from vitgraft.trainer.non_finite import LEFT_OUT, NON_FINITE, append_durably, read_left_out


def read_non_finite(run: Path, attempt: int) -> tuple[int, frozenset[str]] | None:
    """The step at which an attempt found a loss that was not finite, and the entries it names.

    ``None``: it found none, or could not say so (on a full disk). Rows that are none are passed over.
    """
    found = None
    for row in read_rows(run / NON_FINITE):
        try:
            if row["attempt"] == attempt:
                names = frozenset(f"{int(epoch)}:{int(position)}" for epoch, position, *_ in row["entries"])
                found = int(row["step"]), names
        except (KeyError, TypeError, ValueError):
            continue
    return found


def leave_out(run: Path, entries: Iterable[str], step: int, attempt: int) -> None:
    """Have the attempts to come leave these entries out, as far as they do not yet; on the disk on return.

    Args:
        entries: EPOCH:POSITION of each.
        step, attempt: where their loss was not finite last, for the record.

    Raises:
        OSError: it cannot be written.
        DataError: as in :func:`read_left_out`.
    """
    places = {(int(epoch), int(position)) for epoch, position in (entry.split(":") for entry in entries)}
    new = sorted(places - read_left_out(run))
    if new:
        append_durably(run / LEFT_OUT, {"attempt": attempt, "step": step, "entries": [list(place) for place in new]})
