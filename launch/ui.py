"""Output for the user: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
)

from vitgraft.configs.units import duration
from vitgraft.launch.stderr import forgiving_stderr

PLAIN_INTERVAL_S = 10.0
_PACE = 256
"""Number of progress reports from whose times the rest is estimated, including pauses such as evaluations."""


class Screen:
    """Shows labelled progress and notes on stderr; use as a context manager. Where stderr has no reader or no room any
    more they are dropped, and the command goes on."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._stream = forgiving_stderr()
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_plain: dict[str, float] = {}
        self._pace: dict[str, deque[tuple[float, int]]] = {}
        self._log: Path | None = None

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def progress(self, label: str, done: int, total: int, facts: dict[str, Any] | None = None) -> None:
        """Show that ``done`` of ``total`` is done, and how long the rest will take. ``facts``: by name; a name that is
        a unit, as ``images/s``, stands behind its value."""
        told = [
            f"{_short(value)} {name}" if "/" in name else f"{name} {_short(value)}"
            for name, value in (facts or {}).items()
        ]
        text = "  ".join([*told, *self._left(label, done, total)])
        label = f"{self._prefix}{label}"
        if self._bars is None:
            self._plain(label, done, total, text)
            return
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, facts=text)
        self._bars.update(self._tasks[label], completed=done, total=total, facts=text, visible=done < total)

    def note(self, text: str) -> None:
        """Show one line, and record it."""
        self._console.print(f"{self._prefix}{text}", markup=False)
        self.record(text)

    def keep(self, log: Path) -> None:
        """Record notes in this file from now on, behind what is there."""
        self._log = log

    def record(self, text: str) -> None:
        """Write to the log, with the time, what need not be shown. What finds no room there is lost too."""
        if self._log is not None:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n"
            with contextlib.suppress(OSError), self._log.open("ab") as stream:
                stream.write(line.encode(errors="backslashreplace"))

    def callback(self, label: str) -> Callable[[int, int], None]:
        """Return a progress callback with a fixed label."""
        return lambda done, total: self.progress(label, done, total)

    def _left(self, label: str, done: int, total: int) -> list[str]:
        """Return ``ETA`` and a duration, after at least two reports."""
        now, reports = time.monotonic(), self._pace.setdefault(label, deque(maxlen=_PACE))
        if reports and done < reports[-1][1]:
            reports.clear()  # it begins anew
        reports.append((now, done))
        since, before = reports[0]
        if not before < done < total:
            return []
        return [f"ETA {duration((now - since) / (done - before) * (total - done))}"]

    def _plain(self, label: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if done < total and now - self._last_plain.get(label, -PLAIN_INTERVAL_S) < PLAIN_INTERVAL_S:
            return
        self._last_plain[label] = now
        print(f"{label} {done:,}/{total:,}  {text}".rstrip(), file=self._stream, flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
