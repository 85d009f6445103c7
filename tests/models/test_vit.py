"""The trunk: maps, layers, freezing, and loading weights from files that may be wrong or hostile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_samples import ADAPTFORMER, BACKBONE, batch_of, loss_of, model_of
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.model import ViTConfig
from vitgraft.models.backbones.vit import ViT
from vitgraft.models.layer_decay import layer_of
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
        ("eva02_tiny_patch14_224", "is a Eva, expected a VisionTransformer"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_name((56, 56), name=name)


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to\nhost")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(ConfigError, match=r"could not be fetched \(OSError: no route to host\); check the network"):
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
    assert report == (len(state) - 2, [], ["head.bias", "head.weight"])


def test_positions_are_resized(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(source().state_dict(), file)
    vit = trunk((32, 96))
    report = load_trunk(vit.vit, file)
    assert report.resized == ["pos_embed"]
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
