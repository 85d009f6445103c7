"""Report on the labels, given before anything is written, and the policy for faults in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from vitgraft.configs.errors import DataError, printable

Say = Callable[[str], None]
"""Shows one line."""

OnError = Literal["raise", "skip"]
"""Policy for faults. ``raise``: nothing is written. ``skip``: faulty entries are left out, listed and counted."""

SIZES = "size mismatches"
UNKNOWN = "ids outside the class list"
BOXES = "wrong boxes"
MASKS = "wrong masks"
SEGMENTS = "segments missing in PNG or JSON"
MISSING = "missing files"
UNREADABLE = "unreadable or malformed"
NOTHING_TO_LEARN = "sets or classes with nothing to learn from"

TURNED = "turned"
"""Images whose EXIF orientation is applied."""
CLIPPED = "clipped"
"""Boxes that reached out of their image."""
CONVERTED = "converted"
"""Images that are packed in another format than they came in."""

_KEPT = 20
_KEPT_SKIPPED = 100_000
_SHOWN = 5
_LINE = 160
_LONGEST = 500
_SHOWN_CLASSES = 25


class LabelFault(DataError):
    """A fault in the labels, and the kind under which a report counts it."""

    def __init__(self, message: str, kind: str = UNREADABLE) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Noted:
    """Count of the findings of one kind, and the names of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: Any, count: int = 1) -> None:
        """Count one more, or ``count``."""
        self.count += count
        if len(self.first) < _KEPT:
            self.first.append(str(name))

    def listed(self) -> str:
        """Return the first names in one line of bounded length."""
        shown = [name[:_LONGEST] for name in self.first[:1]]
        for name in self.first[1:_SHOWN]:
            if len(", ".join(shown)) + len(name) > _LINE:
                break
            shown.append(name)
        return ", ".join(shown) + (", ..." if self.count > len(shown) else "")


@dataclass
class LabelReport:
    """Findings of the check of the labels; :meth:`close` reports them, and refuses labels with faults.

    ``unit``: what ``counts`` (by class id) counts. ``on_error``: see :data:`OnError`. ``crowds``: by class id, of the
    counted instances or segments those that are crowds. ``unlabelled``: samples without any label (semantic: ignored
    pixels). ``repaired``: what is packed otherwise than it came, by what was done. ``left_out``: what is not packed, by
    reason; under ``skip`` faults too, of which ``skipped`` holds the messages. ``passed_over``: files that nobody asked
    for, by reason. ``faults``: what stops the packing.
    """

    unit: str
    classes: list[str]
    samples: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    crowds: Counter[int] = field(default_factory=Counter)
    unlabelled: int = 0
    repaired: dict[str, Noted] = field(default_factory=dict)
    left_out: dict[str, Noted] = field(default_factory=dict)
    passed_over: dict[str, Noted] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    on_error: OnError = "raise"
    skipped: list[str] = field(default_factory=list)
    _messages: dict[str, list[str]] = field(default_factory=dict)
    _accepted: list[str] = field(default_factory=list)
    _remarks: list[str] = field(default_factory=list)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Leave the block at a fault inside it, and note the fault; the rest of the block is skipped."""
        try:
            yield
        except DataError as error:
            self.fault(error)

    def fault(self, error: DataError) -> None:
        """Note a fault; under ``skip``, what is faulty as left out."""
        kind = error.kind if isinstance(error, LabelFault) else UNREADABLE
        if self.on_error == "skip":
            self.leave_out(kind, error)
            if len(self.skipped) < _KEPT_SKIPPED:
                self.skipped.append(str(error))
        else:
            self._fault(kind, str(error))

    def doubt(self, message: str, kind: str, *, explains: bool = False) -> None:
        """Note a fault of the set as a whole, of which nothing can be left out; under ``skip`` it is only said.

        Args:
            explains: it is the cause of the faults of its kind, named before them and not counted beside them.
        """
        if self.on_error == "skip":
            self._accepted.append(message)
        elif explains and self.faults[kind]:
            self._messages[kind].insert(0, message)
        else:
            self._fault(kind, message)

    def repair(self, what: str, name: Any, count: int = 1) -> None:
        """Note something that is packed otherwise than it came, by what was done: ``turned``, ``clipped``, …"""
        self.repaired.setdefault(what, Noted()).add(name, count)

    def leave_out(self, reason: str, name: Any, count: int = 1) -> None:
        """Note something that is not packed."""
        self.left_out.setdefault(reason, Noted()).add(name, count)

    def pass_over(self, reason: str, name: Any) -> None:
        """Note a file that is no part of the data, such as a text file among images."""
        self.passed_over.setdefault(reason, Noted()).add(name)

    def remark(self, text: str) -> None:
        """Note something to know that is no fault."""
        self._remarks.append(text)

    def as_source(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest; of each reason the number and the first names."""
        named = {name: self.counts[number] for number, name in enumerate(self.classes)}
        crowds = {name: self.crowds[number] for number, name in enumerate(self.classes) if self.crowds[number]}
        found = {"repaired": self.repaired, "left_out": self.left_out, "passed_over": self.passed_over}
        return {
            "unit": self.unit,
            "classes": named,
            "crowds": crowds,
            "unlabelled": self.unlabelled,
            **{key: _numbered(reasons) for key, reasons in found.items()},
            "accepted": self._accepted,
        }

    def lines(self) -> list[str]:
        """Return what people should read."""
        without = f"{self.unlabelled:,} {'pixels' if self.unit == 'pixels' else 'samples'} without label"
        lines = [f"labels: {self.samples:,} samples, {self.counts.total():,} {self.unit}, {without}"]
        of_them = "segments are crowds" if self.unit == "pixels" else "of them crowds"
        present = [(name, number) for number, name in enumerate(self.classes) if self.counts[number]]
        for name, number in present[:_SHOWN_CLASSES]:
            crowds = f", {self.crowds[number]:,} {of_them}" if self.crowds[number] else ""
            lines.append(f"  {name[:80]:24s} {self.counts[number]:>12,} {self.unit}{crowds}")
        if len(present) > _SHOWN_CLASSES:
            lines.append(f"  ... and {len(present) - _SHOWN_CLASSES} more classes")
        absent = [name for number, name in enumerate(self.classes) if not self.counts[number]]
        if absent:
            lines.append(f"  classes without any: {Noted(len(absent), absent).listed()}")
        lines += [f"  {what}: {found.count:,}: {found.listed()}" for what, found in self.repaired.items()]
        for title, reasons in (("left out", self.left_out), ("passed over", self.passed_over)):
            lines += [f"  {title}: {found.count:,} {reason}: {found.listed()}" for reason, found in reasons.items()]
        lines += [f"  {count:,} {kind}, the first: {self._messages[kind][0]}" for kind, count in self.faults.items()]
        lines += [f"  note: {text}" for text in self._remarks]
        lines += [f"  packed all the same: {message}" for message in self._accepted]
        return [printable(line) for line in [*lines, f"  in all: {self._totals()}"]]

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

    def _fault(self, kind: str, message: str) -> None:
        self.faults[kind] += 1
        messages = self._messages.setdefault(kind, [])
        if len(messages) < _KEPT:
            messages.append(message)

    def _totals(self) -> str:
        repaired = {TURNED: 0, CLIPPED: 0} | {what: found.count for what, found in self.repaired.items()}
        counts = [f"{count:,} {what}" for what, count in repaired.items()]
        counts += [
            f"{sum(found.count for found in self.left_out.values()):,} left out",
            f"{sum(found.count for found in self.passed_over.values()):,} passed over",
            f"{self.crowds.total():,} crowds",
        ]
        return f"{', '.join(counts)}; faults: {f'{self.faults.total():,}' if self.faults else 'none'}"


def _numbered(reasons: dict[str, Noted]) -> dict[str, dict[str, Any]]:
    return {reason: {"count": found.count, "first": found.first} for reason, found in reasons.items()}
