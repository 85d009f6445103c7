"""Durable files: safetensors written and hashed in one pass, fsync of files and folders, atomic replacement."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitgraft.trainer.checkpoint.layout import FileRecord

_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
_CHUNK = 1 << 22


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> FileRecord:
    """Write a safetensors file, hashing while writing, and fsync it.

    The library's own writer would need the bytes twice (once to write, once to hash); the format is eight bytes of
    length, a JSON header, and the tensors one behind the other.

    Raises:
        OSError: e.g. a full disk; the file is then incomplete and the caller discards its folder.
    """
    header: dict[str, object] = {}
    offset = 0
    arrays = {key: np.ascontiguousarray(value) for key, value in sorted(tensors.items())}
    for key, array in arrays.items():
        # ascontiguousarray makes 0-d arrays 1-d; the shape is the caller's.
        shape = list(tensors[key].shape)
        header[key] = {
            "dtype": _DTYPES[str(array.dtype)],
            "shape": shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as stream:
        for block in (len(text).to_bytes(8, "little"), text):
            stream.write(block)
            digest.update(block)
            size += len(block)
        for array in arrays.values():
            view = memoryview(array.reshape(-1).view(np.uint8).data)
            for start in range(0, len(view), _CHUNK):
                block_view = view[start : start + _CHUNK]
                stream.write(block_view)
                digest.update(block_view)
            size += len(view)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(path=path.name, bytes=size, sha256=digest.hexdigest())


def write_text_durably(path: Path, text: str) -> None:
    """Write a text file and fsync it."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_text_durably(temporary, text)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
