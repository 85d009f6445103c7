"""The trunk: maps, layers, freezing, and loading weights from files that may be wrong or hostile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from model_samples import ADAPTFORMER, BACKBONE, batch_of, loss_of, model_of
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.model import AdaptFormerConfig, ViTConfig
from vitgraft.models.adapters.adaptformer import graft_adaptformer
from vitgraft.models.backbones.vit import ViT, WindowedBlock
from vitgraft.models.layer_decay import layer_of
from vitgraft.models.recompute import apply_recompute
from vitgraft.models.weights import load_trunk

NAME = "test_vit.r160_in1k"


def trunk(image_size: tuple[int, int] = (64, 64), **options: Any) -> ViT:
    return ViT(ViTConfig.model_validate(BACKBONE | options), image_size=image_size)


def by_name(image_size: tuple[int, int] = (64, 64), name: str = NAME, **options: Any) -> ViT:
    return ViT(ViTConfig.model_validate({"timm": name} | options), image_size=image_size)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (80, 48)])
def test_the_map_is_timms_last_one(size: tuple[int, int]) -> None:
    vit = by_name(size).eval()
    images = torch.randn(2, 3, *size)
    reference = timm.create_model(NAME, img_size=size, num_classes=0)
    reference.load_state_dict(vit.vit.state_dict())
    with torch.no_grad():
        features = vit.forward_features(images)
        (expected,) = reference.eval().forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert features.shape == (2, vit.embed_dim, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_rotary_trunks_are_timms(name: str, tmp_path: Path) -> None:
    """Also on a canvas that is not square and not the one built for, and with a bottleneck grafted on."""
    patch = 14 if "14" in name else 16
    vit = by_name((4 * patch, 6 * patch), name=name).eval()
    reference = timm.create_model(name, img_size=(4 * patch, 6 * patch), dynamic_img_size=True, num_classes=0)
    save_file(reference.state_dict(), tmp_path / "file.safetensors")
    load_trunk(vit, tmp_path / "file.safetensors")
    for size in ((4 * patch, 6 * patch), (5 * patch, 3 * patch)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = reference.eval().forward_features(images)[:, vit.prefix_tokens :]
            assert torch.equal(vit.tokens(images)[:, vit.prefix_tokens :], expected)
    graft_adaptformer(AdaptFormerConfig(bottleneck=4), trunk=vit)
    assert torch.equal(vit.tokens(images)[:, vit.prefix_tokens :], expected)
    vit.forward_features(images).sum().backward()
    assert [n for n, p in vit.named_parameters() if p.grad is None] == []


def test_positions_follow_the_input() -> None:
    vit = trunk((64, 96)).eval()
    images = torch.randn(1, 3, 64, 96)
    same = vit.forward_features(images)
    assert same.shape == (1, 24, 8, 12)
    assert vit.forward_features(torch.randn(1, 3, 32, 40)).shape == (1, 24, 4, 5)
    with torch.no_grad():
        vit.vit.pos_embed += torch.randn_like(vit.vit.pos_embed)  # type: ignore[operator, arg-type]
    assert not torch.allclose(vit.forward_features(images), same)
    with pytest.raises(ConfigError, match="multiples of the trunk's patch size 8"):
        vit(torch.randn(1, 3, 60, 64))


def test_nothing_is_left_that_only_classifies() -> None:
    for name in (NAME, "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224"):
        vit = by_name(name=name)
        vit.forward_features(torch.randn(1, 3, 64, 64)).sum().backward()
        assert [n for n, p in vit.named_parameters() if p.grad is None] == [], name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_bsae_patch16_224", "did you mean 'vit_base_patch16_224'"),
        ("resnet18", "VisionTransformer"),
        ("vit_small_patch16_rope_mixed_224", "is a Eva, expected a VisionTransformer"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_name((56, 56), name=name)


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to\nhost" + "; try again" * 30)

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(ConfigError, match=r"fetched \(OSError: no route to host; .* try…\); check the network"):
        by_name(weights="timm")


def test_layers() -> None:
    model = model_of("upernet", adapter=[ADAPTFORMER, {"name": "simple_pyramid", "channels": 8, "strides": [8]}])
    layers = {name: layer_of(name, model.backbone.depth) for name, _ in model.named_parameters()}
    assert layers["backbone.vit.patch_embed.proj.weight"] == layers["backbone.vit.pos_embed"] == 0
    assert layers["backbone.vit.blocks.0.norm1.weight"] == 1
    assert layers["backbone.vit.blocks.1.mlp.fc2.bias"] == 2
    rest = {name: layer for name, layer in layers.items() if ".adaptmlp." in name or "blocks" not in name}
    del rest["backbone.vit.patch_embed.proj.weight"], rest["backbone.vit.patch_embed.proj.bias"]
    del rest["backbone.vit.pos_embed"]
    assert set(rest.values()) == {3}
    assert layer_of("head.blocks.0.norm1.weight", 2) == 3
    assert layer_of("backbone.vit.cls_token", 2) == 0


def test_a_frozen_trunk_stays_in_evaluation_mode_and_keeps_no_activations() -> None:
    model = model_of("upernet", backbone={"frozen": True, "drop_path": 0.9}).train()
    assert model.adapter.training
    assert not any(module.training for module in model.backbone.vit.modules())
    assert model.backbone.forward_features(torch.randn(1, 3, 64, 64)).grad_fn is None
    loss_of(model(**batch_of("upernet"))).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


def test_grafts_on_a_frozen_trunk_train() -> None:
    model = model_of("video_transformer", adapter=[ADAPTFORMER | {"dropout": 0.5}], backbone={"frozen": True}).train()
    block = model.backbone.blocks[0]
    assert block.adaptmlp.training
    assert not block.mlp.training
    model.eval()
    assert not block.adaptmlp.training
    loss_of(model.train()(**batch_of("video_transformer"))).backward()
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".adaptmlp." in name)


# -- weights ---------------------------------------------------------------------------------------------------------


def source(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}
    return VisionTransformer(**(sizes | {"class_token": False, "global_pool": "avg", "fc_norm": False} | options))


def test_safetensors_and_pth_in_several_wrappings(tmp_path: Path) -> None:
    state = source().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "b.pth")
    backbone = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"model": backbone | {"decode_head.x": torch.ones(1)}, "epoch": 3}, tmp_path / "c.pt")
    model = {f"backbone.vit.{name}": value for name, value in state.items() if not name.startswith("head")}
    save_file(model | {"adapter.x": torch.ones(1)}, tmp_path / "d.safetensors")
    for name in "a.safetensors", "b.pth", "c.pt", "d.safetensors":
        vit = trunk(weights=str(tmp_path / name))
        for key, value in vit.vit.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    report = load_trunk(trunk().vit, tmp_path / "a.safetensors")
    assert report.loaded == {"": len(state) - 2}
    assert set(report.ignored) == {"head.bias", "head.weight"}
    assert not report.resized
    assert not report.unexpected


def test_positions_are_resized(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(source().state_dict(), file)
    vit = trunk((32, 96))
    report = load_trunk(vit.vit, file)
    assert report.resized == {"pos_embed": "(1, 64, 24) → (1, 48, 24)"}
    # The file's model, given the same image, resizes its positions on the way: the same map.
    reference = source(img_size=64, dynamic_img_size=True).eval()
    images = torch.randn(1, 3, 32, 96)
    with torch.no_grad():
        expected = reference.forward_features(images).transpose(1, 2).reshape(1, 24, 4, 12)
        torch.testing.assert_close(vit.eval().forward_features(images), expected, rtol=1e-4, atol=1e-5)


def test_a_class_token_is_left_out(tmp_path: Path) -> None:
    state = source(class_token=True, global_pool="token").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    vit = trunk(weights=str(tmp_path / "weights.safetensors"))
    assert torch.equal(vit.vit.pos_embed, state["pos_embed"][:, 1:])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 48}, r"patch_embed|pos_embed|has shape \(1, 64, 48\).*same architecture"),
        ({"depth": 1}, r"lacks 12 of the trunk's .*blocks\.1\.norm1\.weight.*same architecture"),
        ({"depth": 3}, r"more than the trunk's blocks: blocks\.2\.attn\.proj\.bias"),
        ({"qkv_bias": False}, r"lacks 2 of .*blocks\.0\.attn\.qkv\.bias"),
    ],
)
def test_another_model_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(source(**options).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        trunk(weights=str(tmp_path / "other.safetensors"))
    assert "other.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_resnet_weights_are_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.ones(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 29 of the trunk's 29 tensors.*it holds conv1\.weight"):
        trunk(weights=str(tmp_path / "resnet.safetensors"))


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_from_a_file(tmp_path: Path) -> None:
    state: dict[str, Any] = dict(source().state_dict())
    torch.save({"model": state, "args": Hostile(tmp_path / "pwned")}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match="could run code; save its tensors alone"):
        trunk(weights=str(tmp_path / "hostile.pth"))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth", "missing.pth", "list.pth", "empty.pth"])
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    contents: dict[str, Any] = {"list.pth": [torch.ones(1)], "empty.pth": {"model": {}}}
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"\x80 not weights" * 10)
    elif name in contents:
        torch.save(contents[name], tmp_path / name)
    with pytest.raises(CheckpointError, match=name):
        trunk(weights=str(tmp_path / name))


def gradient_of(vit: ViT, images: Tensor) -> Tensor:
    vit.forward_features(images).square().sum().backward()
    gradient = vit.vit.patch_embed.proj.weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    return gradient


def test_gradients_reach_the_first_layer() -> None:
    assert gradient_of(trunk(), torch.randn(1, 3, 64, 64)).abs().max() > 0


# -- windows, tokens, layer scale ------------------------------------------------------------------------------------


def attended_by_hand(block: Any, tokens: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Each token with the places of its window, those beyond the map as keys of logit 0 without a value."""
    attention, result = block.attn, torch.zeros_like(tokens)
    channels = tokens.shape[-1]
    q, k, v = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    for row, column in np.ndindex(*grid):
        top, left = row // size * size, column // size * size
        inside = [
            y * grid[1] + x
            for y in range(top, min(top + size, grid[0]))
            for x in range(left, min(left + size, grid[1]))
        ]
        here = row * grid[1] + column
        logits = torch.einsum("bhd,bnhd->bhn", q[:, here], k[:, inside]) / (channels // attention.num_heads) ** 0.5
        exponentials = logits.exp()
        mass = exponentials.sum(-1) + (size**2 - len(inside))
        result[:, here] = (torch.einsum("bhn,bnhd->bhd", exponentials, v[:, inside]) / mass[..., None]).flatten(1)
    projected: Tensor = attention.proj(result)
    return projected


@pytest.mark.parametrize("size", [2, 3, 7])
def test_windows_by_hand(size: int) -> None:
    vit = trunk((48, 40), window_size=size, global_blocks=[1], layer_scale=0.5).eval()
    block: Any = vit.blocks[0]
    nn.init.normal_(block.attn.qkv.bias)
    assert [isinstance(block, WindowedBlock) for block in vit.blocks] == [True, False]
    tokens = torch.randn(2, 30, 24)
    with torch.no_grad():
        found = vit.run_block(0, tokens, (6, 5))
        stream = tokens + block.ls1(attended_by_hand(block, block.norm1(tokens), (6, 5), size))
        expected = stream + block.ls2(block.mlp(block.norm2(stream)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_window_for_each_block() -> None:
    vit = trunk(depth=3, window_size=[2, 5, 3], global_blocks=[1])
    assert [getattr(block, "window_size", None) for block in vit.blocks] == [2, None, 3]
    assert vit(torch.randn(2, 3, 64, 40))[0].shape == (2, 24, 8, 5)
    # Whatever attends, the names of the tensors are timm's.
    assert vit.state_dict().keys() == trunk(depth=3).state_dict().keys()


def test_windows_and_grafts() -> None:
    windowed = {"window_size": 3, "global_blocks": [1]}
    model = model_of("video_transformer", adapter=[ADAPTFORMER], backbone=windowed | {"frozen": True})
    loss_of(model(**batch_of("video_transformer"))).backward()
    assert all(p.grad is not None for name, p in model.backbone.named_parameters() if ".adaptmlp." in name)
    assert all(p.grad is None for name, p in model.backbone.named_parameters() if ".adaptmlp." not in name)


def test_windows_in_bfloat16_and_recomputed() -> None:
    vit = trunk((48, 40), window_size=4)
    images = torch.randn(2, 3, 48, 40)
    expected = vit.forward_features(images)
    apply_recompute(vit.recompute_units(), "full")
    assert torch.equal(vit.forward_features(images), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (vit.forward_features(images) - expected).abs().max() < 0.2
    assert gradient_of(vit, images).isfinite().all()


def test_layer_scale() -> None:
    vit = trunk(layer_scale=0.25)
    scales = {name: p for name, p in vit.named_parameters() if name.endswith(".gamma")}
    assert len(scales) == 4
    assert all((p == 0.25).all() for p in scales.values())


@pytest.mark.parametrize("class_token", [False, True])
def test_positions_are_resized_by_the_plain_bicubic_kernel(class_token: bool) -> None:
    vit = trunk((64, 64), class_token=class_token)
    timms: Any = vit.vit
    nn.init.normal_(timms.pos_embed)
    images = torch.randn(1, 3, 32, 96)
    tokens = vit.embed(images)
    table = timms.pos_embed[:, vit.prefix_tokens :].transpose(1, 2).reshape(1, 24, 8, 8)
    resized = torch.nn.functional.interpolate(table, (4, 12), mode="bicubic", align_corners=False)
    patches = timms.patch_embed(images).flatten(1, 2) + resized.flatten(2).transpose(1, 2)
    assert tokens.shape == (1, 48 + class_token, 24)
    torch.testing.assert_close(tokens[:, vit.prefix_tokens :], patches)
    if class_token:
        torch.testing.assert_close(tokens[:, :1], timms.cls_token + timms.pos_embed[:, :1])
    assert vit(images)[0].shape == (1, 24, 4, 12)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"])
def test_a_named_trunk_without_its_class_and_register_tokens(name: str) -> None:
    size = (56, 112) if "patch14" in name else (64, 96)
    whole, vit = by_name(size, name), by_name(size, name, class_token=False, window_size=3, global_blocks=[0])
    assert (whole.prefix_tokens > 0, vit.prefix_tokens) == (True, 0)
    state = {key: value for key, value in whole.state_dict().items() if not key.endswith(("cls_token", "reg_token"))}
    if not whole.vit.no_embed_class:
        state["vit.pos_embed"] = state["vit.pos_embed"][:, whole.prefix_tokens :]
    vit.load_state_dict(state)
    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(vit.embed(images), whole.embed(images)[:, whole.prefix_tokens :])
    assert vit(images)[0].shape[-2:] == vit.grid_of(images)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit_tiny_distilled_patch16_224", {"class_token": False}, "VisionTransformerDistilled, whose tokens cannot"),
        (NAME, {"window_size": 2}, "tokens beside it; set class_token: false"),
        (NAME, {"window_size": [2], "class_token": False}, "give each a size"),
        (NAME, {"window_size": 2, "global_blocks": [40], "class_token": False}, "count from 0 to"),
        ("vit_small_patch16_18x2_224", {"class_token": False, "window_size": 2}, "has a ParallelThingsBlock"),
    ],
)
def test_windows_that_a_named_trunk_cannot_have(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_name(name=name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_blocks": [0]}, "give window_size too"),
        ({"window_size": 2, "class_token": True}, "set class_token: false"),
        ({"window_size": [2]}, "has 1 sizes, there are 2 blocks"),
        ({"window_size": 2, "global_blocks": [2]}, r"global_blocks \[2\] are beyond the last of 2 blocks"),
    ],
)
def test_windows_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViTConfig.model_validate(BACKBONE | options)
    with pytest.raises(ValidationError, match="remove class_token, or set it to false"):
        ViTConfig(timm=NAME, class_token=True)
