"""The feature pyramid network against torchvision's, its names, and models with it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from model_samples import PYRAMID, batch_of, loss_of, model_of
from pydantic import ValidationError
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.adapters import FPNConfig
from vitgraft.models.necks.fpn import FPN
from vitgraft.models.weights import load_weights

CHANNELS = {4: 6, 8: 12, 16: 16, 32: 16}
SIDES = {4: (16, 24), 8: (8, 12), 16: (4, 6), 32: (2, 3)}


def fpn(channels: dict[int, int] | None = None, **options: Any) -> FPN:
    torch.manual_seed(0)
    return FPN(FPNConfig(**({"channels": 8} | options)), channels=channels or CHANNELS)


def maps_of(channels: dict[int, int], sides: dict[int, tuple[int, int]]) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {stride: torch.randn(2, width, *sides[stride], generator=generator) for stride, width in channels.items()}


@pytest.mark.parametrize(
    ("channels", "sides"),
    [
        (CHANNELS, SIDES),
        ({4: 6, 8: 6, 16: 6}, {4: (10, 21), 8: (5, 11), 16: (3, 6)}),
        ({7: 4, 14: 8, 56: 3}, {7: (9, 13), 14: (5, 7), 56: (2, 2)}),
        ({16: 5}, {16: (3, 4)}),
    ],
)
def test_it_computes_what_torchvisions_does(channels: dict[int, int], sides: dict[int, tuple[int, int]]) -> None:
    ours, theirs = fpn(channels), FeaturePyramidNetwork(list(channels.values()), 8)
    inner, outer = list(theirs.inner_blocks), list(theirs.layer_blocks)
    for index, level in enumerate(ours.levels):
        inner[index][0].load_state_dict(ours.get_submodule(f"fpn_lateral{level}").state_dict())
        outer[index][0].load_state_dict(ours.get_submodule(f"fpn_output{level}").state_dict())
    maps = maps_of(channels, sides)
    expected = theirs(OrderedDict((str(stride), level) for stride, level in maps.items()))
    made = ours.maps(maps)
    assert ours.strides == list(channels) == list(made)
    assert ours.channels == dict.fromkeys(channels, 8)
    for stride, level in made.items():
        assert level.shape == (2, 8, *sides[stride])
        torch.testing.assert_close(level, expected[str(stride)])


@pytest.mark.parametrize("norm", ["none", "ln", "gn", "bn", "syncbn"])
def test_norms_and_gradients(norm: Any) -> None:
    neck = fpn(norm=norm)
    maps = maps_of(CHANNELS, SIDES)
    torch.stack([level.square().mean() for level in neck.maps(maps).values()]).sum().backward()
    assert [name for name, p in neck.named_parameters() if p.grad is None] == []
    kinds = {"weight", "bias"} if norm == "none" else {"weight", "norm.weight", "norm.bias"}
    names = {f"fpn_{part}{level}.{kind}" for part in ("lateral", "output") for level in (2, 3, 4, 5) for kind in kinds}
    assert names == {name for name, _ in neck.named_parameters()}


def test_the_top_block_is_every_other_place_of_the_last_map() -> None:
    plain, topped = fpn(), fpn(top_block=True)
    sides = SIDES | {32: (3, 5)}
    maps = maps_of(CHANNELS, sides)
    made = topped.maps(maps)
    assert topped.strides == [4, 8, 16, 32, 64]
    assert torch.equal(made[64], nn.functional.max_pool2d(made[32], 1, 2))
    assert made[64].shape[-2:] == (2, 3)
    assert all(torch.equal(level, made[stride]) for stride, level in plain.maps(maps).items())


def test_bfloat16() -> None:
    neck, maps = fpn(norm="ln"), maps_of(CHANNELS, SIDES)
    exact = neck.maps(maps)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = neck.maps(maps)
    for stride, level in rounded.items():
        torch.testing.assert_close(level.float(), exact[stride], rtol=0.1, atol=0.1)


def test_strides_too_close_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"strides about double, these are \[4, 6, 8\]"):
        fpn({4: 3, 6: 3, 8: 3})


@pytest.mark.parametrize("norm", ["none", "bn"])
def test_mmdets_names_load(norm: Any) -> None:
    source, target = fpn(norm=norm), fpn(norm=norm)
    state = {}
    for name, value in source.state_dict().items():
        part, rest = name.split(".", 1)
        rest = rest.replace("norm.", "bn.") if "norm." in rest else f"conv.{rest}"
        convs = "lateral_convs" if "lateral" in part else "fpn_convs"
        state[f"neck.{convs}.{int(part[-1]) - 2}.{rest}"] = value
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    load_weights({"neck": target}, state, where="mmdet", strict=True)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    with pytest.raises(CheckpointError, match=r"lacks"):
        load_weights({"neck": target}, dict(list(state.items())[2:]), where="mmdet")


def test_over_the_simple_pyramid() -> None:
    # The pyramid listed after the neck is still below it.
    neck = {"name": "fpn", "channels": 12, "top_block": True}
    model = model_of("mask_rcnn", adapter=[neck, PYRAMID], anchor_sizes=[8, 16, 32, 64])
    assert model.neck is not None
    assert model.neck.strides == [4, 8, 16, 32]
    loss_of(model(**batch_of("mask_rcnn"))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    loss_of(model_of("upernet", adapter=[PYRAMID, neck])(**batch_of("upernet"))).backward()


def test_without_maps_below_it_is_refused() -> None:
    with pytest.raises(ValidationError, match="reads several strides; add adapter simple_pyramid"):
        model_of("upernet", adapter=[{"name": "fpn"}])
    with pytest.raises(ValidationError, match=r"3 sizes for the pyramid's strides \[4, 8, 16, 32\]"):
        model_of("mask_rcnn", adapter=[PYRAMID, {"name": "fpn", "top_block": True}])
