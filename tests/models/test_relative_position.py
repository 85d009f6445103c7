"""Relative positions: which row belongs to which pair, and what tables for other grids keep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vitgraft.configs.errors import ConfigError
from vitgraft.models.backbones.relative_position import (
    EVA_RATIO,
    offsets,
    relative_position_index,
    resize_bias_table,
    resize_rel_pos_geometric,
    resize_rel_pos_linear,
)

GRIDS = [(1, 1), (2, 3), (3, 2), (4, 4)]


def steps(side: int) -> np.ndarray:
    return np.arange(1 - side, side, dtype=np.float64)


def distances(side: int, ratio: float) -> np.ndarray:
    """What the offsets of a table stand for under the geometric rule."""
    return np.array([np.sign(n) * sum(ratio**power for power in range(int(abs(n)))) for n in steps(side)])


def ratio_for(source: int, target: int) -> float:
    """The authors' ratio, to their tolerance, with the closed form of the sum."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio ** (source - 1)) / (1 - ratio) > target - 1 else (ratio, high)
    return ratio


def table_of(f: Callable[[np.ndarray, np.ndarray], np.ndarray], y: np.ndarray, x: np.ndarray) -> Tensor:
    values = f(y[:, None], x[None])
    return torch.from_numpy(np.broadcast_to(values, (len(y), len(x))).reshape(-1, 1).copy()).float()


@pytest.mark.parametrize("grid", GRIDS)
def test_a_pair_has_the_row_of_its_offset(grid: tuple[int, int]) -> None:
    height, width = grid
    index = relative_position_index(grid, cls=False)
    assert index.shape == (height * width, height * width)
    assert index.dtype == torch.int64
    for query in range(height * width):
        for key in range(height * width):
            down, right = query // width - key // width, query % width - key % width
            assert index[query, key] == (down + height - 1) * (2 * width - 1) + right + width - 1
    assert set(index.flatten().tolist()) == set(range(offsets(grid)))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_class_token_has_the_three_rows_behind(grid: tuple[int, int]) -> None:
    index, rows = relative_position_index(grid, cls=True), offsets(grid)
    assert torch.equal(index[1:, 1:], relative_position_index(grid, cls=False))
    assert set(index[0, 1:].tolist()) == {rows}
    assert set(index[1:, 0].tolist()) == {rows + 1}
    assert index[0, 0] == rows + 2


@pytest.mark.parametrize("extra", [0, 3])
def test_a_table_of_the_same_grid_is_itself(extra: int) -> None:
    table = torch.randn(offsets((3, 5)) + extra, 2)
    assert resize_bias_table(table, (3, 5), (3, 5), extra) is table
    rows = torch.randn(9, 4)
    assert resize_rel_pos_linear(rows, 9) is rows
    assert resize_rel_pos_geometric(rows, 9) is rows


@pytest.mark.parametrize("target", [(20, 20), (14, 20), (23, 16), (8, 8), (5, 30)])
def test_tables_are_those_of_scipys_spline(target: tuple[int, int]) -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn(27 * 27 + 3, 2)
    resized = resize_bias_table(table, (14, 14), target, 3)
    known = [steps(14) if side == 14 else distances(14, ratio_for(14, side)) for side in target]
    for head in range(2):
        values = table[:-3, head].view(27, 27).double().numpy()
        spline = interpolate.RectBivariateSpline(*known, values, kx=3, ky=3, s=0)
        expected = torch.from_numpy(spline(*(steps(side) for side in target))).float()
        torch.testing.assert_close(resized[:-3, head].view_as(expected), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(resized[-3:], table[-3:])


@pytest.mark.parametrize("target", [(9, 9), (11, 7), (7, 12)])
def test_a_smooth_function_of_distance_keeps_its_values(target: tuple[int, int]) -> None:
    def cubic(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return 1 + (y / 8) ** 3 - (x / 8) ** 2 * y / 8 + x / 8

    y, x = (steps(7) if side == 7 else distances(7, ratio_for(7, side)) for side in target)
    resized = resize_bias_table(table_of(cubic, y, x), (7, 7), target, 0)
    torch.testing.assert_close(resized, table_of(cubic, *(steps(side) for side in target)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", [(2, 2), (4, 9), (30, 5)])
def test_antisymmetry_and_constants_stay(target: tuple[int, int]) -> None:
    table = torch.randn(offsets((4, 4)), 3)
    odd = resize_bias_table(table - table.flip(0), (4, 4), target, 0)
    torch.testing.assert_close(odd, -odd.flip(0))
    torch.testing.assert_close(odd[offsets(target) // 2], torch.zeros(3))
    same = resize_bias_table(torch.full_like(table, 0.7), (4, 4), target, 0)
    torch.testing.assert_close(same, torch.full_like(same, 0.7))
    vector = torch.randn(7, 3)
    for resize in (resize_rel_pos_linear, resize_rel_pos_geometric):
        for length in (3, 5, 21):
            odd = resize(vector - vector.flip(0), length)
            torch.testing.assert_close(odd, -odd.flip(0))


def test_with_ratio_1_a_smaller_grid_gets_the_same_bias_for_the_same_offset() -> None:
    table = torch.randn(offsets((6, 5)), 2)
    middle = table.view(11, 9, 2)
    cut = resize_bias_table(table, (6, 5), (3, 5), 0, lowest_ratio=1)
    torch.testing.assert_close(cut.view(5, 9, 2), middle[3:8])
    stretched = resize_bias_table(table, (6, 5), (3, 5), 0)
    assert 1e-4 < (stretched - cut).abs().max() < 0.2
    # Growing by little is no jump either.
    smooth = table_of(lambda y, x: np.cos(y / 30) * np.cos(x / 30), steps(40), steps(40))
    grown = resize_bias_table(smooth, (40, 40), (41, 41), 0, lowest_ratio=1)
    torch.testing.assert_close(grown.view(81, 81)[1:-1, 1:-1].reshape(-1, 1), smooth, atol=0.05, rtol=0)


def test_tiny_tables_and_far_targets_stay_within_what_is_known() -> None:
    single = resize_bias_table(torch.tensor([[0.3]]), (1, 1), (3, 2), 0)
    torch.testing.assert_close(single, torch.full((15, 1), 0.3))
    pair = torch.randn(9, 1)
    far = resize_bias_table(pair, (2, 2), (6, 6), 0).view(11, 11)
    assert (far[0, 0], far[-1, 0]) == (pair[0], pair[6])


def test_tables_keep_their_precision_and_get_gradients() -> None:
    table = torch.randn(offsets((4, 4)) + 3, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_bias_table(table, (4, 4), (6, 5), 3)
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, resize_bias_table(table, (4, 4), (6, 5), 3))
    resized.sum().backward()
    # Every value of the result is a weighted mean: the weights of all of them sum up to their number.
    assert table.grad is not None
    torch.testing.assert_close(table.grad.sum(), torch.tensor(2.0 * len(resized)))
    assert resize_bias_table(table.bfloat16(), (4, 4), (6, 5), 3).dtype == torch.bfloat16
    assert resize_rel_pos_linear(table.bfloat16(), 9).dtype == torch.bfloat16
    assert resize_rel_pos_geometric(torch.randn(9, 2).bfloat16(), 7).dtype == torch.bfloat16


@pytest.mark.parametrize("length", [5, 13, 27])
def test_linear_tables_are_read_at_the_centres_of_equal_parts(length: int) -> None:
    table = torch.randn(11, 2)
    places = (np.arange(length) + 0.5) * 11 / length - 0.5
    expected = [np.interp(places, np.arange(11), table[:, column].double().numpy()) for column in range(2)]
    torch.testing.assert_close(resize_rel_pos_linear(table, length), torch.from_numpy(np.stack(expected, 1)).float())


@pytest.mark.parametrize(("side", "target"), [(16, 12), (16, 20), (80, 96)])
def test_geometric_tables_are_read_with_the_fixed_ratio(side: int, target: int) -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    known = distances(side, EVA_RATIO)
    assert known[-1] >= target - 1
    table = torch.randn(2 * side - 1, 3)
    expected = interpolate.make_interp_spline(known, table.double().numpy(), k=3)(steps(target))
    found = resize_rel_pos_geometric(table, 2 * target - 1)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"12 rows, expected 9 \+ 0 for a grid of 2 × 2"):
        resize_bias_table(torch.zeros(12, 1), (2, 2), (3, 3), 0)
    with pytest.raises(ConfigError, match="odd numbers"):
        resize_rel_pos_geometric(torch.zeros(8, 4), 9)
