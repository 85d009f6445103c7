"""Handling of standard output that is closed, has no reader or no space left."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any


class Unwritable(OSError):
    """Standard output takes nothing more, e.g. on a full disk."""


class _Output(io.FileIO):
    """Tells its own errors from those of other files."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Unwritable(error.errno, error.strerror) from None


def take_stdout() -> None:
    """Make ``sys.stdout`` one whose failures are known, and that takes names of files that are not UTF-8.

    The descriptors 0, 1 and 2 get a file where the command was started without: the next one that is opened would get
    such a number, and what is printed would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    raw = _Output(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=raw.isatty()
    )


def has_lost_its_reader() -> bool:
    """Tell whether the reader of standard output has closed its end, as ``head`` does."""
    poll = select.poll()
    poll.register(1)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def let_go() -> None:
    """Drop what cannot be written: Python would try again at its end, and change the exit code."""
    with contextlib.suppress(ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
