"""Standard error that may lose its reader or its room: what is shown there is lost then, and nothing else."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterable


# Python's buffered streams raise RuntimeError when they are entered again.
_LOST = (OSError, RuntimeError)


class _Forgiving:
    """A text stream whose errors of the system (a closed pipe, a full disk, a terminal that hung up) are dropped, and
    with them what a handler of signals would say while the same thread is busy writing."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None:
            with contextlib.suppress(*_LOST):
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(*_LOST):
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgiving_stderr() -> TextIO:
    """``sys.stderr`` as it is now, in a shape that never raises when it is written to."""
    stream: object = sys.stderr
    return cast(TextIO, stream if isinstance(stream, _Forgiving) else _Forgiving(sys.stderr))
