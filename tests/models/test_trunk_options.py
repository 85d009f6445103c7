"""Options of several trunks, each against the same trunk with the thing in question set to nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from vitgraft.configs.schema.backbones import BackboneConfig
from vitgraft.models import build, registry
from vitgraft.models.backbones.trunk import Trunk

assert build.REGISTERING

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8}
WINDOWED = {**SIZES, "window_size": 3, "global_blocks": [1], "pretrain_size": 32}


def trunk_of(section: dict[str, Any]) -> Trunk:
    """A small trunk with random parameters, in evaluation mode."""
    torch.manual_seed(0)
    config: Any = TypeAdapter(BackboneConfig).validate_python(section)
    trunk: Trunk = registry.build("backbone", config, image_size=(32, 40))
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return trunk.eval()


def same_without(trunk: Trunk, plain: Trunk, images: Tensor, gone: set[str]) -> None:
    """``plain`` lacks just the tensors ``gone``; zeros in their place in ``trunk`` give what ``plain`` gives."""
    assert set(trunk.state_dict()) - set(plain.state_dict()) == gone
    state = trunk.state_dict()
    before = trunk.forward_features(images)
    plain.load_state_dict({name: value for name, value in state.items() if name not in gone})
    trunk.load_state_dict({name: torch.zeros_like(v) if name in gone else v for name, v in state.items()})
    torch.testing.assert_close(plain.forward_features(images), trunk.forward_features(images))
    assert not torch.allclose(before, plain.forward_features(images), atol=1e-3)


@pytest.mark.parametrize("name", ["eva01", "eva02"])
def test_without_absolute_positions(name: str) -> None:
    section = {"name": name, **WINDOWED}
    plain = trunk_of({**section, "absolute_positions": False})
    same_without(trunk_of(section), plain, torch.randn(2, 3, 32, 40), {"pos_embed"})


def test_a_video_trunk_without_biases() -> None:
    section = {"name": "videomae", **SIZES}
    gone = {f"blocks.{block}.attn.{letter}_bias" for block in range(3) for letter in "qv"}
    same_without(trunk_of(section), trunk_of({**section, "qkv_bias": False}), torch.randn(2, 3, 4, 16, 24), gone)


def test_a_plain_trunk_without_biases() -> None:
    section = {"name": "vit", **SIZES, "class_token": True}
    gone = {f"vit.blocks.{block}.attn.qkv.bias" for block in range(3)}
    same_without(trunk_of(section), trunk_of({**section, "qkv_bias": False}), torch.randn(2, 3, 32, 40), gone)


@pytest.mark.parametrize("name", ["eva01", "eva02"])
def test_convolutions_follow_the_named_block(name: str) -> None:
    section = {"name": name, **WINDOWED}
    trunk: Any = trunk_of({**section, "residual_blocks": [2]})
    plain = trunk_of(section)
    plain.load_state_dict({n: v for n, v in trunk.state_dict().items() if ".residual." not in n})
    images = torch.randn(2, 3, 32, 40)
    expected = trunk.blocks[2].residual(plain.forward_features(images))
    torch.testing.assert_close(trunk.forward_features(images), expected)
    assert not torch.allclose(expected, plain.forward_features(images), atol=1e-3)


@pytest.mark.parametrize("width", [30, 42])
def test_widths_that_no_sinusoids_fill(width: int) -> None:
    trunk: Any = trunk_of({"name": "vit", **SIZES, "embed_dim": width})
    assert trunk.forward_features(torch.randn(1, 3, 32, 40)).shape == (1, width, 4, 5)
    assert trunk.vit.pos_embed.abs().max() > 0
