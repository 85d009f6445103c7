"""What the launcher says to its roles by signals, and the signals of others that are no affair of theirs.

A scheduler sends SIGTERM, SIGUSR1 and the like to every process of a job. They are for the supervisor, which stops the
ranks in order; a role that obeyed them would end under ranks that still need it. So the launcher's own words are
real-time signals, which nobody sends by habit.
"""

from __future__ import annotations

import signal
from collections.abc import Collection

DRAIN = signal.SIGRTMIN
"""Finish what is outstanding, then end."""
DROP_COPY = signal.SIGRTMIN + 1
"""As ``DRAIN``, and do not wait for the copy to a store."""
OF_THE_JOB = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def signal_name(number: int) -> str:
    """SIGTERM and the like."""
    try:
        return signal.Signals(number).name
    except ValueError:  # most of the real-time signals
        return f"signal {number}"


def ignore_job_signals(but: Collection[signal.Signals] = ()) -> None:
    """Leave them to the launcher, and heed those in ``but``, which have handlers of their own.

    Those are left as they are: to ignore a signal even for a moment is to lose one that is pending.
    """
    for number in OF_THE_JOB:
        if number not in but:
            signal.signal(number, signal.SIG_IGN)
