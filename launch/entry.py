"""Entry point of ``vitgraft``. Signal handlers are installed before slow imports."""

from __future__ import annotations

import contextlib
import signal
import sys

from vitgraft.launch import ending


def main() -> None:
    """Run the command line; leaves with its exit code, whatever comes while Python ends."""
    try:
        ending.hear()  # a signal may come between two of its handlers
        from vitgraft.launch.cli import run

        code = run()
        ending.decide()
    except BaseException:
        # Before the command line was there to answer it, where an import may make another error of it, or while it
        # already answered.
        if ending.asked() is None:
            raise
        ending.decide()
        code = end_of_signal()
    sys.exit(code)


def end_of_signal() -> int:
    """Report that a signal has ended the command; return the exit code."""
    from vitgraft.configs.errors import InterruptedRun, PreemptedRun

    number = ending.asked()
    by_ctrl_c = number is None or number == signal.SIGINT
    name = "" if number is None else signal.Signals(number).name
    with contextlib.suppress(OSError):
        said = "interrupted" if by_ctrl_c else f"stopped by {name}; give the same command again"
        print(f"vitgraft: {said}", file=sys.stderr)
    return InterruptedRun.exit_code if by_ctrl_c else PreemptedRun.exit_code
