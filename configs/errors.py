"""Errors that carry an exit code and one line: what, where, expected, remedy.

Exit codes are part of the command line's contract (docs/exit_codes.md).
"""

from __future__ import annotations

import errno
from typing import Literal

ErrorCause = Literal["lost_peers", "non_finite", "device_memory", "host_memory", "no_space", "read_only"]
"""Causes that a supervisor distinguishes within one exit code. ``lost_peers``: another rank ended first.
``read_only``: a disk or folder that may not be written."""

_BY_NUMBER: dict[int | None, ErrorCause] = {
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EROFS: "read_only",
    errno.EACCES: "read_only",
    errno.ENOMEM: "host_memory",
}


def printable(text: str) -> str:
    """Return ``text`` with question marks for what cannot be shown: names from outside may hold line breaks and control
    sequences, which no terminal should obey."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


class VitgraftError(Exception):
    """Base of every error that is answered with one line and a stable exit code instead of a traceback.

    ``cause``: for programs, where there is one to tell. ``step``: of training, from 1 as in the metrics, at which it
    came to light; ``None``: none, or not known.
    """

    exit_code = 1

    def __init__(self, message: str, *, cause: ErrorCause | None = None, step: int | None = None) -> None:
        super().__init__(printable(" ".join(message.split())))
        self.cause, self.step = cause, step


class ConfigError(VitgraftError):
    """Bad usage or configuration (exit 2)."""

    exit_code = 2


class DataError(VitgraftError):
    """Bad data: a missing, damaged or inconsistent data set, image, clip or label (exit 3)."""

    exit_code = 3


class CheckpointError(VitgraftError):
    """No valid checkpoint, or one that does not fit (exit 4)."""

    exit_code = 4


class TrainingError(VitgraftError):
    """Training failed: non-finite loss, full disk, a rank that died (exit 5)."""

    exit_code = 5


class InterruptedRun(VitgraftError):
    """The user asked to stop (exit 130)."""

    exit_code = 130


class PreemptedRun(VitgraftError):
    """Stopped on SIGTERM behind a committed checkpoint: requeue me (exit 75)."""

    exit_code = 75


def cause_of(error: BaseException) -> ErrorCause | None:
    """Return the cause of a system error (no space, read-only, out of memory, lost peer); ``None``: another error."""
    if isinstance(error, MemoryError):
        return "host_memory"
    if isinstance(error, ConnectionError):
        return "lost_peers"
    return _BY_NUMBER.get(error.errno) if isinstance(error, OSError) else None
