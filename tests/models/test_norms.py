"""Norms against torch's, and statistics over two real ranks against one whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.multiprocessing as mp
from norm_ranks import CHANNELS, rank_main, sample_model, step
from torch import nn

from vitgraft.configs.schema.model import Norm
from vitgraft.models.norms import BatchNorm, convert_sync_batchnorm, frozen_batchnorm, make_norm


def test_layer_norm_is_torchs_over_channels() -> None:
    norm, reference = make_norm("ln", CHANNELS), nn.LayerNorm(CHANNELS, eps=1e-6)
    state = {"weight": torch.randn(CHANNELS), "bias": torch.randn(CHANNELS)}
    norm.load_state_dict(state)
    reference.load_state_dict(state)
    x = torch.randn(2, CHANNELS, 3, 5)
    torch.testing.assert_close(norm(x), reference(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (96, 32), (48, 24), (20, 10), (7, 1), (1, 1)])
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    assert make_norm("gn", channels).num_groups == groups


@pytest.mark.parametrize("kind", get_args(Norm))
def test_float32_inside_and_the_input_s_precision_outside(kind: Norm) -> None:
    norm = make_norm(kind, CHANNELS)
    x = 100 + torch.randn(4, CHANNELS, 8, 8)  # a mean that bfloat16 statistics would not survive
    x = x.bfloat16()
    exact = norm(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-2)
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_a_single_value_per_channel_uses_running_statistics() -> None:
    norm = BatchNorm(CHANNELS)
    norm.running_mean.fill_(2.0)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    x = torch.full((1, CHANNELS, 1, 1), 3.0, requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert norm.weight.grad is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())


def test_frozen_batchnorm_inside_the_context_only() -> None:
    model = nn.Sequential(make_norm("bn", CHANNELS), make_norm("syncbn", CHANNELS), nn.Dropout())
    x = 3 + torch.randn(4, CHANNELS, 5, 5)
    model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with frozen_batchnorm(model):
        inside = model[:2](x)
        assert model[2].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(inside, model.eval()[:2](x))
    model.train()
    with pytest.raises(ZeroDivisionError), frozen_batchnorm(model):
        raise ZeroDivisionError
    model(x)
    assert model[0].num_batches_tracked == before["0.num_batches_tracked"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("cut", [4, 2])
def test_two_ranks_equal_one_batch(tmp_path: Path, cut: int) -> None:
    torch.manual_seed(1)
    x = 2 + torch.randn(8, 3, 7, 9)
    whole = step(sample_model(), x)
    mp.spawn(rank_main, (str(tmp_path), [x[:cut], x[cut:]]), nprocs=2)
    ranks: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, expected in whole.items():
        values = [rank[name] for rank in ranks]
        if name in ("output", "input"):
            actual = torch.cat(values)
        elif name.startswith("1.running") or name.endswith("tracked"):
            assert torch.equal(*values), name
            actual = values[0]
        else:
            actual = values[0] + values[1]
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_one_rank_stays_as_it_is() -> None:
    model = sample_model()
    kinds = [type(module) for module in model]
    assert [type(m) for m in convert_sync_batchnorm(model, torch.device("cpu"), 1)] == kinds
