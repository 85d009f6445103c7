"""The bytes of a safetensors file, laid out before its tensors have values. Pure: no files, no torch.

A safetensors file is eight bytes of length, a JSON header, and the tensors one behind the other. What a rank saves has
the same names, types and shapes for the whole run, so header and offsets are known at the start: saving is then copying
tensors to their places.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of one element, by safetensors's names of types."""

LINE_BYTES = 64


@dataclass(frozen=True)
class Image:
    """The layout of one safetensors file. ``header``: the file's first bytes; ``offsets``: where each tensor begins,
    from the start of the file; ``size``: bytes of the file."""

    header: bytes
    offsets: dict[str, int]
    size: int


def lay_out(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> Image:
    """The layout of a file that holds ``tensors``: {name: (type, shape)}, in their order but for one thing: wide types
    come first, as the library's own writer has it, so that every tensor is aligned."""
    header: dict[str, object] = {}
    starts: dict[str, int] = {}
    offset = 0
    for name in sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name][0]]):
        dtype, shape = tensors[name]
        stop = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        starts[name], offset = offset, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors begin with a cache line: copies to unaligned places take twice as long.
    text += b" " * (-(8 + len(text)) % LINE_BYTES)
    text = len(text).to_bytes(8, "little") + text
    return Image(text, {name: len(text) + start for name, start in starts.items()}, len(text) + offset)
