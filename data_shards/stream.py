"""Read samples out of shards by their byte offsets, trusting nothing that a tar says."""

from __future__ import annotations

import errno
import io
import os
import sys
import tarfile
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import open_regular
from vitgraft.data_shards.cache import FileCache
from vitgraft.data_shards.files import FileFacts, place_of
from vitgraft.data_shards.manifest import MANIFEST, Manifest, Shard
from vitgraft.data_shards.remote import UnreachableError
from vitgraft.data_shards.ustar import plain_members

MAX_SAMPLE_BYTES = 2 << 30
_KEPT_SHARDS, _KEPT_BYTES = 64, 64 << 20
"""Indices of shards that a reader keeps in memory, and their bytes; that of the shard opened last stays in any case."""
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_REMEDY = "copy the shard again or pack again; vitgraft shards verify lists all damage"


class RawSample(NamedTuple):
    """The bytes of one sample. ``members``: by extension, i.e. what follows the first dot (``jpg``, ``label.png``)."""

    shard: str
    key: str
    members: dict[str, bytes]

    @property
    def where(self) -> str:
        """Shard and key, for error messages."""
        return f"{self.shard}:{self.key}"

    def first(self, extensions: tuple[str, ...]) -> bytes:
        """Return the member with the first of these extensions that is there.

        Raises:
            DataError: none is there.
        """
        for extension in extensions:
            if extension in self.members:
                return self.members[extension]
        found = ", ".join(sorted(self.members)) or "nothing"
        raise DataError(f"{self.where}: expected a member .{', .'.join(extensions)}, found {found}; {_REMEDY}")


class ShardReader:
    """Samples of a packed data set by their number, in the order of packing.

    Local files are opened when first needed and read with ``pread``, so forks may go on with a reader, but threads need
    one each. Pickling drops the open files. Files behind a URL are fetched whole when first needed, and read from the
    cache.

    Args:
        folder: of the manifest; a URL as ``str``.
        cache: where fetched files go; needed for a URL only.
    """

    def __init__(self, folder: Path | str, manifest: Manifest, cache: FileCache | None = None) -> None:
        self.folder, self.manifest, self.cache = folder, manifest, cache
        self._tars = place_of(manifest.tars(folder), cache)
        self._index_files = place_of(folder, cache)
        self._ends: list[int] = np.cumsum(manifest.shards.samples).tolist()
        self._kept: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["manifest"], state["cache"])  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_index_files"):
            self.close()

    def close(self) -> None:
        """Close the open shards; a later read opens them again."""
        self._tars.close()
        self._index_files.close()

    @property
    def remote(self) -> bool:
        """Tell whether shards are fetched before they are read."""
        return self._tars.remote

    def shard_of(self, sample: int) -> int:
        """Return the number of the shard that holds the sample."""
        return bisect_right(self._ends, sample)

    def prefetch(self, shard: int) -> None:
        """Fetch a remote shard and its index into the cache, unless they are there or another process is at it.

        Raises:
            DataError: it cannot be fetched, or is damaged.
        """
        info = self.manifest.shards[shard]
        self._index_files.prefetch(_index_facts(info))
        self._tars.prefetch(_tar_facts(info))

    def key(self, sample: int) -> str:
        """Return the expected key of a sample: its number."""
        return f"{sample:09d}"

    def read(self, sample: int) -> RawSample:
        """Return the bytes of one sample.

        Raises:
            IndexError: no such sample.
            DataError: the shard is damaged, or holds what no packer of ours writes; UnreachableError: it cannot be read
                for a reason that says nothing about the data, or is another data set's by now.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = bisect_right(self._ends, sample)
        try:
            return self._read(sample, shard)
        except UnreachableError:
            raise
        except DataError:
            # A copy in the cache may have rotted since it was verified; what was fetched so is damaged at its source.
            info = self.manifest.shards[shard]
            self._kept.pop(shard, None)
            rotted = [self._index_files.recheck(_index_facts(info)), self._tars.recheck(_tar_facts(info))]
            if not any(rotted):
                raise
            return self._read(sample, shard)

    def _read(self, sample: int, number: int) -> RawSample:
        shard = self._kept.get(number) or self._opened(number)
        local, foreign = sample - shard.first, self.manifest.foreign
        key, path = self.key(sample), shard.path
        # A foreign tar's index has starts and ends apart, as it may skip some.
        start, end = shard.offsets[local], shard.offsets[local + (1 if foreign is None else shard.samples)]
        length = end - start
        if not 0 < length <= MAX_SAMPLE_BYTES or end > shard.tar.bytes:
            raise DataError(f"{path}:{key}: index gives bytes {start}..{end} of {shard.tar.bytes}; {_REMEDY}")
        try:
            data = self._tars.read(shard.tar, start, length)
        except OSError as error:
            raise _unreadable(f"{path}:{key}", error) from None
        if len(data) != length:
            raise DataError(f"{path}:{key}: shard ends after {len(data)} of {length} bytes; {_REMEDY}")
        if foreign is None:
            return RawSample(path, key, _own_members(data, key) or _members(data, key, f"{path}:{key}"))
        members = _foreign_members(data, foreign.members) or _members(data, None, f"{path}:{key}", foreign.members)
        members["json"] = self._metadata(shard, local)
        return RawSample(path, key, members)

    def _opened(self, number: int) -> _OpenShard:
        """Return an open shard with its index; those opened last are cached."""
        info = self.manifest.shards[number]
        foreign = self.manifest.foreign is not None
        # Foreign: n starts, n ends, n + 1 places of metadata, then the metadata, which is not kept in memory.
        length = 3 * info.samples + 1 if foreign else info.samples + 1
        path = self._index_files.where(info.index_name)
        try:
            data = self._index_files.read(_index_facts(info), 0, 8 * length)
        except OSError as error:
            raise _unreadable(path, error) from None
        if len(data) != 8 * length:
            raise DataError(f"{path}: {len(data) // 8} offsets, expected {length}; {_REMEDY}")
        # After the file is open: a set packed anew is put in this one's place as a whole.
        self._refuse_another_set()
        if not foreign and sha256(data).hexdigest() != info.index_sha256:
            raise DataError(f"{path}: not the index that {MANIFEST} describes; {_REMEDY}")
        index = array("Q", data)
        if sys.byteorder == "big":
            index.byteswap()
        first, where = self._ends[number] - info.samples, self._tars.where(info.name)
        shard = _OpenShard(where, _tar_facts(info), _index_facts(info), first, info.samples, index)
        self._kept[number] = shard
        while len(self._kept) > 1 and (len(self._kept) > _KEPT_SHARDS or self._kept_bytes() > _KEPT_BYTES):
            self._kept.popitem(last=False)
        return shard

    def _kept_bytes(self) -> int:
        return sum(8 * len(shard.offsets) for shard in self._kept.values())

    def _refuse_another_set(self) -> None:
        """Raise if another data set lies here by now: to mix them is wrong, and no sample of this one is damaged."""
        if isinstance(self.folder, str):
            # What is fetched is known by its hash.
            return
        path = self.folder / MANIFEST
        try:
            facts = os.stat(path)
            found = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if found != self._checked and self.manifest.fingerprint.encode() not in _content(path):
                raise UnreachableError(f"{self.folder}: packed again since it was opened; start again")
        except OSError as error:
            raise _unreadable(str(path), error) from None
        self._checked = found

    def _metadata(self, shard: _OpenShard, local: int) -> bytes:
        """Return a foreign sample's metadata, from the index."""
        start, end = shard.offsets[2 * shard.samples + local], shard.offsets[2 * shard.samples + local + 1]
        path = self._index_files.where(shard.index_file.name)
        if not 0 <= start < end <= shard.index_file.bytes:
            raise DataError(
                f"{path}: metadata at bytes {start}..{end} of {shard.index_file.bytes}; index the tars again"
            )
        try:
            return self._index_files.read(shard.index_file, start, end - start)
        except OSError as error:
            raise _unreadable(path, error) from None


def _content(path: Path) -> bytes:
    """Return the content of a manifest that was read before; raise OSError if it is no longer a file."""
    with os.fdopen(open_regular(path), "rb") as stream:
        return stream.read()


class _OpenShard(NamedTuple):
    """Open shard. ``path``: the tar's, for messages; ``offsets``: its index."""

    path: str
    tar: FileFacts
    index_file: FileFacts
    first: int
    samples: int
    offsets: array[int]


def _unreadable(where: str, error: OSError) -> DataError:
    """Return the error of a failed read: damage for an I/O error, not for a missing folder or too many open files."""
    if error.errno == errno.EIO:
        return DataError(f"{where}: cannot be read: {error.strerror}; {_REMEDY}")
    return UnreachableError(f"{where}: cannot be read: {error.strerror}; see to that, then run again")


def _tar_facts(info: Shard) -> FileFacts:
    return FileFacts(info.name, info.bytes, info.sha256)


def _index_facts(info: Shard) -> FileFacts:
    return FileFacts(info.index_name, info.index_bytes, info.index_sha256)


def _own_members(data: bytes, key: str) -> dict[str, bytes] | None:
    """Return the members of one sample by extension, in the common case; ``None``: :func:`_members` decides."""
    found = plain_members(data)
    if found is None:
        return None
    members: dict[str, bytes] = {}
    for name, first, end in found:
        own, _, extension = name.partition(".")
        if own != key or not extension:
            return None
        members[extension] = data[first:end]
    return members if len(members) == len(found) else None


def _foreign_members(data: bytes, wanted: Mapping[str, str]) -> dict[str, bytes] | None:
    """Return the ``wanted`` members of one sample of a foreign tar, in the common case; else ``None``."""
    found = plain_members(data)
    if found is None:
        return None
    members: dict[str, bytes] = {}
    keys: set[str] = set()
    count = 0
    for name, first, end in found:
        if is_hidden_member(name):
            continue
        key, extension = member_name(name)
        keys.add(key)
        if not extension:
            return None
        if extension in wanted:
            members[wanted[extension]] = data[first:end]
            count += 1
    return members if len(members) == count and len(keys) == 1 else None


def _members(data: bytes, key: str | None, where: str, wanted: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Return the members of one sample, by extension.

    Args:
        key: what their names must start with; ``None``: whatever the first one's does.
        wanted: the extensions to read, with the names to read them by; ``None``: all, by their own.
    """
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if wanted is not None and (member.isdir() or is_hidden_member(member.name)):
                    continue
                name, extension = member_name(member.name) if wanted is not None else _own_name(member.name)
                key = name if key is None else key
                # Only plain files: links and devices mean nothing here, sparse ones could claim any size.
                if member.type not in _PLAIN or member.size > len(data) or name != key or not extension:
                    raise DataError(f"{where}: unexpected tar member {member.name[:80]!r}; {_REMEDY}")
                if wanted is not None:
                    if extension not in wanted:
                        continue
                    extension = wanted[extension]
                if extension in members:
                    raise DataError(f"{where}: tar member .{extension} occurs twice; {_REMEDY}")
                stream = tar.extractfile(member)
                assert stream is not None
                members[extension] = stream.read()
                if len(members[extension]) != member.size:
                    raise DataError(f"{where}: tar member .{extension} is cut short; {_REMEDY}")
    except (tarfile.TarError, ValueError, UnicodeError, EOFError, RecursionError) as error:
        raise DataError(f"{where}: not a readable tar: {error}; {_REMEDY}") from None
    if not members:
        raise DataError(f"{where}: no tar member; {_REMEDY}")
    return members


def _own_name(name: str) -> tuple[str, str]:
    key, _, extension = name.partition(".")
    return key, extension


def member_name(name: str) -> tuple[str, str]:
    """Return key and extension of a foreign tar's member, split as WebDataset does: at the first dot of the file name.

    The extension comes in small letters, and empty where there is none.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def is_hidden_member(name: str) -> bool:
    """Tell whether this is none of a foreign tar's samples: on a Mac, tar adds a ``._NAME`` to each file."""
    return name.rpartition("/")[2].startswith(".")
