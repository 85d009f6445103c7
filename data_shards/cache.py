"""Remote files in a bounded folder on this machine's disk, shared by all processes and runs that name it.

FOLDER/SHA256.tar, .idx        whole files, by the hash of their content, so that no name or change can mix them up
FOLDER/SHA256.tar.part         being fetched, by the process that holds its lock; renamed when its hash is right
FOLDER/SHA256.tar.bad          fetched several times and wrong each time: not asked for again for a while
FOLDER/lock                    held while room is made

All locks are flock's: the kernel frees them when their holder dies. A reader holds a shared one while it reads, and
only a file that nobody reads is evicted, the one that was not used for longest first.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vitgraft.configs.errors import ConfigError, DataError, cause_of
from vitgraft.configs.hashing import sha256_file
from vitgraft.data_shards.remote import UnreachableError, download, shown

FETCHES = 3
"""How often a file is fetched whose content is wrong."""
BAD_SECONDS = 600.0
"""How long a file that stayed wrong is not asked for again."""
WAIT_SECONDS = 600.0
"""How long to wait for room that other processes' transfers take."""
_POLL = 0.05
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|idx)(\.part|\.bad)?")
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


class RemoteFile(NamedTuple):
    """What a file must be. ``name``: in its folder; only its suffix (.tar, .idx) counts here."""

    url: str
    name: str
    bytes: int
    sha256: str


class FileCache:
    """A cache folder. Picklable; holds nothing open between calls.

    Args:
        folder: made when first needed.
        max_bytes: of all files in it, those being fetched included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    @contextmanager
    def opened(self, file: RemoteFile) -> Iterator[int]:
        """A descriptor of the whole, verified file, fetched if it is not here; not evicted inside the block.

        Raises:
            DataError: the file stays wrong however often it is fetched; UnreachableError: it cannot be fetched, or the
                cache cannot hold it.
            ConfigError: it is larger than the cache, or its URL's scheme is not supported.
        """
        try:
            descriptor = self._present(file)
            if descriptor is None:
                descriptor = self._fetched(file)
        except OSError as error:
            raise self._os_error(error) from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def prefetch(self, file: RemoteFile) -> None:
        """Fetch the file unless it is here or somebody else is at it. Raises as :meth:`opened`."""
        try:
            if not self._path(file).exists() and (part := self._own(file)) is not None:
                os.close(self._fill(file, part))
        except OSError as error:
            raise self._os_error(error) from None

    def recheck(self, file: RemoteFile) -> bool:
        """Remove the file if what lies here is not what was fetched (a failing disk); whether it was removed."""
        path = self._path(file)
        try:
            before = os.stat(path)
            if sha256_file(path) == file.sha256:
                return False
            _remove(path, before.st_ino)
        except OSError:
            # Evicted meanwhile, or unreadable: the next read fetches it or says why not.
            return not path.exists()
        return True

    def _path(self, file: RemoteFile) -> Path:
        return Path(self._name(file))

    def _name(self, file: RemoteFile) -> str:
        # Text: a Path takes as long to make as a sample to read.
        return f"{self.folder}/{file.sha256}.{file.name.rpartition('.')[2]}"

    def _present(self, file: RemoteFile) -> int | None:
        """A descriptor with a shared lock if the whole file is here."""
        try:
            descriptor = os.open(self._name(file), os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return None
        # Even if it is evicted before this lock, the descriptor still reads all of it.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        facts = os.fstat(descriptor)
        if facts.st_size != file.bytes:
            # Cut by a full disk or a crash: made anew.
            os.close(descriptor)
            _remove(self._path(file), facts.st_ino)
            return None
        with suppress(PermissionError):
            os.utime(descriptor)
        return descriptor

    def _fetched(self, file: RemoteFile) -> int:
        """Fetch, or wait for the process that is fetching; a descriptor with a shared lock."""
        while True:
            part = self._own(file)
            if part is not None:
                return self._fill(file, part)
            if (descriptor := self._present(file)) is not None:
                return descriptor
            time.sleep(_POLL)

    def _own(self, file: RemoteFile) -> int | None:
        """The .part file of ``file``, locked for this process; ``None``: another one has it, or the file is here."""
        self._refuse_bad(file)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(file)
        part = path.with_name(f"{path.name}.part")
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two calls its owner may have renamed or removed it.
            owned = os.stat(part).st_ino == os.fstat(descriptor).st_ino
            if owned and path.exists():
                os.unlink(part)
                owned = False
        except (BlockingIOError, FileNotFoundError):
            owned = False
        if not owned:
            os.close(descriptor)
            return None
        return descriptor

    def _fill(self, file: RemoteFile, descriptor: int) -> int:
        """Fetch into a .part file that this process owns, and give it its name."""
        path = self._path(file)
        part = path.with_name(f"{path.name}.part")
        done = False
        try:
            self._refuse_bad(file)
            for _ in range(FETCHES):
                # Empty while there is no room for it: its size is what the cache counts.
                os.ftruncate(descriptor, 0)
                self._reserve(file, descriptor)
                found = self._download(file, descriptor)
                if found == (file.bytes, file.sha256):
                    os.fsync(descriptor)
                    os.rename(part, path)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    done = True
                    return descriptor
            longer = "more than " if found[0] > file.bytes else ""
            message = (
                f"{shown(file.url)}: damaged each of {FETCHES} times it was fetched ({longer}"
                f"{min(found[0], file.bytes)} bytes with SHA-256 {found[1][:12]}, expected {file.bytes} with "
                f"{file.sha256[:12]}); upload the file again or pack again"
            )
            path.with_name(f"{path.name}.bad").write_text(message, encoding="utf-8")
            raise DataError(message)
        finally:
            if not done:
                with suppress(OSError):
                    os.unlink(part)
                os.close(descriptor)

    def _download(self, file: RemoteFile, descriptor: int) -> tuple[int, str]:
        try:
            return download(file.url, descriptor, file.bytes)
        except FileNotFoundError:
            raise UnreachableError(
                f"{shown(file.url)}: missing, though the manifest lists it; upload it again or pack again"
            ) from None

    def _refuse_bad(self, file: RemoteFile) -> None:
        """Raise what the last fetches found: all workers asking again for each sample would be hours of transfers."""
        path = self._path(file)
        bad = path.with_name(f"{path.name}.bad")
        with suppress(FileNotFoundError):
            if time.time() - bad.stat().st_mtime < BAD_SECONDS:
                raise DataError(bad.read_text(encoding="utf-8"))

    def _reserve(self, file: RemoteFile, descriptor: int) -> None:
        """Make room and take it, by giving the .part file its final size."""
        if file.bytes > self.max_bytes:
            raise ConfigError(
                f"{shown(file.url)}: {file.bytes} bytes, but data.cache.max_bytes is {self.max_bytes}; raise it"
            )
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with self._locked():
                if self._make_room(file.bytes):
                    os.ftruncate(descriptor, file.bytes)
                    return
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"{self.folder}: no room for {file.bytes} bytes within data.cache.max_bytes {self.max_bytes}: all "
                    "of it is being fetched or read; raise it"
                )
            time.sleep(_POLL)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> bool:
        """Evict until ``size`` more bytes fit; false where too much is in use."""
        found: list[tuple[float, int, str]] = []
        for entry in os.scandir(self.folder):
            if not _OURS.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".bad") and time.time() - facts.st_mtime >= BAD_SECONDS:
                    os.unlink(entry.path)
                elif not entry.name.endswith(".bad"):
                    # What dead processes left half-fetched goes first.
                    age = 0.0 if entry.name.endswith(".part") else facts.st_mtime
                    found.append((age, facts.st_size, entry.path))
        free = self.max_bytes - sum(item[1] for item in found)
        for _, length, path in sorted(found):
            if free >= size:
                break
            if _evict(path):
                free += length
        return free >= size

    def _os_error(self, error: OSError) -> UnreachableError:
        if cause_of(error) == "no_space":
            return UnreachableError(
                f"{self.folder}: disk full; free some space, set data.cache.max_bytes lower or data.cache.folder to "
                "another disk",
                cause="no_space",
            )
        return UnreachableError(
            f"{self.folder}: {error.strerror or error}; set data.cache.folder to a folder to write in"
        )


def _evict(path: str) -> bool:
    """Remove a file that nobody reads or fetches; whether it was."""
    try:
        # Opened for writing, as NFS wants it for an exclusive lock.
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _remove(Path(path), os.fstat(descriptor).st_ino)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _remove(path: Path, inode: int) -> bool:
    """Remove ``path`` if it still is that file, and not one that was made meanwhile."""
    try:
        if os.stat(path, follow_symlinks=False).st_ino != inode:
            return False
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
