"""Adapters: the pyramid's shapes, and AdaptFormer against its equations, its parameter counts and official numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adaptformer_cases import compare
from model_samples import BACKBONE, Stub, model_of
from pydantic import ValidationError
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.backbones import VideoMAEConfig
from vitgraft.configs.schema.model import AdaptFormerConfig, NoAdapterConfig, SimplePyramidConfig
from vitgraft.models.adapters.adaptformer import AdaptMLP, graft_adaptformer
from vitgraft.models.adapters.none import NoAdapter
from vitgraft.models.adapters.simple_pyramid import SimplePyramid
from vitgraft.models.backbones.trunk import Visit
from vitgraft.models.backbones.videomae import VideoMAE

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


@pytest.mark.parametrize(("patch", "strides", "names"), [(16, [4, 8, 16, 32], "2345"), (14, [7, 14, 28], "234")])
def test_the_pyramid_has_vitdets_names(patch: int, strides: list[int], names: str) -> None:
    pyramid = SimplePyramid(SimplePyramidConfig(strides=strides), trunk=Stub(embed_dim=32, patch_size=patch))
    found = set(pyramid.state_dict())
    assert {name.split(".")[0] for name in found} == {f"simfp_{name}" for name in names}
    if patch == 16:
        indices = {"2": "01345", "3": "012", "4": "01", "5": "12"}
        assert {".".join(name.split(".")[:2]) for name in found} == {
            f"simfp_{level}.{index}" for level, all_of in indices.items() for index in all_of
        }
        assert {"simfp_2.4.weight", "simfp_2.4.norm.weight", "simfp_2.4.norm.bias", "simfp_5.2.norm.bias"} < found
        assert not any(name.endswith(("4.bias", "5.bias")) for name in found if name.startswith("simfp_2"))


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (70, 33), (1, 129)])
def test_the_top_block_takes_every_other_place_and_asks_for_no_padding(size: tuple[int, int]) -> None:
    seen: list[tuple[int, int]] = []

    class Averaging(Stub):
        def forward(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, ...]:
            seen.append((images.shape[-2], images.shape[-1]))
            return (F.avg_pool2d(images, 16),)

    trunk = Averaging(embed_dim=3, patch_size=16)
    config = SimplePyramidConfig(channels=8, strides=[16, 32], top_block=True)
    pyramid = SimplePyramid(config, trunk=trunk)
    assert config.map_strides() == pyramid.strides == list(pyramid.channels) == [16, 32, 64]
    maps = pyramid.maps(trunk, torch.randn(2, 3, *size))
    assert seen == [(-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)]
    for stride, level in maps.items():
        assert level.shape == (2, 8, -(-size[0] // stride), -(-size[1] // stride))
    assert torch.equal(maps[64], F.max_pool2d(maps[32], 1, 2))
    plain = SimplePyramid(SimplePyramidConfig(channels=8, strides=[16, 32]), trunk=trunk)
    assert set(plain.state_dict()) == set(pyramid.state_dict())


# -- AdaptFormer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bottleneck", "expected"), [(1, 27_660), (4, 82_992), (64, 1_189_632), (512, 9_452_544)])
def test_adaptformer_has_the_papers_parameters(bottleneck: int, expected: int) -> None:
    with torch.device("meta"):
        blocks = nn.Sequential(*(Block(768, 12, qkv_bias=True) for _ in range(12)))
        before = sum(p.numel() for p in blocks.parameters())
        graft_adaptformer(AdaptFormerConfig(bottleneck=bottleneck), trunk=Stub(*blocks, embed_dim=768))
    assert sum(p.numel() for p in blocks.parameters()) - before == expected


def test_large_trunks_have_the_papers_parameters() -> None:
    for depth, width, expected in ((24, 1024, 3_171_840), (32, 1280, 5_285_888)):
        with torch.device("meta"):
            trunk = Stub(*(Block(width, 16) for _ in range(depth)), embed_dim=width)
            graft_adaptformer(AdaptFormerConfig(), trunk=trunk)
        assert sum(p.numel() for name, p in trunk.named_parameters() if ".adaptmlp." in name) == expected


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


def test_blocks_may_be_chosen() -> None:
    model = model_of("video_transformer", adapter=[{"name": "adaptformer", "bottleneck": 4, "blocks": [1]}])
    assert ["adaptmlp" in dict(block.named_children()) for block in model.backbone.blocks] == [False, True]
    with pytest.raises(ConfigError, match=r"adaptformer\.blocks: 2 is beyond the last of this trunk's 2 blocks"):
        model_of("video_transformer", adapter=[{"name": "adaptformer", "blocks": [0, 2]}])
    for wrong in ([], [1, 0], [1, 1], [-1]):
        with pytest.raises(ValidationError, match="blocks"):
            AdaptFormerConfig(blocks=wrong)


def test_the_starts() -> None:
    torch.manual_seed(0)
    mlps = {init: AdaptMLP(AdaptFormerConfig(init=init), 256) for init in ("lora", "trunc_normal", "default")}
    down, up = ({init: getattr(mlp, name) for init, mlp in mlps.items()} for name in ("down_proj", "up_proj"))
    bound = 256**-0.5  # of torch's uniform start of a Linear, which is Kaiming's with a = √5
    assert float(down["lora"].weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert not up["lora"].weight.any()
    for layer in (down["trunc_normal"], up["trunc_normal"]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(down["default"].weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(up["default"].weight.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.01)
    for init in ("lora", "trunc_normal"):
        assert not down[init].bias.any()
        assert not up[init].bias.any()
    assert up["default"].bias.any()


@pytest.mark.parametrize("init", ["lora", "trunc_normal"])
def test_the_zero_start_holds_on_clips_unless_the_original_is_asked_for(init: Any) -> None:
    trunk = VideoMAE(VideoMAEConfig(embed_dim=24, depth=2, num_heads=2, patch_size=8), image_size=(16, 16)).eval()
    clips = torch.randn(1, 3, 4, 16, 16)
    before = trunk(clips)[0]
    graft_adaptformer(AdaptFormerConfig(init=init), trunk=trunk)
    assert torch.equal(trunk(clips)[0], before) == (init == "lora")


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_timms_eva_block(init_values: float | None) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"swiglu_mlp": True, "init_values": init_values, "num_prefix_tokens": 0}
    plain = EvaBlock(16, 2, **options).eval()
    grafted = copy.deepcopy(plain)
    graft_adaptformer(AdaptFormerConfig(bottleneck=3), trunk=Stub(grafted, embed_dim=16))
    x, rope = torch.randn(2, 5, 16), torch.randn(5, 16)
    torch.testing.assert_close(grafted(x, rope=rope), plain(x, rope=rope))
    nn.init.normal_(grafted.adaptmlp.up_proj.weight)
    seen: list[Tensor] = []
    grafted.norm2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = grafted(x, rope=rope)
    torch.testing.assert_close(found, plain(x, rope=rope) + grafted.adaptmlp(seen[0]))


@pytest.mark.parametrize("name", ["adaptformer_image", "adaptformer_image_seq_vpt"])
def test_parity_with_the_official_image_models(name: str, test_data: Path) -> None:
    compare(test_data, name)
