"""Adapters: the pyramid's shapes, and AdaptFormer against its equations, its parameter counts and official numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_samples import BACKBONE, Stub, model_of
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import AdaptFormerConfig, NoAdapterConfig, SimplePyramidConfig
from vitgraft.models.adapters.adaptformer import graft_adaptformer
from vitgraft.models.adapters.none import NoAdapter
from vitgraft.models.adapters.simple_pyramid import SimplePyramid

# -- maps ------------------------------------------------------------------------------------------------------------


def test_none_is_the_trunks_map() -> None:
    trunk = Stub(embed_dim=24, patch_size=14)
    adapter = NoAdapter(NoAdapterConfig(), trunk=trunk)
    x = torch.randn(1, 24, 3, 5)
    maps = dict(zip(adapter.strides, adapter(trunk, x), strict=True))
    assert adapter.strides == list(maps) == [14]
    assert adapter.channels == {14: 24}
    assert maps[14] is x


@pytest.mark.parametrize("norm", ["ln", "gn", "bn", "syncbn"])
@pytest.mark.parametrize(("patch", "strides"), [(16, [4, 8, 16, 32, 64]), (8, [2, 4, 16]), (14, [7, 28])])
def test_the_pyramids_shapes(patch: int, strides: list[int], norm: Any) -> None:
    config = SimplePyramidConfig(channels=16, strides=strides, norm=norm)
    trunk = Stub(embed_dim=32, patch_size=patch)
    pyramid = SimplePyramid(config, trunk=trunk)
    assert pyramid.strides == strides
    maps = dict(zip(strides, pyramid(trunk, torch.randn(2, 32, 4, 8)), strict=True))
    for stride, level in maps.items():
        assert level.shape == (2, 16, 4 * patch // stride, 8 * patch // stride)
        assert pyramid.channels[stride] == 16
    sum(level.sum() for level in maps.values()).backward()
    assert all(p.grad is not None for p in pyramid.parameters())


def test_the_pyramid_has_vitdets_parameters() -> None:
    # ViTDet-B: detectron2's simfp_2..5 on 768 channels: transposed convolutions with bias, the others without, two
    # parameters for each channel of a LayerNorm.
    pyramid = SimplePyramid(SimplePyramidConfig(), trunk=Stub(embed_dim=768))
    up_4 = (768 * 384 * 4 + 384) + 2 * 384 + (384 * 192 * 4 + 192)
    up_8 = 768 * 384 * 4 + 384
    project = sum(width * 256 + 256 * 256 * 9 + 2 * 2 * 256 for width in (192, 384, 768, 768))
    assert sum(p.numel() for p in pyramid.parameters()) == up_4 + up_8 + project


# -- AdaptFormer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bottleneck", "expected"), [(1, 27_660), (8, 156_768), (64, 1_189_632), (512, 9_452_544)])
def test_adaptformer_has_the_papers_parameters(bottleneck: int, expected: int) -> None:
    with torch.device("meta"):
        blocks = nn.Sequential(*(Block(768, 12, qkv_bias=True) for _ in range(12)))
        before = sum(p.numel() for p in blocks.parameters())
        graft_adaptformer(AdaptFormerConfig(bottleneck=bottleneck), trunk=Stub(*blocks, embed_dim=768))
    assert sum(p.numel() for p in blocks.parameters()) - before == expected


@pytest.mark.parametrize("layout", ["parallel", "sequential"])
@pytest.mark.parametrize("layernorm", ["none", "in", "out"])
@pytest.mark.parametrize("scale", [0.1, "learnable"])
def test_a_graft_starts_as_the_trunk_and_follows_its_equation(layout: Any, layernorm: Any, scale: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(Block(12, 2, qkv_bias=True, init_values=0.5, drop_path=0.3) for _ in range(2))).eval()
    grafted = copy.deepcopy(plain)
    config = AdaptFormerConfig(bottleneck=3, layout=layout, layernorm=layernorm, scale=scale)
    graft_adaptformer(config, trunk=Stub(*grafted, embed_dim=12))
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(grafted(x), plain(x))

    block, adapt = plain[0], grafted[0].adaptmlp
    for parameter in adapt.parameters():
        nn.init.normal_(parameter)
    stream = x + block.ls1(block.attn(block.norm1(x)))
    ffn = block.ls2(block.mlp(block.norm2(stream)))
    branch = stream if layout == "parallel" else ffn
    if layernorm == "in":
        branch = adapt.adapter_layer_norm_before(branch)
    branch = F.linear(F.relu(F.linear(branch, adapt.down_proj.weight, adapt.down_proj.bias)), adapt.up_proj.weight)
    branch = (branch + adapt.up_proj.bias) * (0.1 if scale == 0.1 else adapt.scale)
    if layernorm == "out":
        branch = adapt.adapter_layer_norm_before(branch)
    torch.testing.assert_close(grafted[0](x), stream + ffn + branch, rtol=1e-5, atol=1e-5)

    adapt.reset_parameters()
    torch.testing.assert_close(grafted(x), plain(x))


def test_the_blocks_names_stay_and_the_new_ones_are_official() -> None:
    plain = set(model_of("video_transformer").state_dict())
    config = {"name": "adaptformer", "bottleneck": 4, "scale": "learnable", "layernorm": "in"}
    model = model_of("video_transformer", adapter=[config])
    state = model.state_dict()
    assert plain < set(state)
    names = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias", "scale")
    names += ("adapter_layer_norm_before.weight", "adapter_layer_norm_before.bias")
    prefixes = [f"backbone.vit.blocks.{i}.adaptmlp." for i in range(BACKBONE["depth"])]
    assert set(state) - plain == {prefix + name for prefix in prefixes for name in names}
    assert state[prefixes[0] + "scale"].tolist() == [1.0]


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="block 0 of this trunk is a Linear"):
        graft_adaptformer(AdaptFormerConfig(), trunk=Stub(nn.Linear(3, 3), embed_dim=3))


def test_dropout_acts_in_training_only() -> None:
    block = nn.Sequential(Block(12, 2))
    graft_adaptformer(AdaptFormerConfig(bottleneck=8, dropout=0.5), trunk=Stub(*block, embed_dim=12))
    nn.init.normal_(block[0].adaptmlp.up_proj.weight)
    x = torch.randn(1, 4, 12)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def official(name: str) -> str:
    """A name in the official layout → in timm's, within a block."""
    for ours in ("fc1", "fc2"):
        name = name.replace(f".{ours}.", f".mlp.{ours}.")
    return name


def test_parity_with_the_official_image_model(test_data: Path) -> None:
    case = np.load(test_data / "parity" / "adaptformer_image.npz")
    about = json.loads((test_data / "parity" / "adaptformer_image.json").read_text())
    arrays = {name.removeprefix("sd/"): torch.from_numpy(case[name]) for name in case.files if name.startswith("sd/")}
    width, bottleneck = arrays["blocks.0.adaptmlp.up_proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in arrays if name.startswith("blocks."))
    x = torch.from_numpy(case["in/x"])
    vit = VisionTransformer(
        img_size=x.shape[-1],
        patch_size=arrays["patch_embed.proj.weight"].shape[-1],
        embed_dim=width,
        depth=depth,
        num_heads=find(about, "num_heads"),
        mlp_ratio=arrays["blocks.0.fc1.weight"].shape[0] / width,
        num_classes=0,
    ).eval()
    graft_adaptformer(AdaptFormerConfig(bottleneck=bottleneck, scale=0.1), trunk=Stub(*vit.blocks, embed_dim=width))
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if name.startswith("head."):
            continue
        if ".attn.q_proj." in name:
            parts = [arrays[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            state[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            state[official(name)] = array
    vit.load_state_dict(state)
    seen: list[Tensor] = []
    vit.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        tokens = vit.forward_features(x)
    torch.testing.assert_close(seen[0], torch.from_numpy(case["out/tokens_block0"]), rtol=1e-4, atol=1e-4)
    expected = torch.from_numpy(case["out/pre_logits"])
    torch.testing.assert_close(tokens[:, 0], expected, rtol=1e-4, atol=1e-4)


def find(tree: Any, key: str) -> Any:
    """The value of ``key`` anywhere in a tree of dictionaries."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        return next((found for value in tree.values() if (found := find(value, key)) is not None), None)
    return None
