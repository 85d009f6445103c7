"""Errors that carry an exit code and one line: what, where, expected, remedy.

Exit codes are part of the command line's contract (docs/exit_codes.md).
"""

from __future__ import annotations


class VitgraftError(Exception):
    """Base of every error that is answered with one line and a stable exit code instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
