"""Find, verify and read checkpoints. A reader trusts a manifest, never a directory."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import reprlib
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from vitgraft.configs.cores import usable_cores
from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.files import open_regular
from vitgraft.configs.hashing import sha256_file
from vitgraft.trainer.checkpoint.layout import (
    BUFFERS,
    EMA,
    MANIFEST,
    MASTER,
    Manifest,
    expected_files,
    intersections,
    parse_range_key,
    parse_step,
    range_key,
)
from vitgraft.trainer.checkpoint.manifest import read_manifest
from vitgraft.trainer.checkpoint.shard_file import OF_THE_FILE, ShardFile, open_safetensors

Weights = Literal["ema", "raw"]
"""The average of the weights, or the weights themselves."""
MAX_HASH_THREADS = 16
_MAX_DIMENSIONS = 32
PAUSES_S = (1.0, 2.0, 4.0)
"""Before a file that its storage refuses to give is tried again: for that alone no newest checkpoint is put aside."""
READ_THREADS = 4
"""Of each rank: reading is the kernel's work, and ranks share a host."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its manifest. ``run`` is the run directory that holds its blobs."""

    path: Path
    manifest: Manifest

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.path.parent.parent

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold a shared lock, so that retention leaves this checkpoint alone."""
        try:
            descriptor = open_regular(self.path / MANIFEST)
        except OSError as error:
            raise CheckpointError(f"{self.path / MANIFEST}: cannot be read: {error.strerror}") from None
        try:
            # Where there are no locks, retention cannot take one either, and deletes nothing.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest and check that its files are there with the right sizes (hashes: :func:`verify`).

    Raises:
        CheckpointError: not a complete checkpoint; says what is wrong.
    """
    file = path / MANIFEST
    manifest = read_manifest(file)
    if sorted(record.path for record in manifest.files) != sorted(expected_files(manifest.world)):
        raise CheckpointError(f"{file}: does not list the files of a world of {manifest.world}")
    for record in manifest.files:
        found = _bytes_of(path / record.path)
        if found != record.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{path / record.path}: {state}, the manifest says {record.bytes} bytes")
    if parse_step(path.name) not in (None, manifest.step):
        raise CheckpointError(f"{file}: the manifest is of step {manifest.step}")
    _check_sizes(file, manifest)
    return Checkpoint(path, manifest)


def _check_sizes(file: Path, manifest: Manifest) -> None:
    """Refuse shapes that the files cannot hold, before memory is taken for them."""
    room = sum(record.bytes for record in manifest.files if record.path != BUFFERS) // 4
    needed = 0
    for name, shape in manifest.parameters.items():
        needed += len(manifest.kinds) * math.prod(shape)
        # A dimension of zero hides the others.
        if len(shape) > _MAX_DIMENSIONS or needed > room or math.prod(filter(None, shape)) >= 1 << 40:
            raise CheckpointError(
                f"{file}: parameter {name} of shape {reprlib.repr(shape)} does not fit into the checkpoint's files; "
                "it was not written by vitgraft"
            )


def verify(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None, *, trusted: set[Path] | None = None
) -> None:
    """Hash every file of the checkpoint and its frozen blob, several at a time.

    Args:
        progress: called with the bytes hashed and all bytes after each file.
        trusted: blobs that were hashed for another checkpoint of the run and need not be again; this one's is added.

    Raises:
        CheckpointError: names the first file that differs.
    """
    expected = {checkpoint.path / record.path: record.sha256 for record in checkpoint.manifest.files}
    frozen = checkpoint.manifest.frozen
    if frozen is not None:
        blob = blob_path(checkpoint.run, frozen)
        if not blob.is_file():
            raise CheckpointError(f"{blob}: missing; it holds the frozen trunk of {checkpoint.path.name}")
        if blob not in (trusted or ()):
            expected[blob] = frozen
    # hashlib lets other threads run; the largest files start first, so that none is left over at the end.
    files = sorted(expected, key=_size, reverse=True)
    done, total = 0, sum(map(_size, files))
    with ThreadPoolExecutor(min(len(files), usable_cores(), MAX_HASH_THREADS)) as pool:
        for file, digest in zip(files, pool.map(_hash, files), strict=True):
            if digest != expected[file]:
                pool.shutdown(wait=False, cancel_futures=True)
                raise CheckpointError(_differs(file, file.parent != checkpoint.path))
            done += _size(file)
            if progress is not None:
                progress(done, total)
            if trusted is not None and file.parent != checkpoint.path:
                trusted.add(file)


def _differs(file: Path, blob: bool) -> str:
    if blob:
        return f"{file}: SHA-256 differs from its name: the frozen trunk was damaged"
    return f"{file}: SHA-256 differs from the manifest: the file was damaged after the commit"


def _hash(file: Path) -> str:
    pauses = iter(PAUSES_S)
    while True:
        try:
            return sha256_file(file)
        except OSError as error:
            pause = None if isinstance(error, OF_THE_FILE) else next(pauses, None)
            if pause is None:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
            time.sleep(pause)


def _bytes_of(file: Path) -> int | None:
    """Return a file's size; ``None``: absent, or deleted meanwhile by retention."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # gone in the meantime: hashing it says so


def blob_path(run: Path, digest: str) -> Path:
    """Return the path of a blob."""
    return run / "blobs" / digest


def scan(run: Path) -> list[tuple[Path, Checkpoint | CheckpointError]]:
    """Return every checkpoint folder of a run, oldest first, with the opened checkpoint or its error."""
    folder = run / "checkpoints"
    found: list[tuple[int, Path]] = []
    if folder.is_dir():
        for entry in folder.iterdir():
            step = parse_step(entry.name)
            if step is not None and entry.is_dir():
                found.append((step, entry))
    result: list[tuple[Path, Checkpoint | CheckpointError]] = []
    for _, path in sorted(found):
        try:
            result.append((path, open_checkpoint(path)))
        except CheckpointError as error:
            result.append((path, error))
    return result


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """Return the checkpoints whose manifest and file sizes are right, oldest first."""
    return [found for _, found in scan(run) if isinstance(found, Checkpoint)]


def newest_valid(run: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint whose hashes are right, and the invalid ones that are newer, with reasons.

    The pointer file is only a hint for people and tools: a kill between rename and pointer must not lose a checkpoint.
    """
    invalid: list[tuple[Path, str]] = []
    trusted: set[Path] = set()
    for path, found in reversed(scan(run)):
        if isinstance(found, CheckpointError):
            invalid.append((path, str(found)))
            continue
        try:
            verify(found, trusted=trusted)
        except CheckpointError as error:
            invalid.append((path, str(error)))
            continue
        return found, invalid
    return None, invalid


def resolve_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint of RUN or CHECKPOINT on the command line: of a run, the newest valid one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (path / MANIFEST).is_file():
        checkpoint = open_checkpoint(path)
        verify(checkpoint)
        return checkpoint
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if not (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: no checkpoints/ in it; name a run that has committed one, or a checkpoint")
    found, invalid = newest_valid(path)
    if found is None:
        why = f"; the newest: {invalid[0][1]}" if invalid else ""
        raise CheckpointError(f"{path}: no valid checkpoint under checkpoints/{why}")
    return found


class VectorReader:
    """Reads ranges of the named flat vectors of a checkpoint, whatever world wrote them.

    Only headers are read at first; :meth:`read` touches the bytes it returns and no others.

    Raises:
        CheckpointError: a shard holds something else than float32 ranges of the manifest's vectors, or one range twice.
        TrainingError: the storage of a shard fails.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self._files: list[ShardFile] = []
        self._index: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        manifest = checkpoint.manifest
        sizes = {name: math.prod(shape) for name, shape in manifest.parameters.items()}
        for number, record in enumerate(r for r in manifest.files if r.path != BUFFERS):
            file = checkpoint.path / record.path
            self._files.append(ShardFile(file))
            for key, stored in self._files[-1].tensors.items():
                kind, name, start = parse_range_key(key)
                shape, dtype = list(stored.shape), stored.dtype
                if kind not in manifest.kinds or name not in sizes:
                    raise CheckpointError(f"{file}: {key}: the manifest knows no such vector")
                if dtype != "F32" or len(shape) != 1:
                    raise CheckpointError(f"{file}: {key}: {dtype} of shape {shape}; expected a flat range of F32")
                stop = start + shape[0]
                if stop > sizes[name]:
                    raise CheckpointError(f"{file}: {key}: reaches to {stop}, but {name} has {sizes[name]} elements")
                self._index.setdefault((kind, name), []).append((start, stop, number))
        for (kind, name), ranges in self._index.items():
            ranges.sort()
            for (_, end, _), (start, _, _) in pairwise(ranges):
                if start < end:
                    raise CheckpointError(f"{self.path}: two shards hold element {start} of {kind} of {name}")

    def read(self, kind: str, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return the elements [start, stop) of a vector, float32.

        Raises:
            CheckpointError, TrainingError: as in :meth:`fill`.
        """
        out = np.empty(stop - start, np.float32)
        self.fill([(kind, name, start, out)])
        return out

    def fill(self, wanted: Iterable[tuple[str, str, int, NDArray[np.float32]]]) -> None:
        """Read ranges into contiguous arrays, several at a time: (kind, parameter, first element, array), each of as
        many elements as its array has.

        Raises:
            CheckpointError: a vector is absent or has a gap, or its file is damaged.
            TrainingError: the storage of a shard fails.
        """
        pieces: dict[int, list[tuple[int, NDArray[np.float32]]]] = {}
        for kind, name, start, out in wanted:
            ranges, stop = self._index.get((kind, name), []), start + len(out)
            if not ranges and start < stop:
                raise CheckpointError(
                    f"{self.path}: holds no {kind} of parameter {name}: it is of another model or optimizer"
                )
            where = f"{self.path}: {kind} of {name}"
            for index, low, high in intersections([(a, b) for a, b, _ in ranges], start, stop, where):
                first, _, number = ranges[index]
                offset = self._files[number].tensors[range_key(kind, name, first)].offset + 4 * (low - first)
                pieces.setdefault(number, []).append((offset, out[low - start : high - start]))
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for number, of_file in pieces.items():
                self._files[number].read(of_file, pool)


def read_all(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return every tensor of a safetensors file.

    Raises:
        CheckpointError: not a readable safetensors file, or of a type that numpy does not know.
        TrainingError: its storage fails.
    """
    handle = open_safetensors(path)
    try:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds a tensor that cannot be read: {error}") from None


def choose_weights(checkpoint: Checkpoint, wanted: Weights | None) -> Weights:
    """Return the kind of weights to use: ``wanted``, else the average where the checkpoint has one.

    Raises:
        ConfigError: the average is wanted, and there is none.
    """
    averaged = EMA in checkpoint.manifest.kinds
    if wanted == "ema" and not averaged:
        raise ConfigError(f"--weights ema: {checkpoint.path} holds no average (train.ema); use --weights raw")
    return wanted or ("ema" if averaged else "raw")


def read_weights(
    checkpoint: Checkpoint, *, ema: bool = True, places: Mapping[str, NDArray[np.float32]] | None = None
) -> dict[str, NDArray[np.generic]]:
    """Return the whole state of the model: trained weights (the average where there is one), frozen weights and
    buffers.

    Args:
        places: contiguous arrays, of the right shapes, for trained weights to be read into instead of into new ones.

    Raises:
        CheckpointError: incomplete or damaged.
        TrainingError: its storage fails.
    """
    manifest = checkpoint.manifest
    kind = EMA if ema and EMA in manifest.kinds else MASTER
    reader = VectorReader(checkpoint)
    weights = {name: np.empty(shape, np.float32) for name, shape in manifest.parameters.items()} | dict(places or {})
    reader.fill((kind, name, 0, weight.reshape(-1)) for name, weight in weights.items())
    state: dict[str, NDArray[np.generic]] = {**weights}
    if manifest.frozen is not None:
        state.update(read_all(blob_path(checkpoint.run, manifest.frozen)))
    state.update(read_all(checkpoint.path / BUFFERS))
    return state
