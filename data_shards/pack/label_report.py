"""What a packer found in the labels, told before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vitgraft.configs.errors import DataError

Say = Callable[[str], None]
"""Shows one line."""

SIZES = "size mismatches"
UNKNOWN = "ids outside the class list"
BOXES = "wrong boxes"
MASKS = "wrong masks"
SEGMENTS = "segments missing in PNG or JSON"
MISSING = "missing files"
UNREADABLE = "unreadable or malformed"

_KEPT = 20
_SHOWN_CLASSES = 25


class LabelFault(DataError):
    """A fault in the labels, and the kind under which a report counts it."""

    def __init__(self, message: str, kind: str = UNREADABLE) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class LabelReport:
    """Collects while the labels are checked; :meth:`close` tells, and refuses labels with faults.

    ``unit``: what ``counts`` (by class id) counts. ``unlabelled``: samples without any label (semantic: ignored
    pixels). ``left_out``: what is not packed though it is no fault, by reason. ``faults``: what stops the packing.
    """

    unit: str
    classes: list[str]
    samples: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    unlabelled: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    _messages: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """A fault inside the block is noted, and the block left."""
        try:
            yield
        except DataError as error:
            kind = error.kind if isinstance(error, LabelFault) else UNREADABLE
            self.faults[kind] += 1
            messages = self._messages.setdefault(kind, [])
            if len(messages) < _KEPT:
                messages.append(str(error))

    def leave_out(self, reason: str, name: Any) -> None:
        """Note something that is not packed."""
        self.left_out.setdefault(reason, []).append(str(name))

    def as_source(self) -> dict[str, Any]:
        """For the manifest: plain JSON values; of what was left out, the number and the first names."""
        left_out = {reason: {"count": len(names), "first": names[:_KEPT]} for reason, names in self.left_out.items()}
        counts = {name: self.counts[number] for number, name in enumerate(self.classes)}
        return {"unit": self.unit, "classes": counts, "unlabelled": self.unlabelled, "left_out": left_out}

    def lines(self) -> list[str]:
        """For people."""
        without = f"{self.unlabelled:,} {'pixels' if self.unit == 'pixels' else 'samples'} without label"
        lines = [f"labels: {self.samples:,} samples, {self.counts.total():,} {self.unit}, {without}"]
        present = [(name, self.counts[number]) for number, name in enumerate(self.classes) if self.counts[number]]
        lines += [f"  {name:24s} {count:>12,} {self.unit}" for name, count in present[:_SHOWN_CLASSES]]
        if len(present) > _SHOWN_CLASSES:
            lines.append(f"  ... and {len(present) - _SHOWN_CLASSES} more classes")
        absent = [name for number, name in enumerate(self.classes) if not self.counts[number]]
        if absent:
            lines.append(f"  classes without any: {_listed(absent)}")
        lines += [f"  left out: {len(names):,} {reason}: {_listed(names)}" for reason, names in self.left_out.items()]
        lines += [f"  {count:,} {kind}, the first: {self._messages[kind][0]}" for kind, count in self.faults.items()]
        return lines if self.faults else [*lines, "  faults: none"]

    def close(self, say: Say | None = None) -> None:
        """Tell, when ``say`` is given.

        Raises:
            DataError: there are faults; the first of them, and how many there are of each kind.
        """
        if say is not None:
            for line in self.lines():
                say(line)
        if not self.faults:
            return
        first = next(iter(self._messages.values()))[0]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.faults.items())
        raise DataError(
            first if self.faults.total() == 1 else f"{first} ({self.faults.total()} faults in all: {kinds})"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
