"""Folder of the indices of foreign tars: indices and manifest are published together, or not at all.

FOLDER/index.part/lock            locked by the process that indexes
FOLDER/index.part/NAME.idx        indices; moved to FOLDER when all are there
FOLDER/index.part/manifest.json   written when all are there, moved last: whoever finds it goes on with the move
FOLDER/index.part/NAME.tar        a tar behind a URL, while it is read
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from vitgraft.configs.errors import ConfigError
from vitgraft.data_shards.manifest import MANIFEST
from vitgraft.data_shards.pack.journal import create, own, sync, sync_folder

WORK = "index.part"
_OURS = re.compile(r"lock|.*\.idx|.*\.tar|manifest\.json(\.tmp)?")


class IndexFolder:
    """Context manager: earlier files stay until :meth:`publish`, and a failure leaves nothing behind.

    Args:
        folder: made where there is none.

    Raises:
        ConfigError: another process indexes into it, or ``index.part`` is a link or holds what was not written here.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / WORK
        self.resumed = False
        """True if another process had ended while it published; its files are published now."""

    def __enter__(self) -> IndexFolder:
        if self.work.is_symlink():
            raise ConfigError(f"{self.work}: is a link; remove it")
        self._refuse_others()
        self._lock = own(self.work, f"{self.folder}: another process is indexing it; wait for its end")
        try:
            self.resumed = self._decided.exists()
            if self.resumed:
                self._move()
            self._clear()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if not self._decided.exists():
                self._clear()
                # Last: whoever finds the folder without its lock takes it for his own.
                (self.work / "lock").unlink()
                self.work.rmdir()
        os.close(self._lock)

    def _refuse_others(self) -> None:
        """Raise ``ConfigError`` if the work folder holds a foreign file: its contents are moved or removed."""
        paths = list(self.work.glob("*"))
        locked = (self.work / "lock").exists()
        ours = [path for path in paths if locked and _OURS.fullmatch(path.name)]
        others = [path.name for path in paths if path not in ours or path.is_symlink() or not path.is_file()]
        if others:
            raise ConfigError(f"{self.work}: holds {min(others)!r}, which no indexing wrote; move it away")

    def write(self, name: str, data: bytes) -> None:
        """Write a file to be published; it is on disk (fsync) when this returns."""
        with create(self.work / name) as stream:
            stream.write(data)
            sync(stream)

    def publish(self, manifest: bytes) -> None:
        """Replace the folder's indices and manifest. A process that ends in the middle of it has decided already."""
        self.write(f"{MANIFEST}.tmp", manifest)
        os.replace(self.work / f"{MANIFEST}.tmp", self._decided)
        sync_folder(self.work)
        self._move()

    @property
    def _decided(self) -> Path:
        return self.work / MANIFEST

    def _move(self) -> None:
        # First: an old manifest must not stand beside new indices, which may have the same sizes.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in sorted(self.work.glob("*.idx")):
            os.replace(path, self.folder / path.name)
        sync_folder(self.folder)
        os.replace(self._decided, self.folder / MANIFEST)
        sync_folder(self.folder)

    def _clear(self) -> None:
        for path in self.work.iterdir():
            if path.name != "lock":
                path.unlink()
