"""How signals end a command, from its first line until its exit code is decided.

SIGTERM, SIGUSR1 and SIGHUP end it as Ctrl-C does, by KeyboardInterrupt, so that what it has begun is tidied up; only
its exit code differs. ``vitgraft train`` hears them in its own way once it knows what there is to save
(:mod:`vitgraft.launch.stopping`).
"""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_AGAIN_S = 2.0
"""A signal that comes again within so long must not disturb the end that the first has begun."""

_heard = False
_decided = False
_asked: int | None = None
_asked_at = 0.0


def hear() -> None:
    """Install the signal handlers. Signals that are ignored at the start, as under nohup, stay ignored."""
    global _heard
    _heard = True
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def decide() -> None:
    """Fix the exit code: signals are ignored from here to the end of Python. Does nothing unless :func:`hear` was
    called, as this is then no command."""
    global _decided
    _decided = _heard
    if _heard:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def asked() -> int | None:
    """Return the signal that asked the command to end; ``None``: none did."""
    return _asked


def _end(number: int, frame: FrameType | None) -> None:
    global _asked, _asked_at
    now = time.monotonic()
    if _decided or (_asked is not None and now - _asked_at < _AGAIN_S):
        return
    _asked, _asked_at = number, now
    raise KeyboardInterrupt
