"""Files that a supervisor reads and writes about non-finite losses.

An entry is named EPOCH:POSITION: the same at every world size, and another visit of the same sample is another entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgraft.launch.causes import ADVICE, EXIT_CODES
from vitgraft.launch.observations import Cause, Failure
from vitgraft.launch.recovery import Verdict, culprits_of, non_finite_verdict, open_fault
from vitgraft.trainer.monitor_files import read_rows, whole
from vitgraft.trainer.non_finite import LEFT_OUT, NON_FINITE, append_durably, read_left_out

VERDICT = "non_finite_verdict"
"""Event of a verdict on a non-finite loss, with ``step``, ``verdict`` and ``entries`` as [epoch, position]."""


def read_non_finite(run: Path, attempt: int) -> tuple[int, frozenset[str]] | None:
    """Return the step at which an attempt found a non-finite loss, and the entries; ``None``: there was none.

    ``None``: it found none, or could not say so (on a full disk). Rows that are none are passed over.
    """
    return _by_attempt(run).get(attempt)


def earlier_fault(run: Path, resumed: int) -> Failure | None:
    """Return the last non-finite loss under an earlier supervisor, if it comes after the checkpoint to resume from and
    no event gives a verdict on it: the replay is still to come.

    Args:
        resumed: step of that checkpoint.
    """
    found = _by_attempt(run)
    if not found:
        return None
    attempt = max(found)
    step, entries = found[attempt]
    told = any(_tells(event, step, attempt) for event in read_rows(run / "events.jsonl"))
    if told or step <= resumed:
        return None
    text = f"step {step}: not finite, under an earlier supervisor"
    return Failure(Cause("non_finite", EXIT_CODES["non_finite"], text, ADVICE["non_finite"]), resumed, step, entries)


def _by_attempt(run: Path) -> dict[int, tuple[int, frozenset[str]]]:
    found = {}
    for row in read_rows(run / NON_FINITE):
        try:
            names = frozenset(f"{whole(epoch)}:{whole(position)}" for epoch, position, *_ in row["entries"])
            found[whole(row["attempt"])] = whole(row["step"]), names
        except (KeyError, TypeError, ValueError):
            continue
    return found


def _tells(event: dict[str, Any], step: int, attempt: int) -> bool:
    """Tell whether an event is a verdict on ``step`` by ``attempt`` or a later one."""
    by = event.get("attempt")
    return event.get("event") == VERDICT and event.get("step") == step and isinstance(by, int) and by >= attempt


@dataclass(frozen=True)
class Finding:
    """Verdict on a non-finite loss at ``step``. ``entries``: [epoch, position] of each."""

    step: int
    verdict: Verdict
    entries: list[list[int]]

    @property
    def text(self) -> str:
        """One line."""
        said = {"data": "came back with its samples: it is the data", "passing": "did not come back: a passing fault"}
        return f"the loss that was not finite at step {self.step} {said[self.verdict]}"


@dataclass
class Replay:
    """Finds out, once for each, what losses that were not finite were. ``record``: the failures so far, to which others
    append. ``earlier``: that of an earlier supervisor."""

    record: Sequence[Failure]
    earlier: Failure | None = None
    _told: Failure | None = None

    def passed(self, step: float) -> Finding | None:
        """Return the finding when ranks have passed the step; ``None``: not yet."""
        fault = open_fault(self.record, self.earlier)
        if fault is None or fault is self._told or fault.step is None or step <= fault.step:
            return None
        return self._found("passing", fault, fault.entries)

    def failed(self) -> Finding | None:
        """Return the finding of a new failure, the last of the record; ``None``: undecided."""
        fault, verdict = open_fault(self.record[:-1], self.earlier), non_finite_verdict(self.record, self.earlier)
        if fault is None or verdict is None or fault is self._told:
            return None
        return self._found(verdict, fault, culprits_of(self.record, self.earlier) or fault.entries)

    def _found(self, verdict: Verdict, fault: Failure, entries: Iterable[str]) -> Finding:
        self._told = fault
        return Finding(fault.step or 0, verdict, [list(place) for place in sorted(places(entries))])


def leave_out(run: Path, entries: Iterable[str], step: int, attempt: int) -> None:
    """Record entries that later attempts leave out, unless recorded already; on disk on return.

    Args:
        entries: EPOCH:POSITION of each.
        step, attempt: where their loss was not finite last, for the record.

    Raises:
        OSError: it cannot be written.
        DataError: as in :func:`read_left_out`.
    """
    new = sorted(places(entries) - read_left_out(run))
    if new:
        append_durably(run / LEFT_OUT, {"attempt": attempt, "step": step, "entries": [list(place) for place in new]})


def places(entries: Iterable[str]) -> set[tuple[int, int]]:
    """Return epoch and position of entries that are named EPOCH:POSITION."""
    return {(int(epoch), int(position)) for epoch, position in (entry.split(":") for entry in entries)}
