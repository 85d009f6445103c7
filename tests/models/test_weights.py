"""Loading weights: every convention of the published files, files that are wrong or hostile, and what is reported."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from model_samples import ADAPTFORMER, BACKBONE, CLASSES, HEADS, PYRAMID, model_of
from pydantic import TypeAdapter
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.model import BackboneConfig, ModelConfig
from vitgraft.models import registry
from vitgraft.models.backbones.relative_position import resize_bias_table
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.resizing import resize_patch_kernel, resize_positions
from vitgraft.models.weights import Layout, LoadReport, convert_weights, load_trunk, load_weights, read_tensors

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
VIT = {"name": "vit", "patch_size": 8, **SIZES}
BEIT = {"name": "beit", "patch_size": 8, "pretrain_size": 32, "layer_scale": 0.1, **SIZES}
EVA01 = {"name": "eva01", "patch_size": 8, "pretrain_size": 32, "window_size": 2, "global_blocks": [1], **SIZES}
EVA02 = {
    **EVA01,
    "name": "eva02",
    "rope_grid": 4,
    "num_heads": 3,
}
VIDEO = {"name": "videomae", "patch_size": 8, "tubelet_size": 2, **SIZES}

State = dict[str, Tensor]


def trunk(section: dict[str, Any], seed: int = 0, size: tuple[int, int] = (32, 32), **options: Any) -> Trunk:
    """A small trunk whose tensors are all random, biases and tables included."""
    config: Any = TypeAdapter(BackboneConfig).validate_python(section | options)
    built: Trunk = registry.build("backbone", config, image_size=size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in built.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return built.eval()


def official(section: dict[str, Any], **options: Any) -> tuple[Trunk, State]:
    """A trunk and its tensors under the official names (those of timm without ``vit.``)."""
    source = trunk(section, seed=1, **options)
    return source, {name.removeprefix("vit."): value.clone() for name, value in source.state_dict().items()}


def same(a: Trunk, b: Trunk) -> bool:
    """Whether two trunks compute the same of one input."""
    shape = (1, 3, 4, 32, 32) if a.takes_clips else (1, 3, 32, 32)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return torch.allclose(a(images)[-1], b(images)[-1], atol=1e-6)


def loaded(section: dict[str, Any], state: State, **options: Any) -> tuple[Trunk, LoadReport]:
    target = trunk(section, **options)
    return target, load_weights(target, state, where="test")


def renamed(state: State, *rules: tuple[str, str]) -> State:
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def split(state: State, drop_key_bias: bool = False) -> State:
    """qkv as three layers."""
    result: State = {}
    for name, value in state.items():
        if ".attn.qkv." not in name:
            result[name] = value
            continue
        for letter, third in zip("qkv", value.chunk(3), strict=True):
            result[name.replace(".qkv.", f".{letter}_proj.")] = third
    return result


def fused(state: State) -> State:
    """q_proj, k_proj and v_proj as one layer."""
    result = {name: value for name, value in state.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in state:
        if ".q_proj." in name:
            thirds = [state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            result[name.replace(".q_proj.", ".qkv.")] = torch.cat(thirds)
    return result


# -- Names -----------------------------------------------------------------------------------------------------------

CONVENTIONS: dict[str, tuple[dict[str, Any], Callable[[State], State]]] = {
    "as it is": (VIT, lambda state: state),
    "AdaptFormer image: split, no mlp": (VIT, lambda state: renamed(split(state), (r"\.mlp\.fc", ".fc"))),
    "wrapped": (VIT, lambda state: {f"module.backbone.{name}": value for name, value in state.items()}),
    "detectron2": (EVA01, lambda state: {f"backbone.net.{name}": value for name, value in state.items()}),
    "pure encoder": (VIDEO, lambda state: {f"encoder.{name}": value for name, value in state.items()}),
    "AdaptFormer video": (VIDEO, lambda state: renamed(split(state), (r"\.mlp\.fc", ".fc"))),
    "mmaction2": (
        VIDEO,
        lambda state: renamed(
            {f"backbone.{name}": value for name, value in state.items()},
            (r"\.mlp\.fc1\.", ".mlp.layers.0.0."),
            (r"\.mlp\.fc2\.", ".mlp.layers.1."),
            (r"patch_embed\.proj", "patch_embed.projection"),
        ),
    ),
    "EVA-02 fused": (EVA02, fused),
    "DeiT III gammas": (VIT | {"layer_scale": 0.1}, lambda state: renamed(state, (r"ls(\d)\.gamma", r"gamma_\1"))),
    "ViT-Adapter gammas": (VIT | {"layer_scale": 0.1}, lambda state: renamed(state, (r"ls(\d)\.gamma", r"gamma\1"))),
    "BEiT gammas": (BEIT, lambda state: renamed(state, (r"gamma_(\d)", r"ls\1.gamma"))),
    "with class token": (
        VIT,
        lambda state: (
            state
            | {"cls_token": torch.ones(1, 1, 24), "pos_embed": torch.cat([torch.ones(1, 1, 24), state["pos_embed"]], 1)}
        ),
    ),
    "half precision": (VIT, lambda state: {name: value.half() for name, value in state.items()}),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_gives_the_same_outputs(convention: str) -> None:
    section, convert = CONVENTIONS[convention]
    source, state = official(section)
    if convention == "half precision":
        source.load_state_dict({name: value.half().float() for name, value in source.state_dict().items()})
    target = trunk(section)
    assert not same(source, target)
    report = load_weights(target, convert(state), where="test", strict=True)
    assert same(source, target)
    assert not report.unexpected
    assert not report.resized or convention == "with class token"


def test_queries_and_values_with_a_bias_and_keys_without() -> None:
    source, state = official(VIT)
    for index in range(2):
        queries, keys, values = state.pop(f"blocks.{index}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{index}.attn.q_bias": queries, f"blocks.{index}.attn.v_bias": values}
        source.blocks[index].attn.qkv.bias.data[24:48] = 0  # type: ignore[union-attr, index]
        del keys
    target, report = loaded(VIT, state)
    assert same(source, target)
    assert not report.unexpected


def test_a_bias_of_the_keys_is_left_out_where_there_is_none() -> None:
    """It adds the same number to all logits of a query."""
    source, state = official(EVA01 | {"qkv_bias": "full"})
    target, report = loaded(EVA01, state)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(images), source(images), rtol=1e-4, atol=1e-5)
    separate = split(state)
    target, report = loaded(EVA01, separate)
    assert report.ignored["blocks.0.attn.k_proj.bias"].startswith("adds one number to all logits")
    with torch.no_grad():
        torch.testing.assert_close(target(images), source(images), rtol=1e-4, atol=1e-5)


def test_a_file_without_layer_scales_counts_them_as_one() -> None:
    source, state = official(VIT)
    target, report = loaded(VIT | {"layer_scale": 0.1}, state)
    assert same(source, target)
    assert "counts as one" in report.fresh["vit.blocks.0.ls1.gamma"]
    state["blocks.0.gamma1"] = torch.ones(24)
    with pytest.raises(CheckpointError, match=r"lacks 3 of the trunk's \d+ tensors: vit\.blocks\.0\.ls2\.gamma"):
        loaded(VIT | {"layer_scale": 0.1}, state)


def test_buffers_that_are_computed_and_decoders_are_not_wanted() -> None:
    source, state = official(BEIT)
    state |= {
        "blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
        "blocks.1.attn.rope.freqs_cos": torch.ones(16, 8),
        "rope_glb.freqs_sin": torch.ones(16, 8),
        "mask_token": torch.ones(1, 1, 24),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_pos_embed": torch.ones(1, 17, 8),
        "head.weight": torch.ones(5, 24),
        "cls_token": torch.ones(1, 1, 24),
    }
    target, report = loaded(BEIT, state)
    assert same(source, target)
    assert report.unexpected == []
    assert len(report.ignored) == 8
    assert report.ignored["decoder_pos_embed"] == "only masked pre-training uses it"


def test_a_shared_table_is_given_to_every_block() -> None:
    source, state = official(BEIT)
    table = state["blocks.0.attn.relative_position_bias_table"]
    source.blocks[1].attn.relative_position_bias_table.data.copy_(table)  # type: ignore[union-attr, operator, arg-type]
    state = {name: value for name, value in state.items() if "relative_position" not in name}
    state["rel_pos_bias.relative_position_bias_table"] = table
    target, report = loaded(BEIT, state)
    assert same(source, target)
    assert report.unexpected == []


def test_timm_converts_what_names_alone_do_not(tmp_path: Path) -> None:
    """DINOv2 with registers: other names, and the class token's position belongs to the token."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
    vit = VisionTransformer(**sizes, reg_tokens=4, no_embed_class=True, num_classes=0, init_values=1.0)
    state = {name: torch.randn(value.shape) for name, value in vit.state_dict().items()}
    position = torch.randn(1, 1, 24)
    published = dict(state)
    published["register_tokens"] = published.pop("reg_token")
    published["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    published["mask_token"] = torch.zeros(1, 24)
    report = load_weights(vit, {f"module.{name}": value for name, value in published.items()}, where="test")
    state["cls_token"] = state["cls_token"] + position
    for name, value in vit.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert report.unexpected == []


@pytest.mark.parametrize(
    "prefix", ["image_encoder.", "student.model.", "_orig_mod.", "module._orig_mod.", "a.b.c.", "backbone._orig_mod."]
)
def test_any_common_prefix_is_taken_and_said(prefix: str) -> None:
    source, state = official(VIT)
    other = {"text.weight": torch.ones(2)}
    target, report = loaded(VIT, {prefix + name: value for name, value in state.items()} | other)
    assert same(source, target)
    plain = prefix.replace("_orig_mod.", "")
    assert report.prefixes == ([f"{plain} for the trunk"] if plain else [])


def test_the_image_encoder_of_sam() -> None:
    """ViTDet's trunk, with positions as a map and an FFN of other names."""
    section = EVA01 | {"qkv_bias": "full", "norm_eps": 1e-6}
    source, state = official(section)
    state["pos_embed"] = state["pos_embed"][:, 1:].reshape(1, 4, 4, 24)
    file = renamed(state, (r"mlp\.fc(\d)", r"mlp.lin\1"), ("^", "image_encoder."))
    file |= {"image_encoder.neck.0.weight": torch.ones(2, 24, 1, 1), "mask_decoder.iou_token.weight": torch.ones(1, 2)}
    target, report = loaded(section, file)
    assert same(source, target)
    assert not report.unexpected


def test_what_compiling_puts_inside_names_is_passed_over() -> None:
    source, state = official(VIT)
    target, report = loaded(
        VIT, renamed(state, (r"^blocks\.(\d)\.", r"blocks.\1._orig_mod."), (r"attn\.", "attn._orig_mod."))
    )
    assert same(source, target)
    assert not report.unexpected


def test_of_two_prefixes_the_teacher_is_taken_and_both_are_said(tmp_path: Path) -> None:
    (teacher, averaged), (student, state) = official(VIT), (trunk(VIT, seed=3), {})
    state = {f"student.model.{name.removeprefix('vit.')}": value for name, value in student.state_dict().items()}
    state |= {f"teacher.model.{name}": value for name, value in averaged.items()}
    target, report = loaded(VIT, state)
    assert same(teacher, target)
    assert report.prefixes == ["teacher.model. for the trunk, as much stands under student.model.: FILE#PREFIX chooses"]
    assert not report.unexpected or all(name.startswith("student") for name in report.unexpected)
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "both.safetensors")
    target, _ = loaded(VIT, read_tensors(f"{tmp_path / 'both.safetensors'}#student"))
    assert same(student, target)


def test_a_file_fine_tuned_on_the_mean_of_the_tokens_has_no_final_norm() -> None:
    """MAE's: fc_norm norms the mean, and the tokens' own norm starts fresh."""
    _, state = official(VIT)
    fine = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v for name, v in state.items()}
    _, report = loaded(VIT, fine)
    assert list(report.fresh) == ["vit.norm.bias", "vit.norm.weight"]
    assert report.ignored.keys() == {"fc_norm.weight", "fc_norm.bias"}
    bare = {name: value for name, value in state.items() if not name.startswith("norm.")}
    with pytest.raises(CheckpointError, match=r"lacks 2 of the trunk's 29 tensors: vit\.norm\.weight"):
        loaded(VIT, bare)


def test_renames_of_a_layout_and_all_or_none_of_what_may_be_fresh() -> None:
    class Part(nn.Module):
        layout = Layout(
            renames=((r"^old\.", "new."),), ignored=((r"junk\.", "it is junk"),), fresh=((r"extra\.", "files lack it"),)
        )

        def __init__(self) -> None:
            super().__init__()
            self.new, self.extra = nn.Linear(2, 2), nn.Linear(2, 2)

    state = {"old.weight": torch.ones(2, 2), "old.bias": torch.ones(2), "junk.x": torch.ones(1)}
    part = Part()
    report = load_weights(part, state, where="test", strict=True)
    assert part.new.weight.sum() == 4
    assert report.ignored == {"junk.x": "it is junk"}
    assert report.fresh == {"extra.weight": "files lack it", "extra.bias": "files lack it"}
    with pytest.raises(CheckpointError, match=r"lacks 1 of the trunk's 4 tensors: extra\.bias"):
        load_weights(part, state | {"extra.weight": torch.ones(2, 2)}, where="test")


# -- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 32)])
def test_positions_are_resized_bicubically(size: tuple[int, int], rows: int) -> None:
    _, state = official(VIT, size=(48, 48))
    table = state["pos_embed"]
    state["pos_embed"] = torch.cat([torch.full((1, rows, 24), 7.0), table], 1)
    target, report = loaded(VIT, state, size=size)
    grid = [size[0] // 8, size[1] // 8]
    expected = resample_abs_pos_embed(table, grid, [6, 6], num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(target.state_dict()["vit.pos_embed"], expected)
    assert report.resized == {"vit.pos_embed": f"(1, {36 + rows}, 24) → (1, {grid[0] * grid[1]}, 24)"}


def test_rows_of_prefix_tokens_begin_with_the_class_token() -> None:
    table, initial = torch.arange(6.0).view(1, 6, 1), -torch.arange(9.0).view(1, 9, 1)
    of = resize_positions(table, initial, 1, (2, 2))  # a distilled DeiT's: class, distillation, 2 × 2 patches
    assert of is not None
    assert of.flatten().tolist() == [0, 2, 3, 4, 5]
    of = resize_positions(table[:, 1:], initial, 5, (2, 2))  # four registers more than the file
    assert of is not None
    assert of.flatten().tolist() == [1, -1, -2, -3, -4, 2, 3, 4, 5]
    assert resize_positions(torch.ones(1, 8, 1), initial, 0, (2, 2)) is None
    assert resize_positions(torch.ones(1, 9, 2), initial, 0, (2, 2)) is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("vit.blocks.0.norm1.weight", torch.tensor(float("nan")), "holds numbers that are not finite; fetch the file"),
        ("vit.blocks.0.norm1.weight", torch.tensor(float("inf")), "holds numbers that are not finite"),
        ("vit.patch_embed.proj.weight", torch.zeros(32, 3, 0, 0), r"has shape \(32, 3, 0, 0\)"),
        ("vit.pos_embed", torch.zeros(1, 0, 32), r"has shape \(1, 0, 32\)"),
    ],
)
def test_numbers_that_are_none_and_tensors_without_any_are_refused(name: str, value: Tensor, says: str) -> None:
    model = trunk(VIT)
    state = model.state_dict()
    state[name] = torch.full_like(state[name], value.item()) if value.ndim == 0 else value
    with pytest.raises(CheckpointError, match=says):
        load_weights(model, state, where="test")


@pytest.mark.parametrize("section", [BEIT, EVA01])
def test_tables_of_another_number_of_heads_are_refused(section: dict[str, Any]) -> None:
    _, state = official(section, size=(24, 24))
    name = next(name for name in state if "rel" in name)
    state[name] = torch.ones(len(state[name]), 5)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(\d+, 5\), the trunk's is"):
        loaded(section, state, size=(48, 48))


def test_an_oblong_canvas_of_as_many_places_gets_a_resized_table_but_keeps_its_own() -> None:
    _, state = official(VIT, size=(32, 32))
    target, report = loaded(VIT, state, size=(16, 64))
    grid = resample_abs_pos_embed(state["pos_embed"], [2, 8], [4, 4], num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(target.state_dict()["vit.pos_embed"], grid)
    own, report = loaded(VIT, {f"backbone.{name}": value for name, value in target.state_dict().items()}, size=(16, 64))
    torch.testing.assert_close(own.state_dict()["vit.pos_embed"], grid)
    assert not report.resized


@pytest.mark.parametrize("class_rows", [0, 3])
def test_relative_position_tables_are_resized_by_the_geometric_rule(class_rows: int) -> None:
    _, state = official(BEIT, size=(24, 24))
    name = "blocks.0.attn.relative_position_bias_table"
    table = state[name]
    for index in range(2):
        own = state[name.replace("0", str(index))]
        state[name.replace("0", str(index))] = torch.cat([own, torch.full((class_rows, 2), 9.0)])
    target, report = loaded(BEIT, state, size=(48, 48))
    torch.testing.assert_close(target.state_dict()[name], resize_bias_table(table, (3, 3), (6, 6), 0))
    assert report.resized[name] == f"({25 + class_rows}, 2) → (121, 2)"


def test_decomposed_relative_positions_are_resized_linearly() -> None:
    _, state = official(EVA01, size=(24, 24))
    name = "blocks.1.attn.rel_pos_h"
    target, _ = loaded(EVA01, state, size=(48, 32))
    expected = nn.functional.interpolate(state[name].t()[None], size=11, mode="linear")[0].t()
    torch.testing.assert_close(target.state_dict()[name], expected)
    assert target.state_dict()["blocks.1.attn.rel_pos_w"].shape == (7, 12)


@pytest.mark.parametrize("dinov2", [False, True])
def test_patch_kernels_are_resized_from_14_to_16(dinov2: bool) -> None:
    options: dict[str, Any] = {"layer_scale": 1.0} if dinov2 else {}
    _, state = official(VIT | {"patch_size": 14} | options, size=(56, 56))
    target, report = loaded(VIT | {"patch_size": 16} | options, state, size=(64, 64))
    kernel, mode = state["patch_embed.proj.weight"], "bilinear" if dinov2 else "bicubic"
    expected = nn.functional.interpolate(kernel, (16, 16), mode=mode, align_corners=False)
    torch.testing.assert_close(target.state_dict()["vit.patch_embed.proj.weight"], expected)
    assert list(report.resized) == ["vit.patch_embed.proj.weight"]


def test_a_kernel_of_images_embeds_a_still_clip_as_its_frame() -> None:
    kernel = torch.randn(5, 3, 4, 4)
    tubelet = resize_patch_kernel(kernel, (2, 4, 4))
    assert tubelet is not None
    image = torch.randn(1, 3, 8, 8)
    clip = image[:, :, None].expand(-1, -1, 2, -1, -1)
    still = nn.functional.conv3d(clip, tubelet, stride=(2, 4, 4))[:, :, 0]
    torch.testing.assert_close(still, nn.functional.conv2d(image, kernel, stride=4))


def test_conversion_is_differentiable() -> None:
    _, state = official(VIT, size=(64, 64))
    leaves = {name: value.requires_grad_() for name, value in split(state).items()}
    values = convert_weights(trunk(VIT), leaves, where="test").values[""]
    torch.stack([value.sum() for value in values.values()]).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
    torch.testing.assert_close(leaves["blocks.0.attn.k_proj.weight"].grad, torch.ones(24, 24))


def with_class_token(state: State, rows: int = 1, **tokens: Tensor) -> State:
    """A file whose table has ``rows`` of prefix tokens before the places."""
    table = torch.cat([torch.full((1, rows, 24), 7.0), state["pos_embed"]], 1)
    return state | {"cls_token": torch.ones(1, 1, 24), "pos_embed": table, **tokens}


def test_the_class_token_of_a_file_tells_a_grid_that_is_not_square() -> None:
    """16 rows: not 4 × 4 places, but a class token's and 3 × 5."""
    _, state = official(VIT, size=(24, 40))
    file = with_class_token(state)
    assert file["pos_embed"].shape[1] == 16
    target, report = loaded(VIT, file, size=(24, 40))
    assert torch.equal(target.state_dict()["vit.pos_embed"], state["pos_embed"])
    whole, report = loaded(VIT | {"class_token": True}, file, size=(24, 40))
    assert torch.equal(whole.state_dict()["vit.pos_embed"], file["pos_embed"])
    assert not report.resized
    for size in (32, 32), (48, 80):
        with pytest.raises(CheckpointError, match=r"vit\.pos_embed has 16 rows, the class token's.*neither a square"):
            loaded(VIT, file, size=size)
    registers = with_class_token(state, 5, reg_token=torch.ones(1, 4, 24))
    target, report = loaded(VIT, registers, size=(24, 40))
    assert torch.equal(target.state_dict()["vit.pos_embed"], state["pos_embed"])
    assert report.ignored["reg_token"] == "this trunk has no registers"


def test_an_exported_file_says_for_which_canvas_its_table_is(tmp_path: Path) -> None:
    """2 × 8 places are as many as 4 × 4."""
    _, state = official(VIT, size=(16, 64))
    save_file(state, tmp_path / "x.safetensors", {"image_size": "[16, 64]"})
    target = trunk(VIT, size=(16, 64))
    load_trunk(target, tmp_path / "x.safetensors")
    assert torch.equal(target.state_dict()["vit.pos_embed"], state["pos_embed"])
    square = trunk(VIT, size=(32, 32))
    load_trunk(square, tmp_path / "x.safetensors")
    expected = resample_abs_pos_embed(state["pos_embed"], [4, 4], [2, 8], num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(square.state_dict()["vit.pos_embed"], expected)


def test_class_tokens_without_a_row_of_the_table() -> None:
    """DeiT III's, whose blocks have layer scales."""
    section = VIT | {"layer_scale": 0.1}
    _, state = official(section)
    file = state | {"cls_token": torch.ones(1, 1, 24)}
    target, _ = loaded(section, file)
    assert torch.equal(target.state_dict()["vit.pos_embed"], state["pos_embed"])
    target, _ = loaded(section, file, size=(16, 40))
    expected = resample_abs_pos_embed(state["pos_embed"], [2, 5], [4, 4], num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(target.state_dict()["vit.pos_embed"], expected)


# -- One file for several parts --------------------------------------------------------------------------------------


def model_with(weights: Path | None, adapter: list[dict[str, Any]]) -> GraftedModel:
    tree = {"backbone": BACKBONE, "adapter": adapter, "head": HEADS["upernet"], "weights": weights and str(weights)}
    torch.manual_seed(5)
    return build_model(ModelConfig.model_validate(tree), num_classes=CLASSES, image_size=(64, 64))


def test_trunk_grafts_and_adapter_from_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = model_of("upernet", adapter=[ADAPTFORMER, PYRAMID])
    published = {f"backbone.{name.removeprefix('vit.')}": v for name, v in source.backbone.state_dict().items()}
    published |= {f"backbone.{name}": v for name, v in source.adapter.state_dict().items()}
    save_file(published, tmp_path / "official.safetensors")
    save_file({name: v for name, v in source.state_dict().items() if "head" not in name}, tmp_path / "own.safetensors")
    for file in "official.safetensors", "own.safetensors":
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="vitgraft.models.weights"):
            model = model_with(tmp_path / file, [ADAPTFORMER, PYRAMID])
        for part in "backbone", "adapter":
            expected = source.get_submodule(part).state_dict()
            for name, value in model.get_submodule(part).state_dict().items():
                assert torch.equal(value, expected[name]), (file, name)
        heads = [torch.cat([p.flatten() for p in m.head.parameters()]) for m in (model, source)]
        assert not torch.equal(*heads)
        assert len(caplog.records) == 1
        assert re.search(r"loaded: backbone \d+ tensors, adapter \d+ tensors$", caplog.records[0].getMessage())


def test_parts_that_a_file_lacks_are_fresh_as_a_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = model_of("upernet")
    save_file(source.backbone.state_dict(), tmp_path / "trunk.safetensors")
    with caplog.at_level(logging.INFO, logger="vitgraft.models.weights"):
        model_with(tmp_path / "trunk.safetensors", [ADAPTFORMER, PYRAMID])
    (record,) = caplog.records
    assert "freshly initialised: adaptformer: the file holds none of its 8 tensors" in record.getMessage()
    assert "freshly initialised: adapter: the file holds none of its " in record.getMessage()
    half = source.backbone.state_dict() | {"simfp_2.0.weight": source.adapter.state_dict()["simfp_2.0.weight"]}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.weights: .*half\.safetensors lacks \d+ of the adapter's"):
        model_with(tmp_path / "half.safetensors", [PYRAMID])
    graft = {"blocks.0.adaptmlp.up_proj.bias": torch.ones(24)}
    save_file(source.backbone.state_dict() | graft, tmp_path / "graft.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 7 of the adaptformer's 8 tensors: vit\.blocks\.0\.adaptmlp"):
        model_with(tmp_path / "graft.safetensors", [ADAPTFORMER, PYRAMID])
    save_file(source.adapter.state_dict(), tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 29 of the trunk's 29 tensors"):
        model_with(tmp_path / "adapter.safetensors", [PYRAMID])


def test_prompts_of_a_tuned_model() -> None:
    prompts = {"name": "vpt", "prompts": 3}
    source = model_of("video_transformer", adapter=[prompts])
    state = renamed(
        source.backbone.state_dict(), (r"^vit\.", ""), (r"^blocks\.(\d)\.prompts\.tokens", r"embeddings.\1")
    )
    assert "embeddings.1" in state
    model = model_with_prompts = model_of("video_transformer", adapter=[prompts])
    for parameter in model.backbone.parameters():
        nn.init.zeros_(parameter)
    load_weights({"backbone": model_with_prompts.backbone}, state, where="test", strict=True)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.backbone.state_dict()[name]), name


def test_without_weights_names_no_file() -> None:
    tree = {"backbone": BACKBONE | {"weights": "a.pth"}, "head": HEADS["video_transformer"]}
    bare = ModelConfig.model_validate(tree).without_weights()
    assert bare.backbone.weights is None
    bare = ModelConfig.model_validate({**tree, "backbone": BACKBONE, "weights": "b.pth"}).without_weights()
    assert bare.weights is None
    with pytest.raises(ValueError, match=r"weights names a file for the trunk too; remove backbone\.weights"):
        ModelConfig.model_validate({**tree, "weights": "b.pth"})


# -- The report ------------------------------------------------------------------------------------------------------


def test_the_report_says_everything_once(caplog: pytest.LogCaptureFixture) -> None:
    _, state = official(VIT, size=(48, 48))
    state |= {"head.weight": torch.ones(2, 24), "head.bias": torch.ones(2), "surprise.x": torch.ones(1)}
    with caplog.at_level(logging.INFO, logger="vitgraft.models.weights"):
        target, report = loaded(VIT | {"layer_scale": 0.1}, state)
    (record,) = caplog.records
    count = len(target.state_dict())
    assert record.getMessage() == (
        "weights of test:\n"
        f"  loaded: {count - 4} tensors\n"
        "  resized: vit.pos_embed (1, 36, 24) → (1, 16, 24)\n"
        "  freshly initialised: vit.blocks.0.ls1.gamma, vit.blocks.0.ls2.gamma, vit.blocks.1.ls1.gamma, "
        "vit.blocks.1.ls2.gamma: absent in this kind of file, where it counts as one\n"
        "  not wanted: head.weight, head.bias: classifies the data of its training\n"
        "  unexpected: surprise.x"
    )
    assert report.unexpected == ["surprise.x"]
    with pytest.raises(CheckpointError, match=r"holds 1 tensors that nothing here takes: surprise\.x"):
        load_weights(target, state, where="test", strict=True)


# -- Wrong and hostile files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.norm1.bias": None}, r"lacks 1 of the trunk's 29 tensors: vit\.blocks\.1\.norm1\.bias; it holds"),
        ({"pos_embed": torch.ones(1, 7, 24)}, r"vit\.pos_embed has shape \(1, 7, 24\), the trunk's is \(1, 16, 24\)"),
        ({"norm.weight": torch.ones(25)}, r"vit\.norm\.weight has shape \(25,\), the trunk's is \(24,\)"),
        ({"norm.weight": torch.ones(24, dtype=torch.int)}, r"vit\.norm\.weight is of type torch\.int32, expected"),
        ({"blocks.2.norm1.bias": torch.ones(24)}, r"more than the trunk's blocks: blocks\.2\.norm1\.bias; there are 2"),
        ({"blocks.0.gamma_1": torch.ones(24)}, r"blocks\.0\.gamma_1 has no place in the trunk.*set the option"),
        (
            {"norm.running_var": torch.ones(24)},
            r"norm\.running_var is the statistics of a BatchNorm.*norm: bn or syncbn",
        ),
    ],
)
def test_what_does_not_fit_names_key_and_expectation(change: dict[str, Tensor | None], message: str) -> None:
    _, state = official(VIT)
    target = trunk(VIT)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    changed = {name: value for name, value in (state | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(target, changed, where="model.backbone.weights: file.pth")
    assert str(error.value).startswith("model.backbone.weights: file.pth")
    assert "\n" not in str(error.value)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])


def test_batch_norm_into_layer_norm_is_refused(tmp_path: Path) -> None:
    batch = model_of("upernet", adapter=[PYRAMID | {"norm": "bn"}])
    save_file({n: v for n, v in batch.state_dict().items() if "head" not in n}, tmp_path / "bn.safetensors")
    with pytest.raises(CheckpointError, match=r"simfp_2\.\d\.norm\.running_mean is the statistics of a BatchNorm"):
        model_with(tmp_path / "bn.safetensors", [PYRAMID | {"norm": "ln"}])
    layer = model_of("upernet", adapter=[PYRAMID | {"norm": "ln"}])
    save_file({n: v for n, v in layer.state_dict().items() if "head" not in n}, tmp_path / "ln.safetensors")
    with pytest.raises(CheckpointError, match=r"of the adapter's \d+ tensors: simfp_2\.\d\.norm\.running_mean"):
        model_with(tmp_path / "ln.safetensors", [PYRAMID | {"norm": "bn"}])


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_malicious_pickle_is_run(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(1)}, "x": Hostile(tmp_path / "pwned")}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match=r"holds Python objects.*\(posix\.mkdir\), and.*could run code; save"):
        read_tensors(tmp_path / "hostile.pth")
    assert not (tmp_path / "pwned").exists()


class Harmless:
    """An object of a class that the reader does not know."""


def test_objects_beside_the_tensors_are_passed_over_and_among_them_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(1)}, "x": Harmless()}, tmp_path / "beside.pth")
    assert list(read_tensors(tmp_path / "beside.pth")) == ["a.weight"]
    torch.save({"model": {"a.weight": torch.ones(1), "a.bias": Harmless()}}, tmp_path / "inside.pth")
    with pytest.raises(CheckpointError, match=r"a\.bias is a .*Harmless, expected a tensor; save the state dict"):
        read_tensors(tmp_path / "inside.pth")
    torch.save(Harmless(), tmp_path / "alone.pth")
    with pytest.raises(CheckpointError, match=r"holds a whole Python object \(.*Harmless\).*could run code; save"):
        read_tensors(tmp_path / "alone.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights.{suffix}"
    state = official(VIT)[1]
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    whole = file.read_bytes()
    for part in (0.9, 0.5, 0.01, 0.0):
        file.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(CheckpointError, match=rf"weights\.{suffix} .*expected a whole") as error:
            read_tensors(file)
        assert "\n" not in str(error.value)


def test_what_is_no_tensor(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    for content, message in [
        ({"model": {"a.weight": [1.0, 2.0], "a.bias": torch.ones(1)}}, r"a\.weight is a list, expected a tensor"),
        ([torch.ones(1)], "holds a list; expected a dictionary of tensors"),
        ({"state_dict": {}}, "holds no tensors; expected a state dict"),
        ({"epoch": 3}, "holds no tensors"),
    ]:
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message):
            read_tensors(file)


def test_options_and_scores_beside_the_tensors_do_no_harm(tmp_path: Path) -> None:
    content = {
        "module": {"a.weight": torch.ones(2)},
        "args": argparse.Namespace(lr=0.1, data=["x"]),
        "max_accuracy": np.float64(81.2),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "a.pth")
    assert list(read_tensors(tmp_path / "a.pth")) == ["a.weight"]


def test_pickles_of_arrays(tmp_path: Path) -> None:
    """Detectron2's model zoo."""
    source, state = official(EVA01)
    arrays = {f"backbone.net.{name}": value.numpy() for name, value in state.items()}
    content = {"model": arrays, "__author__": "detectron2", "matching_heuristics": True}
    for protocol in (2, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
        target, _ = loaded(EVA01, read_tensors(tmp_path / "a.pkl"))
        assert same(source, target)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"model": arrays, "x": Hostile(tmp_path / "pwned")}))
    with pytest.raises(CheckpointError, match=r"b\.pkl holds Python objects.*could run code"):
        read_tensors(tmp_path / "b.pkl")
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(content)[:-100])
    with pytest.raises(CheckpointError, match=r"c\.pkl cannot be read .*expected a whole"):
        read_tensors(tmp_path / "c.pkl")


def test_a_graft_that_is_not_loaded_with_the_trunk_is_named() -> None:
    _, state = official(VIT)
    _, report = loaded(VIT, state | {"blocks.0.adaptmlp.up_proj.bias": torch.ones(24)})
    assert "name the file in model.weights" in report.ignored["blocks.0.adaptmlp.up_proj.bias"]


# -- The hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("hf:BAAI/EVA/eva_o365.pth", ("BAAI/EVA", "eva_o365.pth", None)),
        ("hf:Yuxin-CV/EVA-02/eva02/det/x.pth", ("Yuxin-CV/EVA-02", "eva02/det/x.pth", None)),
        ("hf-hub:timm/vit_tiny_patch16_224@v1", ("timm/vit_tiny_patch16_224", "model.safetensors", "v1")),
    ],
)
def test_a_name_on_the_hub_is_fetched(
    name: str, called: tuple[str, str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repo: str, file: str, *, revision: str | None = None) -> str:
        calls.append((repo, file, revision))
        save_file(official(VIT)[1], tmp_path / "x.safetensors")
        return str(tmp_path / "x.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source, _ = official(VIT)
    config: Any = TypeAdapter(BackboneConfig).validate_python(VIT | {"weights": name})
    assert same(source, registry.build("backbone", config, image_size=(32, 32)).eval())
    assert calls == [called]


def test_without_a_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    message = (
        r"^model\.backbone\.weights: hf:a/b/c\.pth could not be fetched \(OSError: no route to host\); check .*network"
    )
    with pytest.raises(ConfigError, match=message):
        read_tensors("hf:a/b/c.pth")
    for wrong in ("hf:a", "hf:/b/c", "hf-hub:a/"):
        with pytest.raises(ConfigError, match="names no file on the hub; expected"):
            read_tensors(wrong)
