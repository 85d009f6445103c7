"""Visual prompts: against attention with the tokens put in by hand, their parameters, and what they are refused on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptformer_cases import compare
from model_samples import Stub, batch_of, loss_of, model_of
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import AdaptFormerConfig, VPTConfig
from vitgraft.configs.schema.backbones import VideoMAEConfig, ViTConfig
from vitgraft.models.adapters.adaptformer import graft_adaptformer
from vitgraft.models.adapters.vpt import graft_vpt
from vitgraft.models.backbones.videomae import VideoMAE
from vitgraft.models.backbones.vit import ViT, WindowedBlock
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.layer_decay import layer_of
from vitgraft.models.recompute import apply_recompute


def vit(**options: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(timm="test_vit.r160_in1k", **options), image_size=(64, 64)).eval()


def test_parity_with_the_official_model(test_data: Path) -> None:
    compare(test_data, "adaptformer_image_seq_vpt")


def test_the_papers_parameters() -> None:
    with torch.device("meta"):
        for depth, expected in (("deep", 9_216), ("shallow", 768)):
            trunk = Stub(*(Block(768, 12, qkv_bias=True) for _ in range(12)), embed_dim=768)
            before = sum(p.numel() for p in trunk.parameters())
            graft_vpt(VPTConfig(depth=depth), trunk=trunk)  # type: ignore[arg-type]
            assert sum(p.numel() for p in trunk.parameters()) - before == expected


def test_deep_prompts_are_new_for_every_block() -> None:
    plain, trunk = vit(), vit()
    graft_vpt(VPTConfig(prompts=3), trunk=trunk)
    images = torch.randn(2, 3, 64, 48)
    tokens = plain.embed(images)
    for block, grafted in zip(plain.blocks, trunk.blocks, strict=True):
        prompts = grafted.prompts.tokens
        assert prompts.shape == (1, 3, plain.embed_dim)
        tokens = block(torch.cat([prompts.expand(2, -1, -1), tokens], 1))[:, 3:]
    torch.testing.assert_close(trunk.tokens(images), plain.finish(tokens))
    assert trunk(images)[0].shape == (2, plain.embed_dim, 4, 3)


def test_shallow_prompts_stay_to_the_end() -> None:
    plain, trunk = vit(), vit()
    graft_vpt(VPTConfig(prompts=3, depth="shallow"), trunk=trunk)
    prefix = plain.prefix_tokens
    assert prefix > 0
    images = torch.randn(2, 3, 64, 48)
    tokens = torch.cat([trunk.prompts.tokens.expand(2, -1, -1), plain.embed(images)], 1)  # type: ignore[union-attr, operator]
    tokens = plain.finish(plain.blocks(tokens))[:, 3:]
    found = trunk.tokens(images)
    torch.testing.assert_close(found[:, :prefix], tokens[:, :prefix])
    torch.testing.assert_close(found[:, prefix + 3 :], tokens[:, prefix:])
    expected = tokens[:, prefix:].transpose(1, 2).unflatten(2, (4, 3))
    torch.testing.assert_close(trunk(images)[0], expected)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_a_visit_sees_patches_only(depth: Any) -> None:
    trunk = vit()
    graft_vpt(VPTConfig(prompts=3, depth=depth), trunk=trunk)
    images = torch.randn(1, 3, 64, 48)
    shapes = set()

    def visit(index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        shapes.add((tokens.shape[1], grid))
        return tokens

    torch.testing.assert_close(trunk(images, visit), trunk(images))
    assert shapes == {(12, (4, 3))}


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_on_a_frozen_trunk_beside_adaptformer(depth: Any, recompute: Any) -> None:
    grafts = [{"name": "vpt", "prompts": 2, "depth": depth}, {"name": "adaptformer", "bottleneck": 4}]
    model = model_of("video_transformer", adapter=grafts, backbone={"frozen": True}).train()
    apply_recompute(model.recompute_units(), recompute)
    batch = batch_of("video_transformer")
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model(**batch)).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            continue
        grafted = ".adaptmlp." in name or ".prompts." in name
        assert (parameter.grad is not None) == parameter.requires_grad == grafted, name
        assert not grafted or layer_of(name, 2) == 3
    copied = copy.deepcopy(model).eval()
    images, sizes = batch["images"], batch["sizes"]
    expected = copied(images, sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".prompts." in name:
                nn.init.normal_(parameter, std=3)
    assert torch.equal(copied(images, sizes), expected)
    assert not torch.allclose(model.eval()(images, sizes), expected)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_on_clips(depth: Any) -> None:
    config = VideoMAEConfig(embed_dim=24, depth=2, num_heads=2, patch_size=8, frozen=True)
    trunk = VideoMAE(config, image_size=(16, 24))
    graft_vpt(VPTConfig(prompts=2, depth=depth), trunk=trunk)
    (features,) = trunk(torch.randn(1, 3, 4, 16, 24))
    assert features.shape == (1, 2, 24, 2, 3)
    features.sum().backward()
    for name, parameter in trunk.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("prompts." in name), name


class Windowed(GraftableBlock):
    """A block that says nothing of prompts."""


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_other_blocks_are_refused(depth: Any) -> None:
    odd, windowed = Block(12, 2), Block(12, 2)
    odd.attn = nn.Identity()
    windowed.__class__ = WindowedBlock
    refused = [(Windowed(), "Windowed"), (EvaBlock(12, 2), "EvaBlock"), (odd, "Block"), (windowed, "WindowedBlock")]
    for block, name in refused:
        trunk = Stub(Block(12, 2), block, embed_dim=12)
        with pytest.raises(ConfigError, match=f"vpt needs global attention .* block 1 of this trunk is a {name}"):
            graft_vpt(VPTConfig(depth=depth), trunk=trunk)
        assert not hasattr(trunk.blocks[0], "prompts")


def test_adaptformer_may_come_first() -> None:
    trunk = vit()
    graft_adaptformer(AdaptFormerConfig(bottleneck=2), trunk=trunk)
    before = trunk(torch.ones(1, 3, 64, 64))[0]
    graft_vpt(VPTConfig(), trunk=trunk)
    assert not torch.allclose(trunk(torch.ones(1, 3, 64, 64))[0], before, atol=1e-4)
