"""BEiT's trunk against timm's and against sums written out, at any size, with any file of its kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import ADAPTFORMER, PYRAMID, batch_of, loss_of, model_of
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.backbones import BEiTConfig
from vitgraft.models.backbones.beit import Attention, BEiT, Block
from vitgraft.models.backbones.relative_position import resize_bias_table
from vitgraft.models.layer_decay import layer_of

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
SEGMENTATION: dict[str, Any] = {"class_token": True}
DETECTION: dict[str, Any] = {"window_size": [3, 4, 2]}
TABLE = "attn.relative_position_bias_table"


def trunk_of(image_size: tuple[int, int] = (32, 32), *, randomised: bool = True, **options: Any) -> BEiT:
    """A small trunk whose every parameter is drawn anew: nothing is hidden behind a zero or a tiny scale."""
    torch.manual_seed(0)
    trunk = BEiT(BEiTConfig.model_validate(SIZES | options), image_size=image_size)
    if randomised:
        for name, parameter in trunk.named_parameters():
            nn.init.normal_(parameter, std=1.0 if name.endswith("table") else 0.3)
    return trunk.eval()


def timms(image_size: tuple[int, int] = (32, 32), **options: Any) -> Any:
    torch.manual_seed(1)
    sizes = {key: value for key, value in SIZES.items() if key != "patch_size"}
    flags = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1} | options
    vit = Beit(img_size=image_size, patch_size=8, num_classes=0, **sizes, **flags)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def last_tokens(vit: Any, images: Tensor) -> Tensor:
    """timm's tokens after the last block, class token included."""
    caught: list[Tensor] = []
    hook = vit.blocks[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    vit.forward_features(images)
    hook.remove()
    return caught[0]


def saved(vit: Any, folder: Path) -> str:
    save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, folder / "beit.safetensors")
    return str(folder / "beit.safetensors")


def written_out(attention: Attention, tokens: Tensor, grid: tuple[int, int], cls: bool = False) -> Tensor:
    """The attention of one image (N, C) as sums over heads and pairs of tokens."""
    table, heads, (height, width) = attention.relative_position_bias_table, attention.num_heads, grid
    assert table is not None
    assert attention.q_bias is not None
    assert attention.v_bias is not None
    q, k, v = (tokens @ weight.t() for weight in attention.qkv.weight.chunk(3))
    q, v = q + attention.q_bias, v + attention.v_bias
    rows = (2 * height - 1) * (2 * width - 1)
    mixed = torch.zeros_like(q)
    channels = q.shape[1] // heads
    for head in range(heads):
        part = slice(head * channels, (head + 1) * channels)
        logits = torch.zeros(len(tokens), len(tokens))
        for i in range(len(tokens)):
            for j in range(len(tokens)):
                a, b = (i - 1, j - 1) if cls else (i, j)
                if cls and min(i, j) == 0:
                    row = rows + (2 if i == j else 0 if i == 0 else 1)
                else:
                    down, right = a // width - b // width, a % width - b % width
                    row = (down + height - 1) * (2 * width - 1) + right + width - 1
                logits[i, j] = q[i, part] @ k[j, part] / math.sqrt(channels) + table[row, head]
        mixed[:, part] = logits.softmax(1) @ v[:, part]
    result: Tensor = attention.proj(mixed)
    return result


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_with_a_class_token_it_is_timms(size: tuple[int, int], tmp_path: Path) -> None:
    vit, images = timms(size), torch.randn(2, 3, *size)
    trunk = trunk_of(size, class_token=True, weights=saved(vit, tmp_path), randomised=False)
    expected = last_tokens(vit, images)
    torch.testing.assert_close(trunk.tokens(images), expected, atol=1e-5, rtol=1e-4)
    (feature,) = trunk(images)
    assert feature.shape == (2, 24, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(feature.flatten(2).transpose(1, 2), expected[:, 1:], atol=1e-5, rtol=1e-4)


def test_gradients_are_timms(tmp_path: Path) -> None:
    vit, images = timms(), torch.randn(2, 3, 32, 32)
    trunk = trunk_of(class_token=True, weights=saved(vit, tmp_path), randomised=False)
    last_tokens(vit, images).square().mean().backward()
    trunk.tokens(images).square().mean().backward()
    theirs = dict(vit.named_parameters())
    for name, parameter in trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("cls", [False, True])
def test_global_attention_written_out(cls: bool) -> None:
    attention: Any = trunk_of((24, 40), class_token=cls).blocks[0].attn
    tokens = torch.randn(2, 15 + cls, 24)
    expected = torch.stack([written_out(attention, image, (3, 5), cls) for image in tokens])
    torch.testing.assert_close(attention(tokens, (3, 5)), expected, atol=1e-4, rtol=1e-4)


def test_windows_are_filled_up_with_zeros_before_the_projection() -> None:
    block: Any = trunk_of(window_size=3).blocks[1]
    tokens, height, width = torch.randn(1, 35, 24), 5, 7
    normed = torch.zeros(6, 9, 24)
    normed[:height, :width] = block.norm1(tokens)[0].view(height, width, 24)
    attended = torch.zeros(6, 9, 24)
    for top in (0, 3):
        for left in (0, 3, 6):
            window = normed[top : top + 3, left : left + 3].reshape(9, 24)
            attended[top : top + 3, left : left + 3] = written_out(block.attn, window, (3, 3)).view(3, 3, 24)
    middle = tokens + block.gamma_1 * attended[:height, :width].reshape(1, 35, 24)
    expected = middle + block.gamma_2 * block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(tokens, (height, width)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, DETECTION, SEGMENTATION, {"absolute_positions": True}, {"window_size": 9}])
@pytest.mark.parametrize("size", [(32, 32), (16, 72), (56, 8)])
def test_any_size_goes(options: dict[str, Any], size: tuple[int, int]) -> None:
    trunk = trunk_of((32, 48), **options)
    (feature,) = trunk(torch.randn(2, 3, *size))
    assert feature.shape == (2, 24, size[0] // 8, size[1] // 8)
    assert feature.isfinite().all()
    feature.square().mean().backward()
    assert {name for name, p in trunk.named_parameters() if p.grad is None or not p.grad.any()} == set()
    with pytest.raises(ConfigError, match="multiples of the trunk's patch size 8"):
        trunk(torch.randn(1, 3, 20, 32))


@pytest.mark.parametrize("cls", [False, True])
def test_another_grid_is_that_of_a_trunk_built_for_it(cls: bool) -> None:
    large, small = trunk_of((48, 40), class_token=cls), trunk_of((24, 40), class_token=cls)
    state = large.state_dict()
    for index in range(3):
        # The rows of the offsets that the smaller grid has.
        table = state[f"blocks.{index}.{TABLE}"]
        body, extra = table[: 11 * 9].view(11, 9, 2), table[11 * 9 :]
        state[f"blocks.{index}.{TABLE}"] = torch.cat([body[3:8].flatten(0, 1), extra])
    small.load_state_dict(state)
    images = torch.randn(1, 3, 24, 40)
    torch.testing.assert_close(large(images)[0], small(images)[0], atol=1e-4, rtol=1e-4)
    # And a larger one has the resized table.
    wider: Any = trunk_of((56, 40), class_token=cls)
    state = large.state_dict()
    for index in range(3):
        table = state[f"blocks.{index}.{TABLE}"]
        state[f"blocks.{index}.{TABLE}"] = resize_bias_table(table, (6, 5), (7, 5), 3 * cls, lowest_ratio=1)
    wider.load_state_dict(state)
    images = torch.randn(1, 3, 56, 40)
    torch.testing.assert_close(large(images)[0], wider(images)[0], atol=1e-4, rtol=1e-4)


def test_a_visit_sees_patches_only_and_the_class_token_travels() -> None:
    trunk = trunk_of(class_token=True)
    seen: list[tuple[int, tuple[int, ...]]] = []

    def visit(index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        seen.append((index, tuple(tokens.shape)))
        return tokens + 0.1

    images = torch.randn(1, 3, 24, 32)
    changed = trunk(images, visit)[0]
    assert seen == [(index, (1, 12, 24)) for index in range(4)]
    tokens = trunk.embed(images)
    for block in trunk.blocks:
        tokens = block(torch.cat([tokens[:, :1], tokens[:, 1:] + 0.1], 1), (3, 4))
    torch.testing.assert_close(changed.flatten(2).transpose(1, 2), tokens[:, 1:] + 0.1, atol=1e-4, rtol=1e-4)


def test_names_are_the_official_ones() -> None:
    block = {"attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", TABLE}
    block |= {f"{norm}.{kind}" for norm in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")}
    block |= {"gamma_1", "gamma_2"}
    stem = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected = stem | {f"blocks.{index}.{name}" for index in range(3) for name in block}
    assert set(trunk_of(**DETECTION).state_dict()) == expected
    assert set(trunk_of(**SEGMENTATION).state_dict()) == expected | {"cls_token"}
    assert set(trunk_of(absolute_positions=True).state_dict()) == expected | {"pos_embed"}
    assert not any("table" in name for name in trunk_of(relative_bias=False).state_dict())
    assert not any("gamma" in name for name in trunk_of(layer_scale=None).state_dict())
    assert not any("q_bias" in name for name in trunk_of(qkv_bias=False).state_dict())
    layers = {name: layer_of(f"backbone.{name}", 3) for name in expected | {"cls_token", "pos_embed"}}
    assert layers["cls_token"] == layers["pos_embed"] == layers["patch_embed.proj.bias"] == 0
    assert layers[f"blocks.2.{TABLE}"] == 3


def test_published_tables_have_the_published_sizes() -> None:
    with torch.device("meta"):
        windows = [56 if index in (5, 11, 17, 23) else 14 for index in range(24)]
        detection: Any = BEiT(BEiTConfig(size="large", window_size=windows), image_size=(1024, 1024))
        assert detection.blocks[0].attn.relative_position_bias_table.shape == (729, 16)
        assert detection.blocks[23].attn.relative_position_bias_table.shape == (12321, 16)
        for crop, rows in ((896, 12324), (640, 6244), (512, 3972), (480, 3484), (128, 228)):
            config = BEiTConfig(size="base", depth=1, class_token=True)
            segmentation: Any = BEiT(config, image_size=(crop, crop))
            assert segmentation.blocks[0].attn.relative_position_bias_table.shape == (rows, 12)


@pytest.mark.parametrize("size", ["base", "large"])
def test_parameters_are_as_many_as_timms(size: str) -> None:
    sizes = {"base": (768, 12, 12), "large": (1024, 24, 16)}
    with torch.device("meta"):
        trunk = BEiT(BEiTConfig.model_validate({"size": size, "class_token": True}), image_size=(224, 224))
        width, depth, heads = sizes[size]
        options = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_classes": 0, "init_values": 0.1}
        vit = Beit(**options, use_abs_pos_emb=False, use_rel_pos_bias=True)
    final_norm = 2 * width
    assert sum(p.numel() for p in trunk.parameters()) == sum(p.numel() for p in vit.parameters()) - final_norm


def test_evas_giant_has_a_billion_parameters() -> None:
    config = BEiTConfig(size="eva_giant", class_token=True, absolute_positions=True, layer_scale=None)
    with torch.device("meta"):
        trunk = BEiT(config.model_copy(update={"relative_bias": False}), image_size=(224, 224))
    assert round(sum(p.numel() for p in trunk.parameters()) / 1e9, 2) == 1.01
    assert trunk.state_dict()["blocks.39.mlp.fc1.weight"].shape == (6144, 1408)


def test_a_table_shared_by_all_blocks_is_given_to_each(tmp_path: Path) -> None:
    vit = timms(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    trunk = trunk_of(class_token=True, weights=saved(vit, tmp_path), randomised=False)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(trunk.tokens(images), last_tokens(vit, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_tables_of_another_grid_are_resized_and_class_rows_dropped(wrapped: bool, tmp_path: Path) -> None:
    vit, file = timms((48, 48)), tmp_path / "beit.pth"
    state = {f"module.encoder.{name}" if wrapped else name: value for name, value in vit.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, file)
    detection, state = trunk_of(weights=str(file), randomised=False, **DETECTION).state_dict(), vit.state_dict()
    for index, window in enumerate((3, 4, 2)):
        expected = resize_bias_table(state[f"blocks.{index}.{TABLE}"], (6, 6), (window, window), 3)[:-3]
        torch.testing.assert_close(detection[f"blocks.{index}.{TABLE}"], expected)
    segmentation = trunk_of((56, 40), weights=str(file), randomised=False, **SEGMENTATION).state_dict()
    expected = resize_bias_table(state[f"blocks.0.{TABLE}"], (6, 6), (7, 5), 3)
    torch.testing.assert_close(segmentation[f"blocks.0.{TABLE}"], expected)
    torch.testing.assert_close(segmentation["cls_token"], state["cls_token"])


def test_class_rows_that_a_file_lacks_start_at_zero() -> None:
    table = torch.randn(49, 2)
    fitted = trunk_of(class_token=True).resize_loaded(f"blocks.1.{TABLE}", table)
    assert fitted is not None
    assert torch.equal(fitted, torch.cat([table, torch.zeros(3, 2)]))
    assert trunk_of().resize_loaded(f"blocks.1.{TABLE}", torch.randn(50, 2)) is None
    assert trunk_of().resize_loaded("pos_embed", table) is None


def test_weights_without_relative_positions_start_without_bias(tmp_path: Path) -> None:
    vit = timms(use_rel_pos_bias=False, use_abs_pos_emb=True, init_values=None)
    options: dict[str, Any] = {"absolute_positions": True, "class_token": True, "pretrain_size": 32}
    trunk: Any = trunk_of(weights=saved(vit, tmp_path), randomised=False, **options)
    assert not trunk.blocks[0].attn.relative_position_bias_table.any()
    # Without layer scale in the file its scale is 1.
    assert torch.equal(trunk.blocks[2].gamma_1, torch.ones(24))
    plain = trunk_of(weights=saved(vit, tmp_path), randomised=False, relative_bias=False, layer_scale=None, **options)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(trunk(images)[0], plain(images)[0], atol=1e-5, rtol=1e-4)


def test_files_of_another_architecture_are_refused(tmp_path: Path) -> None:
    deeper = saved(timms(), tmp_path)
    with pytest.raises(CheckpointError, match="blocks"):
        trunk_of(depth=4, weights=deeper)
    state = timms().state_dict()
    state[f"blocks.1.{TABLE}"] = torch.zeros(50, 2)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.relative_position_bias_table"):
        trunk_of(weights=str(tmp_path / "odd.pth"), class_token=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": True, "window_size": 4}, "class_token: true needs window_size: 0"),
        ({"window_size": [4, 4]}, "window_size has 2 sizes for 3 blocks"),
        ({"num_heads": 5}, "embed_dim 24 must be a multiple of num_heads 5"),
        ({"pretrain_size": 30}, "pretrain_size 30 must be a multiple of patch_size 8"),
        ({"size": "huge"}, "base"),
        ({"qkv_biass": True}, "qkv_biass"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BEiTConfig.model_validate(SIZES | options)


def test_the_start_is_beits() -> None:
    trunk: Any = trunk_of(randomised=False, embed_dim=64, drop_path=0.4)
    assert not trunk.blocks[0].attn.relative_position_bias_table.any()
    assert torch.equal(trunk.blocks[0].gamma_1, torch.full((64,), 1e-6))
    for index, block in enumerate(trunk.blocks):
        drawn = [layer.weight.detach().std().item() for layer in (block.attn.proj, block.mlp.fc2, block.mlp.fc1)]
        scale = 0.02 / math.sqrt(2 * (index + 1))
        assert drawn == pytest.approx([scale, scale, 0.02], rel=0.1)
    assert [block.drop_path.drop_prob for block in trunk.blocks] == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize("options", [DETECTION, SEGMENTATION])
def test_half_precision_is_near(options: dict[str, Any]) -> None:
    trunk, images = trunk_of(**options), torch.randn(1, 3, 40, 32)
    full = trunk(images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = trunk(images)[0]
    half.float().square().mean().backward()
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()
    assert trunk.bfloat16()(images.bfloat16())[0].dtype == torch.bfloat16


def test_freezing_and_grafting() -> None:
    backbone = SIZES | {"name": "beit", "frozen": True, "layer_scale": 1.0}
    torch.manual_seed(0)
    model = model_of("upernet", backbone=backbone, adapter=[ADAPTFORMER, PYRAMID])
    loss_of(model(**batch_of("upernet"))).backward()
    trained = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert trained
    assert all(".adaptmlp." in name for name in trained)
    for block in model.backbone.blocks:
        assert not block.training
        assert block.adaptmlp.training  # type: ignore[union-attr]


def test_prompts_may_stand_before_tokens_that_no_table_is_bound_to() -> None:
    def takes(**options: Any) -> list[bool]:
        return [block.takes_prompts for block in trunk_of(**options).blocks if isinstance(block, Block)]

    assert takes() == [False] * 3
    assert takes(relative_bias=False) == [True] * 3
    assert takes(relative_bias=False, window_size=[0, 2, 0]) == [True, False, True]
    block: Any = trunk_of(relative_bias=False).blocks[0]
    assert block(torch.randn(1, 5 + 12, 24), (3, 4)).shape == (1, 17, 24)


def test_it_exports_at_another_size_and_runs_on() -> None:
    trunk, images = trunk_of(class_token=True), torch.randn(1, 3, 40, 56)
    exported = torch.export.export(trunk, (images,)).module()
    torch.testing.assert_close(exported(images)[0], trunk(images)[0])
