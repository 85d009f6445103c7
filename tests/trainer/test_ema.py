"""The moving average against a series computed by hand."""

from __future__ import annotations

import pytest
import torch

from vitgraft.trainer.ema import Ema, lag, share_of_the_start


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


def test_the_ramp_is_the_hand_computed_series() -> None:
    """Decays 1/10, 2/11, 3/12 and then the recipe's."""
    flat = torch.tensor([1.0])
    ema = Ema([flat], decay=0.25)
    expected = 1.0
    for step, decay in enumerate([1 / 10, 2 / 11, 0.25, 0.25, 0.25]):
        flat.fill_(step + 2.0)
        ema.update(step)
        expected = decay * expected + (1 - decay) * (step + 2.0)
        assert float(ema.of(flat)) == pytest.approx(expected, rel=1e-6)


def test_a_run_that_began_without_a_ramp_goes_on_without() -> None:
    flat = torch.tensor([1.0])
    ema = Ema([flat], decay=0.75, ramped=False)
    flat.fill_(5.0)
    ema.update(0)
    assert float(ema.of(flat)) == 2.0


@pytest.mark.parametrize("ramped", [True, False])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_the_share_of_the_start_is_what_the_average_keeps_of_it(decay: float, ramped: bool) -> None:
    flat = torch.ones(1, dtype=torch.float64)
    ema = Ema([flat], decay=decay, ramped=ramped)
    flat.zero_()
    for step in range(30):
        assert share_of_the_start(step, decay, ramped) == pytest.approx(float(ema.of(flat)), abs=1e-9)
        ema.update(step)


def test_a_lagging_average_is_noted() -> None:
    text = lag(1000, 0.9999, ramped=False)
    assert text is not None
    assert "90 % of the average (train.ema 0.9999)" in text
    assert "--weights raw" in text
    assert lag(100_000, 0.9999, ramped=False) is None
    assert lag(20, 0.9999, ramped=True) is None
    assert lag(1, 0.9999, ramped=True) is not None
