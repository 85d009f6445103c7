"""Remote files in a bounded folder on this machine's disk, shared by all processes and runs that name it.

FOLDER/SHA256.tar, .idx        whole files, by the hash of their content, so that no name or change can mix them up
FOLDER/SHA256.tar.part         being fetched, by the process that holds its lock; renamed when its hash is right
FOLDER/SHA256.tar.bad          fetched several times and wrong each time: not asked for again for a while
FOLDER/lock                    held while room is made

All locks are flock's: the kernel frees them when their holder dies. A reader holds a shared one while it reads, and
only a file that nobody reads is evicted, the one that was not used for longest first. Nobody waits for a lock without
end: who holds it is named.

What others can write is not believed. A file that is not this user's own, or lies in a folder that is not, is hashed at
its first use in a process. Links, fifos and the like under our names are removed, never followed or waited for.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from vitgraft.configs.errors import ConfigError, DataError, cause_of
from vitgraft.configs.files import is_own, lock_holder, lock_within, open_regular, read_text
from vitgraft.configs.hashing import sha256_descriptor
from vitgraft.data_shards.remote import UnreachableError, download, shown

FETCHES = 3
"""Number of attempts to fetch a file whose hash is wrong."""
BAD_SECONDS = 600.0
"""Seconds before a file whose hash stayed wrong is fetched again."""
WAIT_SECONDS = 600.0
"""Seconds to wait for space reserved by other processes' transfers."""
LOCK_SECONDS = 60.0
"""Seconds to wait for a lock that is held only briefly."""
SILENT_SECONDS = 600.0
"""Seconds to wait for another process's transfer without progress: longer than its own time-outs."""
TELL_SECONDS = 30.0
"""Seconds after which the wait for another process's transfer is reported."""
_POLL = 0.05
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|idx)(\.part|\.bad(\.[0-9a-f]{8})?)?")
_NO_FILE = {errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EISDIR}
_MAX_BAD_BYTES = 64 << 10
_log = logging.getLogger("vitgraft")


class RemoteFile(NamedTuple):
    """Expected facts of a remote file. ``name``: in its folder; only its suffix (.tar, .idx) counts here."""

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
        self._hashed: set[tuple[str, int, int, int]] = set()
        """Files that others could have put here, and that this process has found to be right."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hashed": set()}

    @contextmanager
    def opened(self, file: RemoteFile) -> Iterator[int]:
        """Open the complete, verified file, fetched if it is not cached; it is not evicted inside the block.

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
        """Fetch the file unless it is cached or another process fetches it. Raises as :meth:`opened`."""
        try:
            if not self._path(file).exists() and (part := self._own(file)) is not None:
                os.close(self._fill(file, part))
        except OSError as error:
            raise self._os_error(error) from None

    def recheck(self, file: RemoteFile) -> bool:
        """Remove the file if what lies here is not what was fetched (a failing disk); whether it was removed."""
        path = self._path(file)
        try:
            descriptor = open_regular(path, follow=False)
            try:
                if sha256_descriptor(descriptor) == file.sha256:
                    return False
                _remove(path, os.fstat(descriptor).st_ino)
            finally:
                os.close(descriptor)
        except OSError:
            # Evicted meanwhile, or unreadable: the next read fetches it or says why not.
            return not os.path.lexists(path)
        return True

    def _path(self, file: RemoteFile) -> Path:
        return Path(self._name(file))

    def _name(self, file: RemoteFile) -> str:
        # Text: a Path takes as long to make as a sample to read.
        return f"{self.folder}/{file.sha256}.{file.name.rpartition('.')[2]}"

    def _present(self, file: RemoteFile) -> int | None:
        """Return a descriptor with a shared lock if the whole file is here."""
        name = self._name(file)
        descriptor = _open_ours(name, os.O_RDONLY)
        if descriptor is None:
            return None
        try:
            # Even if it is evicted before this lock, the descriptor still reads all of it.
            _lock(descriptor, name, shared=True)
            facts = os.fstat(descriptor)
            # Truncated by a full disk or a crash, or another user's: fetched anew.
            if facts.st_size == file.bytes and self._is_right(file, descriptor, facts):
                with suppress(PermissionError):
                    os.utime(descriptor)
                return descriptor
            _remove(Path(name), facts.st_ino)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _is_right(self, file: RemoteFile, descriptor: int, facts: os.stat_result) -> bool:
        """Tell whether the cached file has its hash; the name is proof where only this user can write to the folder."""
        if is_own(facts) and is_own(os.stat(self.folder)):
            return True
        seen = (file.sha256, facts.st_dev, facts.st_ino, facts.st_size)
        if seen not in self._hashed:
            if sha256_descriptor(descriptor) != file.sha256:
                return False
            self._hashed.add(seen)
        return True

    def _fetched(self, file: RemoteFile) -> int:
        """Fetch, or wait for the process that is fetching; a descriptor with a shared lock."""
        waiting = _Waiting(Path(f"{self._name(file)}.part"))
        while True:
            part = self._own(file)
            if part is not None:
                return self._fill(file, part)
            if (descriptor := self._present(file)) is not None:
                return descriptor
            waiting.check()
            time.sleep(_POLL)

    def _own(self, file: RemoteFile) -> int | None:
        """Return the .part file of ``file``, locked for this process; ``None``: another one has it, or the file is
        here."""
        self._refuse_bad(file)
        # Only this user writes in it, whatever the umask.
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = self._path(file)
        part = f"{path}.part"
        descriptor = _open_ours(part, os.O_RDWR)
        if made := descriptor is None:
            try:
                descriptor = open_regular(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644, follow=False)
            except FileExistsError:
                return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            facts = os.fstat(descriptor)
            # Between the two calls its owner may have renamed or removed it.
            owned = os.stat(part, follow_symlinks=False).st_ino == facts.st_ino
            # A file of another user, or with a second hard link, could be written to by others.
            strange = facts.st_nlink != 1 or (not made and facts.st_uid != os.geteuid())
            if owned and (strange or path.exists()):
                os.unlink(part)
                owned = False
        except (BlockingIOError, FileNotFoundError):
            owned = False
        except BaseException:
            os.close(descriptor)
            raise
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
            _write_new(Path(f"{path}.bad"), message)
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
        bad = Path(f"{self._name(file)}.bad")
        with suppress(OSError):
            facts = os.stat(bad, follow_symlinks=False)
            if time.time() - facts.st_mtime >= BAD_SECONDS or not (is_own(facts) and S_ISREG(facts.st_mode)):
                return
            try:
                message = read_text(bad, _MAX_BAD_BYTES)
            except DataError:  # removed meanwhile
                return
            raise DataError(message)

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
            # Those who wait for this transfer see that it is alive.
            os.utime(descriptor)
            time.sleep(_POLL)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = f"{self.folder}/lock"
        descriptor = _open_ours(path, os.O_RDWR)
        if descriptor is None:
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, 0o644, follow=False)
        try:
            _lock(descriptor, path)
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
                if ".bad" in entry.name and time.time() - facts.st_mtime >= BAD_SECONDS:
                    os.unlink(entry.path)
                elif ".bad" not in entry.name:
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


class _Waiting:
    """Waits for another process's transfer, reports the wait, and gives up without progress."""

    def __init__(self, part: Path) -> None:
        self._part, self._told = part, False
        self._start = self._changed = time.monotonic()
        self._seen: tuple[int, ...] = ()

    def check(self) -> None:
        """Raises UnreachableError once the transfer counts as dead."""
        now, holder = time.monotonic(), ""
        with suppress(OSError):
            facts = os.stat(self._part, follow_symlinks=False)
            if (seen := (facts.st_ino, facts.st_size, facts.st_mtime_ns)) != self._seen:
                self._seen, self._changed = seen, now
        silent = now - self._changed
        if silent < SILENT_SECONDS and (self._told or now - self._start < TELL_SECONDS):
            return
        with suppress(OSError):
            descriptor = open_regular(self._part, follow=False)
            holder = lock_holder(descriptor)
            os.close(descriptor)
        if silent >= SILENT_SECONDS:
            raise UnreachableError(
                f"{self._part}: locked by {holder or 'another process'}, which has written nothing for {silent:.0f} s; "
                "end it, or set data.cache.folder to another folder"
            )
        self._told = True
        _log.warning("%s: waiting for %s, which fetches it", self._part, holder or "another process")


def _lock(descriptor: int, path: str, *, shared: bool = False) -> None:
    """Take a lock that is held only briefly."""
    if not lock_within(descriptor, LOCK_SECONDS, shared=shared):
        raise UnreachableError(
            f"{path}: locked by {lock_holder(descriptor)} for more than {LOCK_SECONDS:.0f} s; end it, or set "
            "data.cache.folder to another folder"
        )


def _open_ours(path: str, flags: int) -> int | None:
    """Open a file under one of our names; ``None``: there is none, or it was a link or the like and is removed."""
    try:
        return open_regular(path, flags, follow=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    # Not what any vitgraft wrote. Where it cannot be removed, that is what is said.
    with suppress(FileNotFoundError):
        os.unlink(path)
    return None


def _write_new(path: Path, text: str) -> None:
    """Replace a name by a small file, without following a symbolic link."""
    draft = f"{path}.{secrets.token_hex(4)}"
    descriptor = open_regular(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, follow=False)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
    os.replace(draft, path)


def _evict(path: str) -> bool:
    """Remove a file that no process reads or fetches; return whether it was removed."""
    try:
        # Opened for writing, as NFS wants it for an exclusive lock.
        descriptor = open_regular(path, os.O_RDWR, follow=False)
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
