"""Free space of a disk, queried in a thread, so that a hanging file system blocks no other work."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path


class FreeSpace:
    """``free``: bytes of the folder's disk when it answered last; ``None``: it has not yet.

    Args:
        every: seconds between two queries.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.free: int | None = None
        self._over = threading.Event()
        threading.Thread(target=self._look, args=(folder, every), name="free-space", daemon=True).start()

    def close(self) -> None:
        """Stop the queries."""
        self._over.set()

    def _look(self, folder: Path, every: float) -> None:
        while True:
            with contextlib.suppress(OSError):
                disk = os.statvfs(folder)
                self.free = disk.f_bavail * disk.f_frsize
            if self._over.wait(every):
                return
