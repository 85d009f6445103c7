"""Uni-Perceiver's trunk against torch's own transformer layer, at any size, with the files of both releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_samples import ADAPTFORMER, PYRAMID, batch_of, loss_of, model_of
from pydantic import ValidationError
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.backbones import UniPerceiverConfig
from vitgraft.models.backbones.uniperceiver import UniPerceiver
from vitgraft.models.layer_decay import layer_of

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "pretrain_size": 32}
WINDOWS: dict[str, Any] = {"window_size": [3, 0, 2]}


def trunk_of(*, randomised: bool = True, **options: Any) -> UniPerceiver:
    torch.manual_seed(0)
    trunk = UniPerceiver(UniPerceiverConfig.model_validate(SIZES | options), image_size=(32, 32))
    if randomised:
        for parameter in trunk.parameters():
            nn.init.normal_(parameter, std=0.3)
    return trunk.eval()


def torchs_layer(block: Any) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer with the weights of a block; it has no layer scale."""
    layer = nn.TransformerEncoderLayer(24, 2, 96, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_weight": "self_attn.in_proj.weight", "self_attn.in_proj_bias": "self_attn.in_proj.bias"}
    state = block.state_dict()
    layer.load_state_dict({name: state[names.get(name, name)] for name in layer.state_dict()})
    return layer


def test_a_global_block_is_torchs_layer() -> None:
    block: Any = trunk_of(layer_scale=None).blocks[0]
    tokens = torch.randn(2, 12, 24)
    torch.testing.assert_close(block(tokens, (3, 4)), torchs_layer(block)(tokens), atol=1e-5, rtol=1e-4)


def test_layer_scale_weighs_both_branches() -> None:
    block: Any = trunk_of().blocks[0]
    layer, tokens = torchs_layer(block), torch.randn(2, 12, 24)
    normed = layer.norm1(tokens)
    middle = tokens + block.gamma_1 * layer.self_attn(normed, normed, normed)[0]
    expected = middle + block.gamma_2 * layer.linear2(F.gelu(layer.linear1(layer.norm2(middle))))
    torch.testing.assert_close(block(tokens, (3, 4)), expected, atol=1e-5, rtol=1e-4)


def test_windows_are_filled_up_with_zeros_before_the_projection() -> None:
    block: Any = trunk_of(window_size=3, layer_scale=None).blocks[0]
    layer, tokens = torchs_layer(block), torch.randn(1, 35, 24)
    normed, attended = torch.zeros(6, 9, 24), torch.zeros(6, 9, 24)
    normed[:5, :7] = layer.norm1(tokens)[0].view(5, 7, 24)
    for top in (0, 3):
        for left in (0, 3, 6):
            window = normed[top : top + 3, left : left + 3].reshape(1, 9, 24)
            # The zeros get the biases of queries, keys and values here, and nothing masks them.
            inside = layer.self_attn(window, window, window)[0]
            attended[top : top + 3, left : left + 3] = inside.view(3, 3, 24)
    middle = tokens + attended[:5, :7].reshape(1, 35, 24)
    expected = middle + layer.linear2(F.gelu(layer.linear1(layer.norm2(middle))))
    torch.testing.assert_close(block(tokens, (5, 7)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (2, 8)])
def test_the_embedding_adds_place_and_first_moment_and_norms(grid: tuple[int, int]) -> None:
    trunk = trunk_of()
    state, images = trunk.state_dict(), torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    stem = {name.removeprefix("visual_embed."): value for name, value in state.items() if "visual_embed" in name}
    patches = F.conv2d(images, stem["patch_embed.proj.weight"], stem["patch_embed.proj.bias"], stride=8)
    places = stem["patch_embed.spatial_pos_embed.weight"].t().view(1, 24, 4, 4)
    places = F.interpolate(places, grid, mode="bicubic", align_corners=False)
    embedded = (patches + places).flatten(2).transpose(1, 2) + stem["patch_embed.temporal_pos_embed.weight"][0]
    norm = stem["embeddings_norm.weight"], stem["embeddings_norm.bias"]
    torch.testing.assert_close(trunk.embed(images), F.layer_norm(embedded, (24,), *norm, eps=1e-5))


@pytest.mark.parametrize("options", [{}, WINDOWS, {"window_size": 9}])
@pytest.mark.parametrize("size", [(32, 32), (16, 72), (56, 8)])
def test_any_size_goes(options: dict[str, Any], size: tuple[int, int]) -> None:
    trunk = trunk_of(**options)
    (feature,) = trunk(torch.randn(2, 3, *size))
    assert feature.shape == (2, 24, size[0] // 8, size[1] // 8)
    assert feature.isfinite().all()
    feature.square().mean().backward()
    assert {name for name, p in trunk.named_parameters() if p.grad is None or not p.grad.any()} == set()
    with pytest.raises(ConfigError, match="multiples of the trunk's patch size 8"):
        trunk(torch.randn(1, 3, 20, 32))


def official_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the converted files."""
    block = {"self_attn.in_proj.weight": (72, 24), "self_attn.in_proj.bias": (72,), "self_attn.out_proj.bias": (24,)}
    block |= {"self_attn.out_proj.weight": (24, 24), "linear1.weight": (96, 24), "linear1.bias": (96,)}
    block |= {"linear2.weight": (24, 96), "linear2.bias": (24,), "gamma_1": (24,), "gamma_2": (24,)}
    block |= {f"norm{index}.{kind}": (24,) for index in (1, 2) for kind in ("weight", "bias")}
    names: dict[str, tuple[int, ...]] = {f"layers.{i}.{key}": shape for i in range(3) for key, shape in block.items()}
    names |= {f"visual_embed.embeddings_norm.{kind}": (24,) for kind in ("weight", "bias")}
    stem = "visual_embed.patch_embed."
    names |= {f"{stem}proj.weight": (24, 3, 8, 8), f"{stem}proj.bias": (24,)}
    return names | {f"{stem}spatial_pos_embed.weight": (16, 24), f"{stem}temporal_pos_embed.weight": (8, 24)}


def test_converted_files_load_under_the_official_names(tmp_path: Path) -> None:
    state = {name: torch.randn(shape) for name, shape in official_names().items()}
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "converted.pth")
    ours = trunk_of(weights=str(tmp_path / "converted.pth"), randomised=False).state_dict()
    assert len(ours) == len(state)
    for name, value in state.items():
        assert torch.equal(ours[name.replace("layers.", "blocks.")], value), name


def test_files_of_the_original_release_load_too(tmp_path: Path) -> None:
    state, original = {}, {}
    for name, shape in official_names().items():
        state[name] = torch.randn(shape)
        old = name.replace("visual_embed.", "video_embed.").replace("in_proj.", "in_proj_")
        old = old.replace("patch_embed.proj.", "embeddings.").replace("patch_embed.", "embeddings_st_pos.")
        original[f"fused_encoder.{old}" if old.startswith("layers") else old] = state[name]
    original |= {"token_embed.embeddings.weight": torch.zeros(5, 24), "loss_prepare.temperature": torch.zeros(1)}
    torch.save({"model": original}, tmp_path / "original.pth")
    ours = trunk_of(weights=str(tmp_path / "original.pth"), randomised=False).state_dict()
    for name, value in state.items():
        assert torch.equal(ours[name.replace("layers.", "blocks.")], value), name


def test_files_of_another_architecture_are_refused(tmp_path: Path) -> None:
    state = {name: torch.randn(shape) for name, shape in official_names().items()}
    del state["layers.1.linear2.bias"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.linear2\.bias"):
        trunk_of(weights=str(tmp_path / "short.pth"))


def test_layers_for_layer_wise_decay() -> None:
    layers = {name: layer_of(f"backbone.{name}", 3) for name in trunk_of().state_dict()}
    assert {layer for name, layer in layers.items() if name.startswith("visual_embed.")} == {0}
    assert {layer for name, layer in layers.items() if name.startswith("blocks.2.")} == {3}


@pytest.mark.parametrize(("size", "width", "depth"), [("base", 768, 12), ("large", 1024, 24)])
def test_parameters_are_as_many_as_torchs_layers_have(size: str, width: int, depth: int) -> None:
    with torch.device("meta"):
        trunk = UniPerceiver(UniPerceiverConfig.model_validate({"size": size}), image_size=(224, 224))
        layer = nn.TransformerEncoderLayer(width, 12 if size == "base" else 16, 4 * width)
    per_layer = sum(p.numel() for p in layer.parameters()) + 2 * width
    stem = width * 3 * 16 * 16 + width + (196 + 8) * width + 2 * width
    assert sum(p.numel() for p in trunk.parameters()) == depth * per_layer + stem


def test_the_start_leaves_the_stream_as_it_is() -> None:
    trunk: Any = trunk_of(randomised=False, drop_path=0.4)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(trunk.tokens(images), trunk.embed(images))
    assert [block.drop_path.drop_prob for block in trunk.blocks] == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": [4, 4]}, "window_size has 2 sizes for 3 blocks"),
        ({"num_heads": 5}, "embed_dim 24 must be a multiple of num_heads 5"),
        ({"pretrain_size": 30}, "pretrain_size 30 must be a multiple of patch_size 8"),
        ({"class_token": True}, "class_token"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UniPerceiverConfig.model_validate(SIZES | options)


def test_half_precision_is_near() -> None:
    trunk, images = trunk_of(**WINDOWS), torch.randn(1, 3, 40, 32)
    full = trunk(images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = trunk(images)[0]
    half.float().square().mean().backward()
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()
    assert trunk.bfloat16()(images.bfloat16())[0].dtype == torch.bfloat16


def test_freezing_and_grafting() -> None:
    backbone = SIZES | WINDOWS | {"name": "uniperceiver", "frozen": True, "layer_scale": 1.0}
    model = model_of("upernet", backbone=backbone, adapter=[ADAPTFORMER, PYRAMID])
    loss_of(model(**batch_of("upernet"))).backward()
    trained = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert trained
    assert all(".adaptmlp." in name for name in trained)


def test_prompts_may_stand_before_globally_attending_tokens() -> None:
    blocks: list[Any] = list(trunk_of(**WINDOWS).blocks)
    assert [block.takes_prompts for block in blocks] == [False, True, False]
    prompted: Tensor = blocks[1](torch.randn(1, 5 + 12, 24), (3, 4))
    assert prompted.shape == (1, 17, 24)
