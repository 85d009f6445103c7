"""Owner of a run, found without taking its lock."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vitgraft.configs.files import open_regular

_OWNER = re.compile(r"pid ([0-9]{1,10}) on (\S+)")


def ownership(run: Path) -> tuple[bool | None, str | None, float]:
    """Return whether the process in RUN/lock owns the run (``None``: it is on another host), the lock's record, and
    its modification time. The lock is not taken: even a short hold could delay the start of another process."""
    try:
        with open(open_regular(run / "lock"), "rb") as stream:
            record, written = stream.read(1000).decode(errors="replace").strip(), os.fstat(stream.fileno()).st_mtime
    except OSError:
        return False, None, 0.0
    found = _OWNER.fullmatch(record)
    if found is None:
        # Between taking the lock and writing the record; the next look tells.
        return False, None, written
    if found[2] != os.uname().nodename:
        return None, record, written
    return _has_open(int(found[1]), run / "lock"), record, written


def _has_open(pid: int, path: Path) -> bool:
    """Tell whether the process has the file open: the pid alone may have been reused."""
    try:
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(descriptor.path).endswith(path.name) and os.path.samefile(descriptor.path, path):
                    return True
            except OSError:
                continue  # closed meanwhile
    except PermissionError:
        return True  # another user's: it lives, and nothing more can be known
    except OSError:
        return False
    return False
