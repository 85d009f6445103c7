"""Resizing of a checkpoint's tensors to the model that loads them: position embeddings and patch kernels.

The rules for tables of relative positions are in :mod:`vitgraft.models.backbones.relative_position`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraft.models.backbones.relative_position import CLASS_ROWS, offsets, resize_bias_table

PREFIXES = (0, 1, 2, 5)
"""Numbers of prefix rows (class and register tokens) before the square grid, in known files."""


def square_grid(rows: int) -> tuple[int, int] | None:
    """Return (prefix rows, side of the square grid) of a table of ``rows`` positions; ``None`` when no square fits."""
    return next(
        ((p, math.isqrt(rows - p)) for p in PREFIXES if rows > p and math.isqrt(rows - p) ** 2 == rows - p), None
    )


def table_layout(rows: int, tokens: tuple[int, ...], grid: tuple[int, int]) -> tuple[int, tuple[int, int]] | None:
    """Return (prefix rows, grid) of a file's table of ``rows`` positions; ``None``: unknown.

    ``tokens``: how many prefix rows it may have, the likeliest first. Published tables are of square grids; one that is
    not can only be of ``grid``, the model's own.
    """
    for prefix in tokens:
        places = rows - prefix
        side = math.isqrt(max(0, places))
        if places > 0 and side**2 == places:
            return prefix, (side, side)
        if places == grid[0] * grid[1]:
            return prefix, grid
    return None


def resize_positions(
    table: Tensor,
    initial: Tensor,
    prefix: int,
    grid: tuple[int, int],
    source: tuple[int, tuple[int, int]] | None = None,
    *,
    antialias: bool = False,
) -> Tensor | None:
    """Resize absolute positions (1, rows, C) → (1, prefix + h·w, C), bicubic; ``None`` if they do not fit.

    The class token's row comes first, so of prefix rows that the file has too many the last are dropped; where it has
    too few, those of ``initial`` (the model's own table) stay. ``source``: the table's own prefix rows and grid, by
    default of the first square that fits. ``antialias``: as timm resizes, another bicubic kernel.
    """
    source = source or table_layout(table.shape[1], PREFIXES, (0, 0))
    if source is None or table.shape[2] != initial.shape[2]:
        return None
    before, own = source
    rows = table[:, before:]
    if own != grid:
        maps = rows.float().reshape(1, *own, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, grid, mode="bicubic", align_corners=False, antialias=antialias)
        rows = maps.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    kept = min(before, prefix)
    return torch.cat([table[:, :kept], initial[:, kept:prefix].to(rows), rows], 1)


def resize_patch_kernel(
    kernel: Tensor, size: tuple[int, ...], mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor | None:
    """Resize a patch embedding's kernel (D, 3, p, p) → (D, 3, *size); ``None`` if it has neither 4 nor 5 dimensions.

    Bicubic as EVA resizes its patches of 14 pixels to 16, bilinear as ViT-Adapter does those of DINOv2. For a tubelet
    (t, p, p) an image's kernel is repeated over time and divided by t, so that a still clip is embedded as its frame.
    """
    if len(size) == 3 and kernel.ndim == 4:
        flat = resize_patch_kernel(kernel, size[1:], mode)
        return None if flat is None else flat[:, :, None].repeat(1, 1, size[0], 1, 1) / size[0]
    if kernel.ndim != 4 or len(size) != 2:
        return None
    if tuple(kernel.shape[-2:]) == size:
        return kernel
    smaller = size[0] < kernel.shape[-2]
    return F.interpolate(kernel.float(), size, mode=mode, align_corners=False, antialias=smaller).to(kernel.dtype)


def resize_square_table(table: Tensor, target: Tensor) -> Tensor | None:
    """Resize relative positions of a square grid, with or without the class token's rows, to the shape of
    ``target``."""
    (source, extra), (side, wanted) = (_square_table(len(t)) for t in (table, target))
    if not source or not side or table.shape[1] != target.shape[1]:
        return None
    body = resize_bias_table(table[: offsets((source, source))], (source, source), (side, side), 0)
    tail = table[len(table) - extra :] if extra else target[len(target) - wanted :].to(table)
    return torch.cat([body, tail[:wanted]])


def _square_table(rows: int) -> tuple[int, int]:
    """Return (side of the grid, extra rows) of a table; a side of 0 where no square grid has so many rows."""
    for extra in (0, CLASS_ROWS):
        width = math.isqrt(max(0, rows - extra))
        if width % 2 and width**2 == rows - extra:
            return (width + 1) // 2, extra
    return 0, 0
