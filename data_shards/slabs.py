"""Shared memory in which loader processes write images and this process reads them, reused between batches.

Shared memory made anew for each batch costs about a tenth of the time that decoding takes: the kernel clears it and
maps it page by page in two processes, to throw it away a moment later. A slab stays mapped in both. It has no name in
the file system, takes nothing from /dev/shm, and goes with its last process.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitgraft.configs.files import open_regular

_BYTES = 4
_MAPPED = 256
"""More than windows usually have; a slab that was given up is unmapped by later ones."""


class SlabName(NamedTuple):
    """Address by which a loader process opens a slab: the owner's descriptor ``path``, and a unique ``number``."""

    path: str
    number: int
    size: int


class Slab:
    """``size`` bytes of anonymous memory that other processes of this user can map, by name, while this one lives."""

    _numbers = count()

    def __init__(self, size: int) -> None:
        descriptor = os.memfd_create("vitgraft-batch")
        weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, size)
        self._memory = mmap.mmap(descriptor, size)
        self.name = SlabName(f"/proc/{os.getpid()}/fd/{descriptor}", next(self._numbers), size)

    def floats(self, shape: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
        """Return its first part as float32, and the object that lives as long as any tensor of that part."""
        held = np.frombuffer(self._memory, np.float32, math.prod(shape))
        return torch.from_numpy(held).view(shape), held


class Slabs:
    """Slabs to write batches in; one is lent again when the last tensor of its earlier batch is dropped."""

    def __init__(self) -> None:
        self._free: list[Slab] = []

    def lend(self, shape: tuple[int, ...]) -> Slab:
        """Return a slab with room for float32 of ``shape``; smaller free ones are released for it."""
        size = _BYTES * math.prod(shape)
        while self._free:
            slab = self._free.pop()
            if slab.name.size >= size:
                return slab
        return Slab(size)

    def read(self, slab: Slab, shape: tuple[int, ...]) -> Tensor:
        """Return the contents of a lent slab: float32 of ``shape``, without a copy; dropping it frees the slab."""
        images, held = slab.floats(shape)
        # Not at the interpreter's end, when slabs are no longer used.
        weakref.finalize(held, self._free.append, slab).atexit = False
        return images


@lru_cache(maxsize=_MAPPED)
def _mapped(name: SlabName) -> Tensor:
    descriptor = open_regular(name.path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, name.size), dtype=torch.float32)
    finally:
        os.close(descriptor)


def slab_to_write(name: SlabName, shape: tuple[int, ...]) -> Tensor:
    """Return the memory, in a loader process, that the slab's owner will read as float32 of ``shape``.

    Raises:
        OSError: the owner is gone.
    """
    return _mapped(name)[: math.prod(shape)].view(shape)
