"""Read samples out of shards by their byte offsets, trusting nothing that a tar says."""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.cache import FileCache
from vitgraft.data_shards.files import FileFacts, place_of
from vitgraft.data_shards.manifest import Manifest, Shard
from vitgraft.data_shards.remote import UnreachableError

MAX_SAMPLE_BYTES = 2 << 30
_KEPT_INDICES = 64
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_REMEDY = "copy the shard again or pack again; vitgraft shards verify lists all damage"


@dataclass(frozen=True)
class RawSample:
    """The bytes of one sample. ``members``: by extension, i.e. what follows the first dot (``jpg``, ``label.png``)."""

    shard: str
    key: str
    members: dict[str, bytes]

    @property
    def where(self) -> str:
        """Shard and key, for error messages."""
        return f"{self.shard}:{self.key}"

    def first(self, extensions: tuple[str, ...]) -> bytes:
        """The member with the first of these extensions that is there.

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

    Local files are opened when first needed and read with ``pread``, so a reader may be shared by threads and forks;
    pickling drops the open files. Files behind a URL are fetched whole when first needed, and read from the cache.

    Args:
        folder: of the manifest; a URL as ``str``.
        cache: where fetched files go; needed for a URL only.
    """

    def __init__(self, folder: Path | str, manifest: Manifest, cache: FileCache | None = None) -> None:
        self.folder, self.manifest, self.cache = folder, manifest, cache
        self._tars = place_of(manifest.tars(folder), cache)
        self._index_files = place_of(folder, cache)
        self._ends = np.cumsum(np.asarray(manifest.shard_sizes, dtype=np.int64))
        self._indices: OrderedDict[int, npt.NDArray[np.uint64]] = OrderedDict()

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
        """Whether shards are fetched before they are read."""
        return self._tars.remote

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds the sample."""
        return int(np.searchsorted(self._ends, sample, side="right"))

    def prefetch(self, shard: int) -> None:
        """Fetch a remote shard and its index into the cache, unless they are there or another process is at it.

        Raises:
            DataError: it cannot be fetched, or is damaged.
        """
        info = self.manifest.shards[shard]
        self._index_files.prefetch(_index_facts(info))
        self._tars.prefetch(_tar_facts(info))

    def key(self, sample: int) -> str:
        """The key that the sample must have: its number."""
        return f"{sample:09d}"

    def read(self, sample: int) -> RawSample:
        """The bytes of one sample.

        Raises:
            IndexError: no such sample.
            DataError: the shard cannot be read, is damaged, or holds what no packer of ours writes.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        info = self.manifest.shards[self.shard_of(sample)]
        try:
            return self._read(sample)
        except UnreachableError:
            raise
        except DataError:
            # A copy in the cache may have rotted since it was verified; what was fetched so is damaged at its source.
            if not self._tars.recheck(_tar_facts(info)):
                raise
            return self._read(sample)

    def _read(self, sample: int) -> RawSample:
        shard = self.shard_of(sample)
        info = self.manifest.shards[shard]
        local = sample - (int(self._ends[shard]) - info.samples)
        path = self._tars.where(info.name)
        where = f"{path}:{self.key(sample)}"
        start, end = self._range(shard, local)
        if not 0 <= start < end <= info.bytes or end - start > MAX_SAMPLE_BYTES:
            raise DataError(f"{where}: index gives bytes {start}..{end} of {info.bytes}; {_REMEDY}")
        try:
            data = self._tars.read(_tar_facts(info), start, end - start)
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror}; {_REMEDY}") from None
        if len(data) != end - start:
            raise DataError(f"{where}: shard ends after {len(data)} of {end - start} bytes; {_REMEDY}")
        foreign = self.manifest.foreign
        if foreign is None:
            return RawSample(path, self.key(sample), _members(data, self.key(sample), where))
        members = _members(data, None, where, foreign.members)
        members["json"] = self._metadata(shard, local)
        return RawSample(path, self.key(sample), members)

    def _range(self, shard: int, local: int) -> tuple[int, int]:
        """Where a sample lies in its tar. A foreign tar's index has starts and ends apart, as it may skip some."""
        index = self._index(shard)
        following = local + 1 if self.manifest.foreign is None else self.manifest.shards[shard].samples + local
        return int(index[local]), int(index[following])

    def _index(self, shard: int) -> npt.NDArray[np.uint64]:
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard]
        info = self.manifest.shards[shard]
        # Foreign: n starts, n ends, n + 1 places of metadata, then the metadata, which is not kept in memory.
        length = info.samples + 1 if self.manifest.foreign is None else 3 * info.samples + 1
        path = self._index_files.where(info.index_name)
        try:
            # One number more, to see whether there is more: our own indices end here.
            data = self._index_files.read(_index_facts(info), 0, 8 * length + 8)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from None
        found = len(data) // 8
        if (len(data) != 8 * length) if self.manifest.foreign is None else found < length:
            raise DataError(f"{path}: {found} offsets, expected {length}; {_REMEDY}")
        index = np.frombuffer(data, dtype="<u8", count=length).astype(np.uint64)
        self._indices[shard] = index
        if len(self._indices) > _KEPT_INDICES:
            self._indices.popitem(last=False)
        return index

    def _metadata(self, shard: int, local: int) -> bytes:
        """A foreign sample's metadata, from the index."""
        info = self.manifest.shards[shard]
        places = self._index(shard)[2 * info.samples :]
        start, end = int(places[local]), int(places[local + 1])
        path = self._index_files.where(info.index_name)
        if not 0 <= start < end <= info.index_bytes:
            raise DataError(f"{path}: metadata at bytes {start}..{end} of {info.index_bytes}; index the tars again")
        try:
            return self._index_files.read(_index_facts(info), start, end - start)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from None


def _tar_facts(info: Shard) -> FileFacts:
    return FileFacts(info.name, info.bytes, info.sha256)


def _index_facts(info: Shard) -> FileFacts:
    return FileFacts(info.index_name, info.index_bytes, info.index_sha256)


def _members(data: bytes, key: str | None, where: str, wanted: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """The members of one sample, by extension.

    Args:
        key: what their names must start with; ``None``: whatever the first one's does.
        wanted: the extensions to read, with the names to read them by; ``None``: all, by their own.
    """
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if wanted is not None and member.isdir():
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
    """Key and extension of a foreign tar's member, as WebDataset parts them: at the first dot after the last slash.

    The extension comes in small letters, and empty where there is none.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
