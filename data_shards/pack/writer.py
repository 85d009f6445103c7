"""Write a packed data set so that an incomplete one is never read as complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from tarfile import BLOCKSIZE
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.hashing import canonical_json
from vitgraft.data_shards.manifest import MANIFEST, Kind, Manifest, Shard, dump_manifest, make_manifest
from vitgraft.data_shards.pack.journal import Finished, Identity, Workplace, create, sync, sync_folder
from vitgraft.data_shards.pack.label_report import Say
from vitgraft.data_shards.stream import MAX_SAMPLE_BYTES

Progress = Callable[[int, int], None]
"""Called as progress(samples done, samples in all)."""

_OURS = re.compile(r"^(manifest\.json|shard-\d+\.(tar|idx))$")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class DatasetWriter:
    """Context manager: packs in a folder beside ``out``, writes the manifest last, and renames the set to ``out``.

    Each sample comes of an item. With ``identity``, an interrupted or failed packing keeps its finished shards in
    ``OUT.packing``; one whose first items are the same goes on behind them, and its caller begins with item number
    ``items_done``. Without, nothing is left of it. A half-written shard is never used again. The bytes depend on the
    samples alone: no times, users or host names are stored.

    Args:
        out: the folder to make; of a link, the one that it points to.
        kind, classes, category_ids: as in the manifest.
        source: free description for the manifest; it may be filled until the end of the ``with`` block.
        total: items in all, for progress and for the estimate in a disk-full error.
        samples_per_shard, shard_bytes: a shard is closed when it reaches either.
        identity: what decides the sample of an item, by its number.
        threads: how many hash what is there already.
        say: told what was found of an earlier packing, and what is kept of this one.

    Raises:
        ConfigError: ``out`` holds a data set and ``overwrite`` is false, or holds files that are not ours, or another
            process is packing it, or ``OUT.packing`` holds files that are not ours.
        DataError: the disk is full or cannot be written; no sample was added.
    """

    def __init__(
        self,
        out: Path,
        kind: Kind,
        classes: list[str],
        *,
        category_ids: list[int] | None = None,
        source: dict[str, Any] | None = None,
        total: int = 0,
        overwrite: bool = False,
        samples_per_shard: int = 1000,
        shard_bytes: int = 1 << 30,
        progress: Progress | None = None,
        identity: Callable[[int], str] | None = None,
        threads: int = 1,
        say: Say | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard is {samples_per_shard}; give at least 1")
        # A link stays, and the bytes go where it points: a rename would replace it, on its own disk.
        self.out = Path(os.path.realpath(out))
        self.kind, self.classes, self.category_ids = kind, classes, category_ids
        self.source: dict[str, Any] = source if source is not None else {}
        self.total, self.overwrite, self.progress = total, overwrite, progress
        self.samples_per_shard, self.shard_bytes = samples_per_shard, shard_bytes
        self._identity = None
        if identity is not None:
            self._identity = Identity([samples_per_shard, shard_bytes], identity, total)
        self.threads, self.say = threads, say
        self.samples = self.items_done = 0
        self.manifest: Manifest | None = None
        self._place: Workplace | None = None
        self._shards: list[Shard] = []
        self._skipped: list[str] = []
        self._bytes = 0
        self._offsets: list[int] = []
        self._file: _HashedFile | None = None
        self._tar: Any = None

    def __enter__(self) -> DatasetWriter:
        place = None
        try:
            place = self._place = Workplace(self.out)
            self._refuse_existing()
            self._resume(place)
        except BaseException as error:
            if place is not None:
                place.close(keep=place.started)
            raise (self._os_error(error) if isinstance(error, OSError) else error) from None
        return self

    def add(self, members: dict[str, bytes], metadata: dict[str, Any]) -> None:
        """Append one sample: ``members`` by extension (without the dot), ``metadata`` as its JSON.

        Raises:
            DataError: it is larger than a reader takes, or the disk is full or cannot be written.
        """
        key, text = f"{self.samples:09d}", canonical_json(metadata).encode()
        check_sample({**members, "json": text}, str(metadata.get("file_name", f"{self.out}: sample {key}")))
        try:
            if self._tar is None:
                self._open_shard()
            self._offsets.append(self._tar.tarstream.offset)
            self._tar.write({"__key__": key, **members, "json": text})
            self.samples += 1
            self.items_done += 1
            if len(self._offsets) >= self.samples_per_shard or self._tar.tarstream.offset >= self.shard_bytes:
                self._close_shard()
        except OSError as error:
            raise self._os_error(error) from None
        self._tell()

    def skip(self, reason: str) -> None:
        """Note that an item gave no sample, in the manifest's ``source.skipped``."""
        self.items_done += 1
        self._skipped.append(reason)
        self._note_skipped([reason])
        self._tell()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._place is not None
        try:
            if error is None:
                self._finish(self._place)
        except OSError as failure:
            raise self._os_error(failure) from None
        finally:
            if self._file is not None:
                self._file.drop()
            keep = not self._place.published and self._identity is not None and bool(self._shards)
            self._place.close(keep)
            if keep:
                done = sum(shard.samples for shard in self._shards)
                kept = f"{done} samples in {len(self._shards)} finished shards are kept in {self._place.folder}"
                self._note(f"{kept}: the same command goes on with them")

    def result(self) -> Manifest:
        """Return the manifest, after the ``with`` block."""
        if self.manifest is None:
            raise RuntimeError("the writer has not finished")
        return self.manifest

    def _resume(self, place: Workplace) -> None:
        if self._identity is None:
            place.begin()
            return
        started = place.started
        for finished in place.resume(self._identity, self.threads):
            self._shards.append(finished.shard)
            self.samples += finished.shard.samples
            self.items_done = finished.items
            self._bytes += finished.shard.bytes
            self._note_skipped(finished.skipped)
        if self._shards:
            shards = f"{len(self._shards)} finished shards of {place.folder}"
            self._note(f"going on after {self.samples} samples in {shards}")
            self._tell()
        elif started:
            self._note(f"{place.folder} holds nothing that fits these settings and source files: starting anew")

    def _open_shard(self) -> None:
        from webdataset import TarWriter

        assert self._place is not None
        self._file = _HashedFile(self._place.set / f"shard-{len(self._shards):06d}.tar")
        self._tar = TarWriter(self._file, user="vitgraft", group="vitgraft", mtime=0, encoder=False)
        self._offsets = []

    def _close_shard(self, last: bool = False) -> None:
        assert self._file is not None
        assert self._place is not None
        self._offsets.append(self._tar.tarstream.offset)
        self._tar.close()
        tar, self._tar = self._file, None
        tar.close()
        self._file = _HashedFile(tar.path.with_suffix(".idx"))
        self._file.write(np.asarray(self._offsets, dtype="<u8").tobytes())
        self._file.close()
        shard = Shard(
            name=tar.path.name,
            samples=len(self._offsets) - 1,
            bytes=tar.bytes,
            sha256=tar.sha256(),
            index_sha256=self._file.sha256(),
        )
        sync_folder(self._place.set)
        if self._identity is not None:
            identity = self._identity.advance(self.items_done)
            finished = Finished(shard=shard, items=self.items_done, skipped=self._skipped, identity=identity, last=last)
            self._place.append(finished)
        self._shards.append(shard)
        self._bytes += tar.bytes
        self._file, self._offsets, self._skipped = None, [], []

    def _finish(self, place: Workplace) -> None:
        if self._tar is not None:
            self._close_shard(last=True)
        if not self.samples:
            raise DataError(f"{self.out}: the data set is empty: no sample was found to pack; check the arguments")
        # Names of files may hold bytes that are no characters, which no manifest can.
        source = json.loads(json.dumps(self.source, ensure_ascii=False).encode("utf-8", "replace"))
        manifest = make_manifest(self.kind, self.classes, self.category_ids, self._shards, source)
        with create(place.set / MANIFEST) as stream:
            stream.write(dump_manifest(manifest).encode())
            sync(stream)
        sync_folder(place.set)
        place.publish()
        self.manifest = manifest

    def _note_skipped(self, reasons: list[str]) -> None:
        if reasons:
            self.source["skipped"] = [*self.source.get("skipped", []), *reasons]

    def _note(self, text: str) -> None:
        if self.say is not None:
            self.say(text)

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.items_done, max(self.total, self.items_done))

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not self.out.is_dir():
            raise ConfigError(f"{self.out}: exists and is not a folder; choose another --out")
        names = os.listdir(self.out)
        foreign = sorted(name for name in names if not _OURS.match(name))
        if foreign:
            raise ConfigError(f"{self.out}: holds {foreign[0]!r}, which is no part of a data set; choose another --out")
        if names and not self.overwrite:
            raise ConfigError(f"{self.out}: already holds a data set; choose another --out or pass --overwrite")

    def _os_error(self, error: OSError) -> DataError:
        if error.errno not in _NO_SPACE:
            return DataError(f"{self.out}: cannot be written: {error.strerror}; check path and permissions")
        written = self._bytes + (self._tar.tarstream.offset if self._tar is not None else 0)
        need = written * max(self.total, 1) // self.items_done if self.items_done else written
        return DataError(
            f"{self.out}: disk full after {self.samples} samples ({written >> 20} MB); the data set needs about "
            f"{max(need >> 20, 1)} MB: free some space or choose another --out"
        )


def check_sample(members: dict[str, bytes], where: str) -> None:
    """Raises DataError for a sample, JSON included, that is larger in its tar than a reader takes."""
    size = sum(BLOCKSIZE + -(-len(data) // BLOCKSIZE) * BLOCKSIZE for data in members.values())
    if size > MAX_SAMPLE_BYTES:
        raise DataError(f"{where}: a sample of {size} bytes, more than {MAX_SAMPLE_BYTES}; split it or leave it out")


class _HashedFile:
    """A new file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self._stream: BinaryIO | None = create(path)
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Append; after :meth:`drop`, nothing: closing a tar writes its end, perhaps to a full disk."""
        if self._stream is not None:
            self._stream.write(data)
            self._digest.update(data)
            self.bytes += len(data)
        return len(data)

    def close(self) -> None:
        """Close it once it is on the disk."""
        assert self._stream is not None
        sync(self._stream)
        self._stream.close()
        self._stream = None

    def drop(self) -> None:
        """Close and remove it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
                stream.close()

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes written (hex)."""
        return self._digest.hexdigest()
