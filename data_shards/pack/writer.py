"""Write a packed data set so that a half-written one can never be taken for a whole one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.hashing import canonical_json, sha256_file
from vitgraft.data_shards.manifest import MANIFEST, Kind, Manifest, Shard, dump_manifest, make_manifest

Progress = Callable[[int, int], None]
"""Called as progress(samples done, samples in all)."""

_OURS = re.compile(r"^(manifest\.json|shard-\d+\.(tar|idx))$")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class DatasetWriter:
    """Context manager: packs beside ``out``, writes the manifest last, and renames the folder to ``out`` at the end.

    On any exception, an interrupt too, the temporary folder is removed. The bytes depend on the samples alone: no
    times, users or host names are stored.

    Args:
        out: the folder to make.
        kind, classes, category_ids: as in the manifest.
        source: free description for the manifest; it may be filled until the end of the ``with`` block.
        total: samples expected in all, for progress and for the estimate in a disk-full error.
        samples_per_shard, shard_bytes: a shard is closed when it reaches either.

    Raises:
        ConfigError: ``out`` holds a data set and ``overwrite`` is false, or holds files that are not ours.
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
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard is {samples_per_shard}; give at least 1")
        # realpath-free: a link named by the user stays where it is.
        self.out = Path(os.path.abspath(out))
        self.kind, self.classes, self.category_ids = kind, classes, category_ids
        self.source: dict[str, Any] = source if source is not None else {}
        self.total, self.overwrite, self.progress = total, overwrite, progress
        self.samples_per_shard, self.shard_bytes = samples_per_shard, shard_bytes
        self.samples = 0
        self.manifest: Manifest | None = None
        self._shards: list[Shard] = []
        self._bytes = 0
        self._offsets: list[int] = []
        self._file: BinaryIO | None = None
        self._tar: Any = None
        self._temporary = self.out.with_name(f"{self.out.name}.tmp-{socket.gethostname()}.{os.getpid()}")

    def __enter__(self) -> DatasetWriter:
        self._refuse_existing()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._temporary.mkdir()
        except OSError as error:
            raise self._os_error(error) from None
        return self

    def add(self, members: dict[str, bytes], metadata: dict[str, Any]) -> None:
        """Append one sample: ``members`` by extension (without the dot), ``metadata`` as its JSON."""
        try:
            if self._tar is None:
                self._open_shard()
            self._offsets.append(self._tar.tarstream.offset)
            text = canonical_json(metadata).encode()
            self._tar.write({"__key__": f"{self.samples:09d}", **members, "json": text})
            self.samples += 1
            if len(self._offsets) >= self.samples_per_shard or self._tar.tarstream.offset >= self.shard_bytes:
                self._close_shard()
        except OSError as error:
            raise self._os_error(error) from None
        if self.progress is not None:
            self.progress(self.samples, max(self.total, self.samples))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if error is None:
                self._finish()
                finished = True
        except OSError as failure:
            raise self._os_error(failure) from None
        finally:
            if not finished:
                self._abandon()

    def result(self) -> Manifest:
        """The manifest, after the ``with`` block."""
        if self.manifest is None:
            raise RuntimeError("the writer has not finished")
        return self.manifest

    def _open_shard(self) -> None:
        from webdataset import TarWriter

        path = self._temporary / f"shard-{len(self._shards):06d}.tar"
        self._file = path.open("wb")
        self._tar = TarWriter(self._file, user="vitgraft", group="vitgraft", mtime=0, encoder=False)
        self._offsets = []

    def _close_shard(self) -> None:
        assert self._file is not None
        self._offsets.append(self._tar.tarstream.offset)
        self._tar.close()
        _sync(self._file)
        self._file.close()
        tar = Path(self._file.name)
        self._tar = self._file = None
        index = tar.with_suffix(".idx")
        with index.open("wb") as stream:
            stream.write(np.asarray(self._offsets, dtype="<u8").tobytes())
            _sync(stream)
        size = tar.stat().st_size
        self._bytes += size
        self._shards.append(
            Shard(
                name=tar.name,
                samples=len(self._offsets) - 1,
                bytes=size,
                sha256=sha256_file(tar),
                index_sha256=sha256_file(index),
            )
        )
        self._offsets = []

    def _finish(self) -> None:
        if self._tar is not None:
            self._close_shard()
        if not self.samples:
            raise DataError(f"{self.out}: the data set is empty: no sample was found to pack; check the arguments")
        manifest = make_manifest(self.kind, self.classes, self.category_ids, self._shards, self.source)
        with (self._temporary / MANIFEST).open("wb") as stream:
            stream.write(dump_manifest(manifest).encode())
            _sync(stream)
        _sync_folder(self._temporary)
        aside = self.out.with_name(self._temporary.name.replace(".tmp-", ".old-"))
        if self.out.exists():
            os.rename(self.out, aside)
        os.rename(self._temporary, self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(aside, ignore_errors=True)
        self.manifest = manifest

    def _abandon(self) -> None:
        if self._file is not None:
            # Closing a tar writes its end, perhaps to a full disk: let it go nowhere.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
            with contextlib.suppress(OSError, ValueError):
                if self._tar is not None:
                    self._tar.close()
                self._file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

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

    def _sweep(self) -> None:
        """Remove what dead packers of this host left; put a set back whose replacement died between two renames."""
        pattern = re.compile(re.escape(f"{self.out.name}") + r"\.(tmp|old)-(.+)\.(\d+)$")
        for path in self.out.parent.iterdir():
            match = pattern.match(path.name)
            if match is None or match[2] != socket.gethostname() or _alive(int(match[3])):
                continue
            if match[1] == "old" and not self.out.exists():
                os.rename(path, self.out)
                self._refuse_existing()
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _os_error(self, error: OSError) -> DataError:
        if error.errno not in _NO_SPACE:
            return DataError(f"{self.out}: cannot be written: {error.strerror}; check path and permissions")
        written = self._bytes + (self._tar.tarstream.offset if self._tar is not None else 0)
        need = written * max(self.total, 1) // self.samples if self.samples else written
        return DataError(
            f"{self.out}: disk full after {self.samples} samples ({written >> 20} MB); the data set needs about "
            f"{max(need >> 20, 1)} MB: free some space or choose another --out"
        )


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
