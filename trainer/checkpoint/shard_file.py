"""A shard on the disk: its header, and ranges of it read straight to where they belong."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vitgraft.configs.errors import CheckpointError, TrainingError, VitgraftError, cause_of

OF_THE_FILE = (EOFError, FileNotFoundError, IsADirectoryError, PermissionError)
"""Errors that are a file's own; others are its storage's, and may pass."""


def open_safetensors(path: Path) -> Any:
    """A safetensors file as numpy arrays. The library bounds the header (100 MB) and refuses tensors that overlap,
    leave gaps or reach beyond the file.

    Raises:
        CheckpointError: not a readable safetensors file.
        TrainingError: its storage fails.
    """
    try:
        path.open("rb").close()  # of all that may be wrong with it the library says that there is no such file
        return safe_open(str(path), framework="np")
    except OSError as error:
        raise _unreadable(path, error) from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None


def _unreadable(path: Path, error: OSError | EOFError) -> VitgraftError:
    """What the file is to blame for, a restart does not heal; what its storage is, e.g. a stale handle, it may."""
    if isinstance(error, OF_THE_FILE):
        return CheckpointError(f"{path}: cannot be read: {error}")
    return TrainingError(
        f"{path}: cannot be read: {error}; start again with the same command, and see to its storage if that goes on",
        cause=cause_of(error),
    )


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its type by safetensors's name, its shape, and where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class ShardFile:
    """The tensors of a safetensors file by key, and their bytes on demand.

    The library checks the header but copies all that it reads once more, which takes as long as reading it from the
    page cache, and gives no tensor's place; so the bytes are read here.

    Raises:
        CheckpointError, TrainingError: as in :func:`open_safetensors`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        keys = open_safetensors(path).keys()
        try:
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            self.tensors = {key: _stored(header[key], 8 + size) for key in keys}
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: changed while its header was read: {error}") from None

    def read(self, pieces: Sequence[tuple[int, NDArray[np.float32]]], pool: Executor) -> None:
        """Fill arrays, each from its offset in the file, several at a time.

        Raises:
            CheckpointError: the file is gone, may not be read or has become shorter.
            TrainingError: its storage fails.
        """
        try:
            with self.path.open("rb", buffering=0) as stream:
                list(pool.map(lambda piece: _fill(stream.fileno(), *piece), pieces))
        except (OSError, EOFError) as error:
            raise _unreadable(self.path, error) from None


def _stored(entry: dict[str, Any], start: int) -> Stored:
    return Stored(entry["dtype"], tuple(entry["shape"]), start + int(entry["data_offsets"][0]))


def _fill(descriptor: int, offset: int, out: NDArray[np.float32]) -> None:
    view, done = out.data.cast("B"), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(f"it ends at byte {offset + done}")
        done += count
