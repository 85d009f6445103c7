"""Relative positions between the tokens of a grid: which table row belongs to which pair, and tables for other grids.

Tables of BEiT (arXiv 2106.08254) hold one bias for each head and each offset (Δy, Δx) of a grid (h, w): row
(Δy + h − 1)·(2w − 1) + Δx + w − 1 of (2h − 1)·(2w − 1), then, where there is a class token, three extra rows: class →
token, token → class, class → class. Tables of ViTDet (arXiv 2203.16527) hold one vector for each offset on one axis.

A table of BEiT is resized as its authors do: an offset of n steps in the table stands for a distance of
1 + q + … + q^(n−1), with q such that the table spans the wanted grid, and a cubic spline through these distances is
read at whole steps. Near neighbours so keep their biases, and far ones are spread.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraft.configs.errors import ConfigError

Sides = tuple[int, int]
"""Height and width of a grid or window, in tokens."""

CLASS_ROWS = 3
"""Extra rows of a table with a class token."""

EVA_RATIO = 1.0903078
"""The fixed ratio with which EVA-01's detector resizes its tables for evaluation at 1536 pixels."""

_Array = npt.NDArray[np.float64]


def relative_position_index(grid: Sides, cls: bool, device: torch.device | None = None) -> Tensor:
    """The table row of every pair (query, key) of tokens: (N, N), int64, with N = h·w, or 1 + h·w with a class token.

    Tokens are in row-major order, the class token first.
    """
    height, width = grid
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    index = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    if cls:
        rows = offsets(grid)
        index = F.pad(index, (1, 0), value=rows + 1)  # token → class
        index = F.pad(index, (0, 0, 1, 0), value=rows)  # class → token
        index[0, 0] = rows + 2
    return index


def offsets(grid: Sides) -> int:
    """Number of offsets (Δy, Δx) between the positions of a grid."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1)


def resize_bias_table(
    table: Tensor, source: Sides, target: Sides, extra_rows: int, *, lowest_ratio: float = 1.01
) -> Tensor:
    """A table for another grid: (rows of ``source`` + extra, heads) → (rows of ``target`` + extra, heads).

    The last ``extra_rows`` rows stay as they are, and so does the whole table when the grids agree. Computed in
    float32, returned in the table's precision, differentiable in the table. ``lowest_ratio`` bounds q from below: 1.01
    is the authors' (their tables for a smaller grid are stretched a little); with 1 a smaller grid gets the same bias
    for the same offset. Raises ``ConfigError`` when the table has other rows than ``source`` and ``extra_rows`` say.
    """
    if len(table) != offsets(source) + extra_rows:
        raise ConfigError(
            f"relative_position_bias_table: {len(table)} rows, expected {offsets(source)} + {extra_rows} for a grid of "
            f"{source[0]} × {source[1]} tokens; name the weights' own grid"
        )
    if source == target:
        return table
    body, extra = table[: offsets(source)], table[offsets(source) :]
    rows, columns = (
        torch.from_numpy(_resizing(2 * old - 1, 2 * new - 1, lowest_ratio)).to(table.device)
        for old, new in zip(source, target, strict=True)
    )
    with torch.autocast(table.device.type, enabled=False):
        body = body.float().view(2 * source[0] - 1, 2 * source[1] - 1, -1)
        body = torch.einsum("yi,xj,ijh->yxh", rows, columns, body).flatten(0, 1)
    return torch.cat([body.to(table.dtype), extra])


def resize_rel_pos_linear(table: Tensor, length: int) -> Tensor:
    """A table of one axis for another number of offsets, as ViTDet does: (L, C) → (``length``, C).

    Linear interpolation over the evenly spaced rows, in float32; returned in the table's precision.
    """
    if len(table) == length:
        return table
    columns = table.float().t()[None]
    return F.interpolate(columns, size=length, mode="linear")[0].t().to(table.dtype)


def resize_rel_pos_geometric(table: Tensor, length: int) -> Tensor:
    """A table of one axis for another number of offsets, as EVA-01 does at 1536 pixels: (L, C) → (``length``, C).

    The geometric rule with the fixed ratio :data:`EVA_RATIO`, in float32; returned in the table's precision. Both
    lengths are odd (2·side − 1); raises ``ConfigError`` otherwise.
    """
    if len(table) % 2 == 0 or length % 2 == 0:
        raise ConfigError(f"rel_pos: {len(table)} and {length} rows, expected odd numbers (2 · side − 1)")
    if len(table) == length:
        return table
    known = _distances(len(table) // 2, EVA_RATIO)
    weights = torch.from_numpy(_spline(known, _steps(length)).astype(np.float32)).to(table.device)
    with torch.autocast(table.device.type, enabled=False):
        return (weights @ table.float()).to(table.dtype)


@lru_cache(maxsize=256)
def _resizing(source: int, target: int, lowest_ratio: float) -> npt.NDArray[np.float32]:
    """The matrix (target, source) that resizes one axis of odd length. Kept in numpy: a tensor made while a model is
    traced would be kept as a fake one."""
    if source == target:
        return np.eye(source, dtype=np.float32)
    ratio = _ratio(source // 2, target // 2, lowest_ratio)
    return _spline(_distances(source // 2, ratio), _steps(target)).astype(np.float32)


def _ratio(count: int, reach: int, lowest: float) -> float:
    """q between ``lowest`` and 1.5 for which ``count`` steps 1, q, q², … sum up to ``reach``, to 1e-6 by bisection."""
    if lowest == 1 and reach <= count:
        return 1.0
    low, high = lowest, 1.5
    middle = low
    while high - low > 1e-6:
        middle = (low + high) / 2
        if sum(middle**power for power in range(count)) > reach:
            high = middle
        else:
            low = middle
    return middle


def _distances(count: int, ratio: float) -> _Array:
    """0 and the partial sums of 1, q, q², … on both sides: 2 · count + 1 numbers, ascending."""
    sums = np.cumsum(ratio ** np.arange(count, dtype=np.float64))
    return np.concatenate([-sums[::-1], np.zeros(1), sums])


def _steps(length: int) -> _Array:
    return np.arange(length, dtype=np.float64) - length // 2


def _spline(known: _Array, wanted: _Array) -> _Array:
    """The matrix (wanted, known) of cubic spline interpolation; outside of the known range the value at its end.

    The spline without a knot at the second and the last but one point, as in FITPACK (SciPy's RectBivariateSpline with
    s = 0); with fewer than four points the polynomial through them.
    """
    degree = min(3, len(known) - 1)
    inner = known[2:-2] if degree == 3 else known[:0]
    knots = np.concatenate([np.repeat(known[0], degree + 1), inner, np.repeat(known[-1], degree + 1)])
    at_known, at_wanted = (_b_splines(knots, degree, x) for x in (known, wanted.clip(known[0], known[-1])))
    return np.asarray(np.linalg.solve(at_known.T, at_wanted.T).T, dtype=np.float64)


def _b_splines(knots: _Array, degree: int, x: _Array) -> _Array:
    """The B-splines of these knots at x, (len(x), len(knots) − degree − 1), by the recursion of Cox and de Boor."""
    last = len(knots) - degree - 2
    interval = np.clip(np.searchsorted(knots, x, side="right") - 1, degree, last)
    values = np.zeros((len(x), len(knots) - 1))
    values[np.arange(len(x)), interval] = 1
    for order in range(1, degree + 1):
        count = len(knots) - 1 - order
        left, right = knots[:count], knots[order + 1 :]
        rise, fall = knots[order : order + count] - left, right - knots[1 : 1 + count]
        # Where knots coincide the spline of lower order is zero; so is its term.
        up = np.divide(x[:, None] - left, rise, out=np.zeros((len(x), count)), where=rise > 0)
        down = np.divide(right - x[:, None], fall, out=np.zeros((len(x), count)), where=fall > 0)
        values = up * values[:, :count] + down * values[:, 1 : 1 + count]
    return values
