"""Durable files: written and hashed at once, fsync of files and folders, atomic replacement.

Everything that changes a run's checkpoints on the disk goes through these few functions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitgraft.trainer.checkpoint.image import lay_out
from vitgraft.trainer.checkpoint.layout import FileRecord

_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_CHUNK = 8 << 20


def write_hashed(path: Path, blocks: Sequence[memoryview]) -> FileRecord:
    """Write a new file from its blocks, fsync it, and hash the blocks in another thread meanwhile: both let go of the
    interpreter's lock, so the slower of the two decides.

    Raises:
        OSError: e.g. a full disk; the file is then incomplete and the caller discards its folder.
    """
    path.unlink(missing_ok=True)  # what a killed writer left
    failed = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_hash, blocks, failed)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                for block in blocks:
                    _write(descriptor, block)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            failed.set()
            raise
        return FileRecord(path=path.name, bytes=sum(map(len, blocks)), sha256=digest.result())


def _write(descriptor: int, block: memoryview) -> None:
    start = 0
    while start < len(block):
        start += os.write(descriptor, block[start : start + _CHUNK])


def _hash(blocks: Sequence[memoryview], stop: threading.Event) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        for start in range(0, len(block), _CHUNK):
            if stop.is_set():
                return ""
            digest.update(block[start : start + _CHUNK])
    return digest.hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> FileRecord:
    """Write a safetensors file, hashing while writing, and fsync it.

    The library's own writer would need the bytes twice (once to write, once to hash).

    Raises:
        OSError: as in :func:`write_hashed`.
    """
    image = lay_out({key: (_DTYPES[str(value.dtype)], value.shape) for key, value in tensors.items()})
    # In the image's order; ascontiguousarray makes 0-d arrays 1-d, which only the header must not.
    arrays = [np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8) for key in image.offsets]
    return write_hashed(path, [memoryview(image.header), *(memoryview(array.data) for array in arrays)])


def write_text_durably(path: Path, text: str) -> None:
    """Write a text file and fsync it."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, so that their names outlive a power failure."""
    if not path.is_dir():
        make_folders(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_text_durably(temporary, text)
    os.replace(temporary, path)
    sync_folder(path.parent)


def rename_durably(old: Path, new: Path) -> None:
    """Give a file or folder its final name in the same parent folder."""
    os.rename(old, new)
    sync_folder(new.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    shutil.rmtree(path, onerror=_unless_gone)


def _unless_gone(function: object, path: object, information: tuple[object, BaseException, object]) -> None:
    if not isinstance(information[1], FileNotFoundError):
        raise information[1]


def sync_file(path: Path) -> None:
    """Make what was written to a file durable, whoever wrote it."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
