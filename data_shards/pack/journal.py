"""State of an unfinished packing: its folder beside OUT, the lock of its process, and its finished shards.

OUT.packing/lock              locked by the packer while it lives
OUT.packing/journal.jsonl     a line for each finished shard, in order
OUT.packing/set/              the shards; becomes OUT at the end
OUT.packing/journal.new       the next journal, while it is written
OUT.packing/old/              what was OUT before, for the moment between two renames

Whatever else lies there is not ours: then nothing is written, and nothing removed.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.files import lock_holder, open_regular, read_bytes
from vitgraft.configs.hashing import canonical_json, sha256_file
from vitgraft.configs.schema.section import Section, StoredSize
from vitgraft.data_shards.shards import Sha256, Shard

_NAMES = ("set", "old", "journal.jsonl", "journal.new", "lock")

_MAX_JOURNAL_BYTES = 1 << 30
VERSION = 1
"""Changes when the same items give other bytes."""


class Finished(Section):
    """One finished shard.

    ``items``: how many were done up to its end. ``skipped``: why some on the way gave no sample. ``identity``: hash
    over what decided the bytes up to here. ``last``: it was closed because there were no more items.
    """

    shard: Shard
    items: StoredSize
    skipped: list[str]
    identity: Sha256
    last: bool


class Identity:
    """Running hash over the inputs of a packing: its settings, then each item.

    Args:
        settings: JSON values.
        item: what decides the item of this number, as text.
        total: how many items there are.
    """

    def __init__(self, settings: list[Any], item: Callable[[int], str], total: int) -> None:
        self.item, self.total, self.items = item, total, 0
        self._digest = hashlib.sha256(canonical_json([VERSION, *settings]).encode())

    def advance(self, items: int) -> str:
        """Return the hash up to the end of so many items, at least as many as before."""
        for number in range(self.items, items):
            self._digest.update(self.item(number).encode() + b"\n")
        self.items = items
        return self._digest.hexdigest()

    def fits(self, line: Finished) -> bool:
        """Tell whether this packing would write a shard; advance to the shard's end if so."""
        ahead = copy.copy(self)
        ahead._digest = self._digest.copy()
        if not self.items < line.items <= self.total or (line.last and line.items != self.total):
            return False
        if ahead.advance(line.items) != line.identity:
            return False
        self.items, self._digest = ahead.items, ahead._digest
        return True


class Workplace:
    """The folder of a packing; at most one process has it open.

    Raises:
        ConfigError: another process is packing the same data set, or the folder is a link or holds what is not ours.
        OSError: it cannot be made or locked.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.packing")
        self.set, self._old = self.folder / "set", self.folder / "old"
        self._journal_path, self._journal_new = self.folder / "journal.jsonl", self.folder / "journal.new"
        self._journal: BinaryIO | None = None
        self._refuse_others()
        self._lock = own(self.folder, f"{out}: another process is packing it; wait for its end or choose another --out")
        self._settle()

    @property
    def started(self) -> bool:
        """Tell whether shards were finished here."""
        return self._journal_path.exists() and self._journal_path.stat().st_size > 0

    def begin(self) -> None:
        """Start anew, with an empty set and journal."""
        self._empty()
        self.set.mkdir()
        self._write_journal([])

    def resume(self, identity: Identity, threads: int = 1) -> list[Finished]:
        """Resume from the shards that an earlier packing finished; start anew when none fits.

        Only shards that this packing would write too count, with the bytes that the journal states, up to the first
        that is not so.

        Args:
            identity: is advanced to the end of what counts.
            threads: how many hash.
        """
        lines, found = self._read(), []
        with ThreadPoolExecutor(threads) as pool:
            for line, whole in zip(lines, pool.map(self._is_whole, lines), strict=True):
                if not whole or not identity.fits(line):
                    break
                found.append(line)
            pool.shutdown(cancel_futures=True)
        if not found:
            self.begin()
            return []
        wanted = {name for line in found for name in (line.shard.name, line.shard.index_name)}
        for path in self.set.iterdir():
            if path.name not in wanted:
                path.unlink()
        self._write_journal(found)
        return found

    def append(self, finished: Finished) -> None:
        """Note a shard that is on the disk, whole."""
        assert self._journal is not None
        line = canonical_json(finished.model_dump(mode="json")).encode() + b"\n"
        while line:
            line = line[self._journal.write(line) :]
        sync(self._journal)

    @property
    def published(self) -> bool:
        """Tell whether the set was renamed to OUT, in one atomic step."""
        return os.path.lexists(self.out) and not os.path.lexists(self.set)

    def publish(self) -> None:
        """Make the set OUT; where that fails, :meth:`close` puts back what was OUT before."""
        if self.out.exists():
            os.rename(self.out, self._old)
        os.rename(self.set, self.out)
        sync_folder(self.out.parent)

    def close(self, keep: bool = False) -> None:
        """Release the folder; remove it, unless its finished shards are to be kept."""
        if self._journal is not None:
            self._journal.close()
        with contextlib.suppress(OSError):
            # First: where the old set cannot be put back, it must not go with the rest.
            self._settle()
            if not keep:
                self._empty()
                # Last: whoever finds the folder without its lock takes it for his own.
                (self.folder / "lock").unlink()
                self.folder.rmdir()
        os.close(self._lock)

    def _refuse_others(self) -> None:
        """Raises ConfigError where anything is not ours; it might be removed with the rest."""
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: expected a folder of the packer; move it away or choose another --out")
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            others = sorted(entry.name for entry in entries if not _is_ours(entry))
            if others:
                message = f"{self.folder}: holds {others[0]!r}, which no packer wrote; move it away"
                raise ConfigError(f"{message} or choose another --out")

    def _settle(self) -> None:
        """Restore the previous OUT if its replacement was interrupted between the two renames, or delete it if after
        both."""
        if self._old.exists() and os.path.lexists(self.out):
            shutil.rmtree(self._old)
        elif self._old.exists():
            os.rename(self._old, self.out)

    def _empty(self) -> None:
        for path in (self.set, self._old):
            if path.exists():
                shutil.rmtree(path)
        for path in (self._journal_path, self._journal_new):
            path.unlink(missing_ok=True)

    def _read(self) -> list[Finished]:
        """Return the lines of the journal up to the first that is damaged: the last one may have been cut short."""
        found: list[Finished] = []
        # ValidationError is a ValueError: what stands before the damage is good.
        with contextlib.suppress(OSError, ValueError, DataError):
            for line in read_bytes(self._journal_path, _MAX_JOURNAL_BYTES).split(b"\n")[:-1]:
                found.append(Finished.model_validate_json(line))
        return found

    def _is_whole(self, finished: Finished) -> bool:
        shard = finished.shard
        try:
            return (
                not (self.set / shard.name).is_symlink()
                and not (self.set / shard.index_name).is_symlink()
                and (self.set / shard.name).stat().st_size == shard.bytes
                and sha256_file(self.set / shard.name) == shard.sha256
                and sha256_file(self.set / shard.index_name) == shard.index_sha256
            )
        except OSError:
            return False

    def _write_journal(self, lines: list[Finished]) -> None:
        # Unbuffered: a line that found no space would be tried again by close, whose error would hide the first.
        self._journal_new.unlink(missing_ok=True)
        self._journal = create(self._journal_new, buffering=0)
        for line in lines:
            self.append(line)
        sync(self._journal)
        os.replace(self._journal_new, self._journal_path)
        sync_folder(self.folder)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Tell whether a packer may have made this: no link, and no fifo, which removing a folder would open."""
    if entry.name in ("set", "old"):
        return entry.is_dir(follow_symlinks=False)
    return entry.name in _NAMES and entry.is_file(follow_symlinks=False)


def own(folder: Path, busy: str) -> int:
    """Make a folder and lock the file ``lock`` in it, which only its owner may remove: the descriptor.

    Raises:
        ConfigError: another process has it; says ``busy`` and who. Or the folder belongs to another user, who could
            exchange what is written in it.
        OSError: it cannot be made or locked.
    """
    path = folder / "lock"
    while True:
        # Only this user writes in it, whatever the umask.
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            facts = os.stat(folder, follow_symlinks=False)
            # Not for root, whose files have the owner nobody in some network folders.
            if os.geteuid() and facts.st_uid != os.geteuid():
                raise ConfigError(f"{folder}: belongs to another user (number {facts.st_uid}); move it away")
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, 0o644, follow=False)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have removed the folder between our calls.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
            os.close(descriptor)
        except FileNotFoundError:
            os.close(descriptor)
        except OSError as error:
            holder = lock_holder(descriptor)
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise ConfigError(f"{busy} (locked by {holder})") from None


def create(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a new file for writing; what has the name already, a link say, is not written through.

    Args:
        buffering: as for ``open``.

    Raises:
        OSError: there is one, or it cannot be made.
    """
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, follow=False)
    return os.fdopen(descriptor, "wb", buffering)


def sync(stream: BinaryIO) -> None:
    """Flush a file to disk (fsync)."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
