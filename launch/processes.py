"""Processes of this host, found by what they inherit."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def kill_with(variable: str) -> None:
    """Kill all processes of this host that have this, NAME=VALUE, in their environment."""
    for entry in Path("/proc").iterdir():
        # Others' processes hide theirs, and some end meanwhile.
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.fsencode(variable) in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
