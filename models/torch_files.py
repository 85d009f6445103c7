"""Files that ``torch.save`` writes, and pickles of arrays, read as data: zip archives and the format before them.

Nothing here calls torch's own reader, which builds whatever objects it is allowed to. The content of the pickle inside
is read by :mod:`vitgraft.models.pickles`; a storage is read when a tensor asks for it, once.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from vitgraft.models.pickles import BoundedStream, PickleError, read_pickle
from vitgraft.models.tensor_records import Storages, TensorError, storage_dtype

MAX_INFLATION = 8
"""Largest ratio of the members' total size to the file's. torch does not compress, but repacked files may be."""
MAX_DIRECTORY_BYTES = 16 << 20
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_CHUNK = 1 << 20


class Content(NamedTuple):
    """Content of a file: the values as :func:`read_pickle` returns them, and the storages of their tensors."""

    value: Any
    storages: Storages


class UnreadableError(ValueError):
    """File whose format does not match its name; the message continues "FILE is "."""


def read_archive(file: BinaryIO) -> Content:
    """Read the zip archive of ``torch.save``.

    Raises:
        UnreadableError: an archive of something else.
        PickleError, zipfile.BadZipFile: damaged, or larger inside than a bounded multiple of the file.
    """
    size = os.fstat(file.fileno()).st_size
    archive = zipfile.ZipFile(_Directory(file))
    members = {member.filename: member for member in archive.infolist()}
    inside = sum(member.file_size for member in archive.infolist())
    if inside > MAX_INFLATION * size:
        raise PickleError(f"{size:,} bytes that unpack to {inside:,}, more than {MAX_INFLATION} times as many")
    root = next((n.removesuffix("data.pkl") for n in members if n == "data.pkl" or n.endswith("/data.pkl")), None)
    if root is None:
        what = "an .npz file of numpy arrays" if any(n.endswith(".npy") for n in members) else "a zip archive"
        raise UnreadableError(f"{what}, not a file of torch.save; save a state dict as .safetensors")
    if f"{root}constants.pkl" in members or any(n.startswith(f"{root}code/") for n in members):
        raise UnreadableError("a TorchScript program; load it with torch.jit.load and save its state_dict()")
    if f"{root}byteorder" in members and _member(archive, members[f"{root}byteorder"]) != b"little":
        raise UnreadableError("written on a big-endian machine; save it again as .safetensors")
    value = read_pickle(io.BytesIO(_member(archive, members[f"{root}data.pkl"])))
    read: dict[str, Tensor] = {}

    def storage(reference: Any) -> Tensor:
        dtype, key, count, _ = _storage(reference)
        name = f"{root}data/{key}"
        if key not in read:
            if name not in members:
                raise TensorError(f"a storage {key[:100]!r} that is not in the archive")
            if members[name].file_size != count * dtype.itemsize:
                raise TensorError(f"a storage {key[:100]!r} of another size than its tensor says")
            read[key] = _elements(_member(archive, members[name]), dtype)
        if read[key].dtype != dtype or len(read[key]) != count:
            raise TensorError(f"a storage {key[:100]!r} that is two things at once")
        return read[key]

    return Content(value, storage)


def read_stream(file: BinaryIO) -> Content:
    """Read a pickle of arrays, or what torch wrote before its zip archives: pickles, and the storages behind them.

    Raises:
        PickleError: damaged.
    """
    stream = BoundedStream(file, os.fstat(file.fileno()).st_size)
    value = read_pickle(stream)
    if value != _MAGIC:
        return Content(value, _no_storage)
    if read_pickle(stream) != _PROTOCOL:
        raise PickleError("another version of torch's old format")
    system = read_pickle(stream)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UnreadableError("written on a big-endian machine; save it again as .safetensors")
    references: list[Any] = []
    value = read_pickle(stream, references)
    keys = read_pickle(stream)
    dtypes = {key: dtype for dtype, key, _, _ in map(_storage, references)}
    places = _places(file, stream, keys, dtypes)
    read: dict[str, Tensor] = {}

    def storage(reference: Any) -> Tensor:
        dtype, key, _, view = _storage(reference)
        if key not in places or dtypes[key] != dtype:
            raise TensorError(f"a storage {key[:100]!r} that is not in the file")
        if key not in read:
            file.seek(places[key][0])
            read[key] = _elements(_exactly(file, places[key][1] * dtype.itemsize), dtype)
        if view is None:
            return read[key]
        start, length = view
        if start + length > len(read[key]):
            raise TensorError(f"a part of storage {key[:100]!r} that reaches beyond it")
        return read[key][start : start + length]

    return Content(value, storage)


class _Directory(io.RawIOBase):
    """A file for ``zipfile``, which reads the whole directory at once, however large the file says that it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of more than {MAX_DIRECTORY_BYTES:,} bytes")
        return self._file.read(count if count >= 0 else MAX_DIRECTORY_BYTES)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytearray:
    with archive.open(member) as stream:
        return _exactly(stream, member.file_size)


def _exactly(stream: Any, count: int) -> bytearray:
    """Return ``count`` bytes, which the caller has held against the file's size."""
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count and (got := stream.readinto(view[filled : filled + _CHUNK])):
        filled += got
    if filled < count or stream.read(1 if isinstance(stream, zipfile.ZipExtFile) else 0):
        raise PickleError(f"{filled:,} bytes where {count:,} are announced")
    return data


def _elements(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _storage(reference: Any) -> tuple[torch.dtype, str, int, tuple[int, int] | None]:
    """Return (type, key, number of elements, part) of a reference ``("storage", class, key, device, number[,
    part])``."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
        raise TensorError("a tensor in a storage of another kind than torch's")
    _, kind, key, _, count, *rest = reference
    if not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 62:
        raise TensorError("a storage without a name or size")
    view: tuple[int, int] | None = None
    if rest and rest[0] is not None:
        part = rest[0]
        if not isinstance(part, tuple) or len(part) != 3 or not all(type(n) is int and n >= 0 for n in part[1:]):
            raise TensorError(f"a part of storage {key[:100]!r} that is none")
        view = (part[1], part[2])
    return storage_dtype(kind), key, count, view


def _places(
    file: BinaryIO, stream: BoundedStream, keys: Any, dtypes: dict[str, torch.dtype]
) -> dict[str, tuple[int, int]]:
    """Return (byte offset, number of elements) of each storage of the old format, by its key.

    Raises:
        PickleError: a storage without a tensor, or a file that is too short.
    """
    places: dict[str, tuple[int, int]] = {}
    size = os.fstat(file.fileno()).st_size
    if not isinstance(keys, list):
        raise PickleError("no list of storages")
    for key in keys:
        if not isinstance(key, str) or key not in dtypes:
            raise PickleError("a storage that no tensor names")
        head = stream.read(8)
        count = struct.unpack("<q", head)[0] if len(head) == 8 else -1
        begin = file.tell()
        if count < 0 or begin + count * dtypes[key].itemsize > size:
            raise PickleError("fewer bytes than its storages need")
        places[key] = (begin, count)
        file.seek(begin + count * dtypes[key].itemsize)
    return places


def _no_storage(reference: Any) -> Tensor:
    raise TensorError("a tensor of torch without its storage")
