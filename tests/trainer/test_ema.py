"""The moving average against a series computed by hand."""

from __future__ import annotations

import pytest
import torch

from vitgraft.trainer.ema import Ema


def test_the_average_is_the_hand_computed_series() -> None:
    flat = torch.tensor([1.0, 10.0], requires_grad=True)
    ema = Ema([flat], decay=0.75)
    assert ema.of(flat).tolist() == [1.0, 10.0]
    series = [[1.0, 10.0]]
    for weights in ([5.0, 2.0], [5.0, 2.0], [-3.0, 18.0]):
        with torch.no_grad():
            flat.copy_(torch.tensor(weights))
        ema.update()
        series.append(ema.of(flat).tolist())
    # 0.75 × 1 + 0.25 × 5 = 2; 0.75 × 2 + 0.25 × 5 = 2.75; 0.75 × 2.75 + 0.25 × -3 = 1.3125; likewise the second.
    assert series == [[1.0, 10.0], [2.0, 8.0], [2.75, 6.5], [1.3125, 9.375]]
    assert not ema.of(flat).requires_grad
    assert flat.tolist() == [-3.0, 18.0]


def test_each_tensor_has_its_own_average_though_their_values_are_equal() -> None:
    first, second = torch.zeros(3), torch.zeros(3)
    ema = Ema([first, second], decay=0.5)
    second += 4
    ema.update()
    assert ema.of(first).tolist() == [0, 0, 0]
    assert ema.of(second).tolist() == [2, 2, 2]
    with pytest.raises(KeyError):
        ema.of(torch.zeros(3))


def test_constant_weights_are_their_own_average() -> None:
    flat = torch.randn(100, generator=torch.Generator().manual_seed(0))
    ema = Ema([flat], decay=0.999)
    for _ in range(50):
        ema.update()
    assert torch.equal(ema.of(flat), flat)
