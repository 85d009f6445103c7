"""Attention within windows: cutting a map of tokens into squares, and putting it together again."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vitgraft.models.backbones.trunk import Grid


def within_windows(attention: Callable[[Tensor], Tensor], tokens: Tensor, size: int) -> Tensor:
    """``attention`` over maps of tokens (B, h, w, C), in each window on its own; size 0: over the whole map."""
    if size == 0:
        return attention(tokens)
    height, width = tokens.shape[1:3]
    return join_windows(attention(split_windows(tokens, size)), (height, width))


def split_windows(tokens: Tensor, size: int) -> Tensor:
    """(B, h, w, C) → windows (B · n, size, size, C), row by row; zeros are added at the bottom and right."""
    batch, height, width, channels = tokens.shape
    padded = F.pad(tokens, (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = padded.shape[1] // size, padded.shape[2] // size
    windows = padded.view(batch, rows, size, columns, size, channels).transpose(2, 3)
    return windows.reshape(batch * rows * columns, size, size, channels)


def join_windows(windows: Tensor, grid: Grid) -> Tensor:
    """Windows (B · n, size, size, C) of maps of this size → (B, h, w, C), what was added cut away."""
    height, width = grid
    size, channels = windows.shape[-2:]
    rows, columns = -(-height // size), -(-width // size)
    maps = windows.view(-1, rows, columns, size, size, channels).transpose(2, 3)
    return maps.reshape(-1, rows * size, columns * size, channels)[:, :height, :width]
