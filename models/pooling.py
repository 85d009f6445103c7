"""Average pooling of maps to a grid, as two small matrix products.

torch's adaptive pooling has no deterministic backward pass on CUDA; a matrix product has, and the values are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def average_to_grid(maps: Tensor, rows: int, columns: int) -> Tensor:
    """(…, h, w) → (…, rows, columns): the bins of ``torch.nn.functional.adaptive_avg_pool2d``."""
    height, width = maps.shape[-2:]
    down = _bins(height, rows, maps)
    across = _bins(width, columns, maps)
    return down @ maps @ across.transpose(0, 1)


def _bins(length: int, count: int, like: Tensor) -> Tensor:
    """(count, length): row i averages the places from floor(i · length / count) to ceil((i + 1) · length / count)."""
    table = torch.zeros(count, length)
    for index in range(count):
        start, stop = index * length // count, math.ceil((index + 1) * length / count)
        table[index, start:stop] = 1 / (stop - start)
    return table.to(device=like.device, dtype=like.dtype)
