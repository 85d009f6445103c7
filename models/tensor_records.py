"""Tensors built from their records in a pickle (:mod:`vitgraft.models.pickles`): torch's and numpy's.

Everything that is used of a record is checked here: names against fixed tables, sizes against the bytes there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitgraft.models.pickles import Global, Persistent, Record

Storages = Callable[[Any], Tensor]
"""From the id of a storage, as torch writes it, to its elements (N,)."""

MAX_DIMENSIONS = 16
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_REBUILT = {Global("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2")}
_AROUND = {
    Global("torch._utils", "_rebuild_parameter"): 0,
    Global("torch._utils", "_rebuild_parameter_with_state"): 0,
    Global("torch.nn.parameter", "Parameter"): 0,
    Global("torch.nn.parameter", "Buffer"): 0,
}
"""Wrappers of a tensor → index of the tensor among their arguments."""
_SUBCLASS = Global("torch._tensor", "_rebuild_from_type_v2")
_ARRAYS = {Global(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
_BUFFERS = {Global(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
_DTYPE = Global("numpy", "dtype")
_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
_WRAPS = 4


class TensorError(ValueError):
    """A tensor that its file describes wrongly."""


def storage_dtype(name: Any) -> torch.dtype:
    """Return the type of the elements of a storage class that a pickle names.

    Raises ``TensorError`` for any but the plain numeric ones.
    """
    dtype = _DTYPES.get(name.name) if isinstance(name, Global) and name.module == "torch" else None
    if dtype is None:
        raise TensorError(f"a storage of the unknown type {str(name)[:100]}")
    return dtype


def is_tensor(value: Any) -> bool:
    """Tell whether a value read from a pickle is the record of a tensor or array that :func:`tensor_of` can build."""
    return _bare(value) is not None


def is_foreign_tensor(value: Any) -> bool:
    """Tell whether a value of a pickle is torch's record of a tensor that :func:`tensor_of` cannot build: of 8-bit
    floats, sparse, quantised, or without elements."""
    function = value.function if isinstance(value, Record) and not is_tensor(value) else None
    return isinstance(function, Global) and function.module == "torch._utils" and function.name.startswith("_rebuild_")


def tensor_of(value: Any, storages: Storages) -> Tensor:
    """Return the tensor that a record describes; torch's share the memory of their storage.

    Raises ``TensorError`` where :func:`is_tensor` is false, or where sizes and bytes do not fit each other.
    """
    record = _bare(value)
    if record is None:
        raise TensorError("no tensor")
    if record.function in _REBUILT:
        return _of_torch(record.args, storages)
    return _of_buffer(record.args) if record.function in _BUFFERS else _of_numpy(record.state)


def _bare(value: Any) -> Record | None:
    for _ in range(_WRAPS):
        if not isinstance(value, Record) or not isinstance(value.function, Global):
            return None
        if value.function in _REBUILT or value.function in _ARRAYS or value.function in _BUFFERS:
            return value
        if value.function in _AROUND and len(value.args) > _AROUND[value.function]:
            value = value.args[_AROUND[value.function]]
        elif value.function == _SUBCLASS and len(value.args) >= 3:  # function, type, arguments, state
            value = Record(value.args[0], value.args[2])
        else:
            return None
    return None


def _of_torch(args: Any, storages: Storages) -> Tensor:
    if not isinstance(args, tuple) or len(args) < 4 or not isinstance(args[0], Persistent):
        raise TensorError("a tensor without a storage")
    offset, size, stride = args[1:4]
    _check_sizes(size)
    _check_sizes(stride)
    _check_sizes((offset,))
    if len(size) != len(stride):
        raise TensorError(f"a tensor of {len(size)} dimensions with {len(stride)} strides")
    flat = storages(args[0].id)
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(flat) or (count and last >= len(flat)) or offset > len(flat):
        raise TensorError(f"a tensor of {size} that reaches beyond its storage of {len(flat)} elements")
    return torch.as_strided(flat, size, stride, offset)


def _of_numpy(state: Any) -> Tensor:
    if not isinstance(state, tuple) or len(state) != 5:
        raise TensorError("an array without a state")
    _, shape, dtype, fortran, raw = state
    return _array(raw, dtype, shape, bool(fortran))


def _of_buffer(args: Any) -> Tensor:
    if not isinstance(args, tuple) or len(args) != 4:
        raise TensorError("an array without its bytes")
    raw, dtype, shape, order = args
    return _array(raw, dtype, shape, order == "F")


def _array(raw: Any, dtype: Any, shape: Any, fortran: bool) -> Tensor:
    _check_sizes(shape)
    kind = _numpy_dtype(dtype)
    if isinstance(raw, str):  # bytes as Python 2 wrote them
        raw = raw.encode("latin1", "replace")
    if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape) * kind.itemsize:
        raise TensorError(f"an array of {shape} {kind} with other bytes than that")
    flat = np.frombuffer(raw, kind).astype(kind.newbyteorder("="))  # a copy that can be written
    return torch.from_numpy(flat.reshape(shape[::-1]).transpose() if fortran else flat.reshape(shape))


def _numpy_dtype(record: Any) -> np.dtype[Any]:
    """Return a plain numeric type from numpy's ``dtype(code, False, True)`` with the state ``(3, order, None, …)``."""
    if isinstance(record, Record) and record.function == _DTYPE and record.args and record.args[0] in _CODES:
        order = record.state[1] if isinstance(record.state, tuple) and len(record.state) > 1 else "|"
        if order in ("<", ">", "|", "="):
            kind: np.dtype[Any] = np.dtype(record.args[0]).newbyteorder(order)
            return kind
    raise TensorError("an array of another type than plain numbers")


def _check_sizes(sizes: Any) -> None:
    if not isinstance(sizes, tuple) or len(sizes) > MAX_DIMENSIONS:
        raise TensorError("a tensor whose sizes are none")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
        raise TensorError("a tensor whose sizes are none")
