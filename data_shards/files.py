"""Location of a data set's files: in place on a local disk, or in the cache of files fetched from URLs."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Protocol

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.files import open_regular
from vitgraft.data_shards.cache import FileCache, RemoteFile
from vitgraft.data_shards.remote import UnreachableError, join, shown

_OPEN_FILES = 16


class FileFacts(NamedTuple):
    """Record of a file in the manifest."""

    name: str
    bytes: int
    sha256: str


class Place(Protocol):
    """A folder of files, wherever it is."""

    remote: bool

    def where(self, name: str) -> str:
        """Return the file's name for messages."""

    def read(self, file: FileFacts, start: int, length: int) -> bytes:
        """Return at most ``length`` bytes from ``start``, fewer at the end. Raises OSError or DataError."""

    def prefetch(self, file: FileFacts) -> None:
        """Fetch the file before it is read."""

    def recheck(self, file: FileFacts) -> bool:
        """Tell whether reading again may help after damage was found."""

    def close(self) -> None:
        """Close what is open."""


def place_of(folder: Path | str, cache: FileCache | None) -> Place:
    """Return the files of a folder, or of a URL (``str``), which needs a cache."""
    if isinstance(folder, Path):
        return LocalFolder(folder)
    if cache is None:
        raise ConfigError(f"{shown(folder)}: files behind a URL are read through a cache; give one")
    return CachedFolder(folder, cache)


class LocalFolder:
    """Reads with ``pread``; keeps the files last used open."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def where(self, name: str) -> str:
        """Return the path."""
        return str(self.folder / name)

    def read(self, file: FileFacts, start: int, length: int) -> bytes:
        """See :class:`Place`; raises UnreachableError where the file has another size than when the set was opened."""
        descriptor = self._open.get(file.name)
        if descriptor is None:
            descriptor = self._opened(file)
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file.name] = descriptor
        else:
            self._open.move_to_end(file.name)
        return pread(descriptor, start, length)

    def _opened(self, file: FileFacts) -> int:
        descriptor = open_regular(self.folder / file.name)
        size = os.fstat(descriptor).st_size
        if size != file.bytes:
            os.close(descriptor)
            # The manifest's reader found this size, so the file was changed under this process: packed again, say.
            raise UnreachableError(
                f"{self.where(file.name)}: {size} bytes, expected {file.bytes}: changed since the data set was opened; "
                "start again"
            )
        return descriptor

    def prefetch(self, file: FileFacts) -> None:
        """Do nothing: local files need no fetch."""

    def recheck(self, file: FileFacts) -> bool:
        """Return ``False``: there is no other copy."""
        return False

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])


class CachedFolder:
    """Fetches a file whole when it is first needed. Opens it for each read, so that nothing keeps it from eviction."""

    remote = True

    def __init__(self, url: str, cache: FileCache) -> None:
        self.url, self.cache = url, cache
        self._checked: set[str] = set()

    def where(self, name: str) -> str:
        """Return the URL, without secrets."""
        return shown(join(self.url, name))

    def read(self, file: FileFacts, start: int, length: int) -> bytes:
        """See :class:`Place`; raises DataError as :meth:`FileCache.opened`."""
        with self.cache.opened(self._at(file)) as descriptor:
            return pread(descriptor, start, length)

    def prefetch(self, file: FileFacts) -> None:
        """Fetch it unless it is here or being fetched."""
        self.cache.prefetch(self._at(file))

    def recheck(self, file: FileFacts) -> bool:
        """Tell whether the cached copy was corrupt; hashed at most once in a process."""
        if file.sha256 in self._checked:
            return False
        self._checked.add(file.sha256)
        return self.cache.recheck(self._at(file))

    def close(self) -> None:
        """Do nothing: no file is kept open."""

    def _at(self, file: FileFacts) -> RemoteFile:
        return RemoteFile(join(self.url, file.name), file.name, file.bytes, file.sha256)


def pread(descriptor: int, start: int, length: int) -> bytes:
    """Read fully: one ``pread`` may return less than asked for."""
    data = os.pread(descriptor, length, start)
    if len(data) == length or not data:
        return data
    parts = [data]
    while (got := sum(map(len, parts))) < length and (part := os.pread(descriptor, length - got, start + got)):
        parts.append(part)
    return b"".join(parts)
