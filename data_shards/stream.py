"""Read samples out of shards by their byte offsets, trusting nothing that a tar says."""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.manifest import Manifest

MAX_SAMPLE_BYTES = 2 << 30
_OPEN_SHARDS = 16
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

    Files are opened when first needed and read with ``pread``, so a reader may be shared by threads and forks; pickling
    drops the open files.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._ends = np.cumsum(np.asarray(manifest.shard_sizes, dtype=np.int64))
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indices: dict[int, npt.NDArray[np.uint64]] = {}

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["manifest"])  # type: ignore[misc]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the open shards; a later read opens them again."""
        files = getattr(self, "_files", {})
        while files:
            os.close(files.popitem()[1])

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
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        info = self.manifest.shards[shard]
        path = self.folder / info.name
        start, end = self._range(shard, sample - (int(self._ends[shard]) - info.samples))
        where = f"{path}:{self.key(sample)}"
        if not 0 <= start < end <= info.bytes or end - start > MAX_SAMPLE_BYTES:
            raise DataError(f"{where}: index gives bytes {start}..{end} of {info.bytes}; {_REMEDY}")
        try:
            data = _pread(self._open(shard), start, end - start)
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror}; {_REMEDY}") from None
        if len(data) != end - start:
            raise DataError(f"{where}: shard ends after {len(data)} of {end - start} bytes; {_REMEDY}")
        return RawSample(str(path), self.key(sample), _members(data, self.key(sample), where))

    def _range(self, shard: int, local: int) -> tuple[int, int]:
        index = self._indices.get(shard)
        if index is None:
            info = self.manifest.shards[shard]
            path = self.folder / info.index_name
            try:
                index = np.fromfile(path, dtype="<u8").astype(np.uint64)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from None
            if len(index) != info.samples + 1:
                raise DataError(f"{path}: {len(index)} offsets, expected {info.samples + 1}; {_REMEDY}")
            self._indices[shard] = index
        return int(index[local]), int(index[local + 1])

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        descriptor = os.open(self.folder / self.manifest.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        return descriptor


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Read fully: one ``pread`` may return less than asked for."""
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(descriptor, length, start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return b"".join(parts)


def _members(data: bytes, key: str, where: str) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                name, _, extension = member.name.partition(".")
                # Only plain files: links and devices mean nothing here, sparse ones could claim any size.
                if member.type not in _PLAIN or member.size > len(data) or name != key or not extension:
                    raise DataError(f"{where}: unexpected tar member {member.name[:80]!r}; {_REMEDY}")
                if extension in members:
                    raise DataError(f"{where}: tar member .{extension} occurs twice; {_REMEDY}")
                stream = tar.extractfile(member)
                assert stream is not None
                members[extension] = stream.read()
                if len(members[extension]) != member.size:
                    raise DataError(f"{where}: tar member .{extension} is cut short; {_REMEDY}")
    except (tarfile.TarError, ValueError, UnicodeError, EOFError) as error:
        raise DataError(f"{where}: not a readable tar: {error}; {_REMEDY}") from None
    return members
