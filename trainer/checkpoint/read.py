"""Find, verify and read checkpoints. A reader trusts a manifest, never a directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.hashing import sha256_file
from vitgraft.trainer.checkpoint.layout import (
    BUFFERS,
    EMA,
    MANIFEST,
    MASTER,
    SCHEMA,
    Manifest,
    expected_files,
    intersections,
    parse_range_key,
    parse_step,
)

MAX_MANIFEST_BYTES = 64 << 20


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
            stream = (self.path / MANIFEST).open("rb")
        except OSError as error:
            raise CheckpointError(f"{self.path / MANIFEST}: cannot be read: {error.strerror}") from None
        with stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest and check that its files are there with the right sizes (hashes: :func:`verify`).

    Raises:
        CheckpointError: not a complete checkpoint; says what is wrong.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path}: no {MANIFEST}, so this is not a committed checkpoint")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise CheckpointError(
            f"{file}: not a manifest: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}"
        ) from None
    if manifest.schema_version != SCHEMA:
        raise CheckpointError(
            f"{file}: schema {manifest.schema_version}, this vitgraft reads {SCHEMA}; use a matching one"
        )
    if sorted(record.path for record in manifest.files) != sorted(expected_files(manifest.world)):
        raise CheckpointError(f"{file}: does not list the files of a world of {manifest.world}")
    for record in manifest.files:
        found = (path / record.path).stat().st_size if (path / record.path).is_file() else None
        if found != record.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{path / record.path}: {state}, the manifest says {record.bytes} bytes")
    if parse_step(path.name) not in (None, manifest.step):
        raise CheckpointError(f"{path}: the manifest is of step {manifest.step}")
    return Checkpoint(path, manifest)


def verify(checkpoint: Checkpoint) -> None:
    """Hash every file of the checkpoint and its frozen blob.

    Raises:
        CheckpointError: names the first file that differs.
    """
    for record in checkpoint.manifest.files:
        file = checkpoint.path / record.path
        if _hash(file) != record.sha256:
            raise CheckpointError(f"{file}: SHA-256 differs from the manifest: the file was damaged after the commit")
    if checkpoint.manifest.frozen is not None:
        blob = blob_path(checkpoint.run, checkpoint.manifest.frozen)
        if not blob.is_file():
            raise CheckpointError(f"{blob}: missing; it holds the frozen trunk of {checkpoint.path.name}")
        if _hash(blob) != checkpoint.manifest.frozen:
            raise CheckpointError(f"{blob}: SHA-256 differs from its name: the frozen trunk was damaged")


def _hash(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def blob_path(run: Path, digest: str) -> Path:
    """Where a blob lies."""
    return run / "blobs" / digest


def scan(run: Path) -> list[tuple[Path, Checkpoint | CheckpointError]]:
    """Every checkpoint folder of a run, oldest first, opened or with what is wrong with it."""
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
    """Checkpoints whose manifest and file sizes are right, oldest first."""
    return [found for _, found in scan(run) if isinstance(found, Checkpoint)]


def newest_valid(run: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose hashes are right, and the invalid ones that are newer, with reasons.

    The pointer file is only a hint for people and tools: a kill between rename and pointer must not lose a checkpoint.
    """
    invalid: list[tuple[Path, str]] = []
    for path, found in reversed(scan(run)):
        if isinstance(found, CheckpointError):
            invalid.append((path, str(found)))
            continue
        try:
            verify(found)
        except CheckpointError as error:
            invalid.append((path, str(error)))
            continue
        return found, invalid
    return None, invalid


def resolve_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that RUN or CHECKPOINT on the command line means: of a run, the newest valid one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (path / MANIFEST).is_file():
        checkpoint = open_checkpoint(path)
        verify(checkpoint)
        return checkpoint
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    found, invalid = newest_valid(path)
    if found is None:
        why = f"; the newest: {invalid[0][1]}" if invalid else ""
        raise CheckpointError(f"{path}: no valid checkpoint under checkpoints/{why}")
    return found


class VectorReader:
    """Reads ranges of the named flat vectors of a checkpoint, whatever world wrote them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._handles: list[Any] = []
        self._index: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        for number, record in enumerate(r for r in checkpoint.manifest.files if r.path != BUFFERS):
            handle = open_safetensors(checkpoint.path / record.path)
            self._handles.append(handle)
            for key in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                kind, name, start = parse_range_key(key)
                length = handle.get_slice(key).get_shape()[0]
                self._index.setdefault((kind, name), []).append((start, start + length, number))
        for ranges in self._index.values():
            ranges.sort()
        self.path = checkpoint.path

    def read(self, kind: str, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Elements [start, stop) of a vector, float32.

        Raises:
            CheckpointError: the vector is absent or has a gap.
        """
        ranges = self._index.get((kind, name))
        if ranges is None:
            raise CheckpointError(
                f"{self.path}: holds no {kind} of parameter {name}: it is of another model or optimizer"
            )
        out = np.empty(stop - start, np.float32)
        where = f"{self.path}: {kind} of {name}"
        for index, low, high in intersections([(a, b) for a, b, _ in ranges], start, stop, where):
            first, _, number = ranges[index]
            piece = self._handles[number].get_slice(f"{kind}|{name}|{first}")[low - first : high - first]
            out[low - start : high - start] = piece
        return out


def open_safetensors(path: Path) -> Any:
    """A safetensors file as numpy arrays.

    Raises:
        CheckpointError: not a readable safetensors file.
    """
    try:
        return safe_open(str(path), framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None


def read_all(path: Path) -> dict[str, NDArray[np.generic]]:
    """Every tensor of a safetensors file."""
    handle = open_safetensors(path)
    return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118


def read_weights(checkpoint: Checkpoint, *, ema: bool = True) -> dict[str, NDArray[np.generic]]:
    """The whole state of the model: trained weights (the average where there is one), frozen weights and buffers.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    manifest = checkpoint.manifest
    kind = EMA if ema and EMA in manifest.kinds else MASTER
    reader = VectorReader(checkpoint)
    state: dict[str, NDArray[np.generic]] = {}
    for name, shape in manifest.parameters.items():
        numel = int(np.prod(shape, dtype=np.int64))
        state[name] = reader.read(kind, name, 0, numel).reshape(shape)
    if manifest.frozen is not None:
        state.update(read_all(blob_path(checkpoint.run, manifest.frozen)))
    state.update(read_all(checkpoint.path / BUFFERS))
    return state
