"""LoRA: its equation, parameters, names, the parts of a fused layer, merging, and what it is refused on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_samples import BACKBONE, Stub, batch_of, loss_of, model_of
from pydantic import ValidationError
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import LoRAConfig
from vitgraft.configs.schema.backbones import VideoMAEConfig
from vitgraft.models.adapters.lora import LoRALinear, graft_lora, merge
from vitgraft.models.backbones.videomae import VideoMAE
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.layer_decay import layer_of
from vitgraft.models.recompute import apply_recompute

LORA: dict[str, Any] = {"name": "lora", "rank": 2}
WIDTH = 12


def blocks_of(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH, 2, qkv_bias=True) for _ in range(count))).eval()


def graft(blocks: nn.Module, **options: Any) -> None:
    graft_lora(LoRAConfig(**options), trunk=Stub(*blocks.children(), embed_dim=WIDTH))


def shake(root: nn.Module) -> None:
    """Away from the zero start."""
    for name, parameter in root.named_parameters():
        if ".lora." in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q", "v"], 12 * 2 * 2 * 8 * 768),
        (["qkv"], 12 * 8 * (768 + 3 * 768)),
        (["proj", "fc1", "fc2"], 12 * 8 * (2 * 768 + 2 * (768 + 3072))),
    ],
)
def test_the_papers_parameters(targets: list[str], expected: int) -> None:
    with torch.device("meta"):
        blocks = nn.Sequential(*(Block(768, 12, qkv_bias=True) for _ in range(12)))
        before = sum(p.numel() for p in blocks.parameters())
        graft_lora(LoRAConfig(rank=8, targets=targets), trunk=Stub(*blocks, embed_dim=768))
    assert sum(p.numel() for p in blocks.parameters()) - before == expected


@pytest.mark.parametrize("targets", [["q", "v"], ["k"], ["qkv"], ["proj"], ["fc1", "fc2"]])
def test_a_graft_starts_as_the_trunk_and_merges_into_it(targets: list[str]) -> None:
    plain = blocks_of()
    grafted = copy.deepcopy(plain)
    graft(grafted, rank=3, alpha=6.0, targets=targets)
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(grafted(x), plain(x))
    shake(grafted)
    tuned = grafted(x)
    assert not torch.allclose(tuned, plain(x), atol=1e-3)
    merge(grafted)
    torch.testing.assert_close(grafted(x), tuned, rtol=1e-5, atol=1e-5)
    assert set(grafted.state_dict()) == set(plain.state_dict())
    assert all(type(module) is not LoRALinear for module in grafted.modules())


def test_the_equation_on_parts_of_a_fused_layer() -> None:
    blocks = blocks_of(1)
    graft(blocks, rank=3, alpha=6.0, targets=["q", "v"])
    shake(blocks)
    layer: Any = blocks[0].attn.qkv
    x = torch.randn(4, WIDTH)
    q, k, v = (x @ layer.weight.T + layer.bias).chunk(3, -1)
    lora = layer.lora
    q = q + 2 * (x @ lora.q.A.weight.T @ lora.q.B.weight.T)
    v = v + 2 * (x @ lora.v.A.weight.T @ lora.v.B.weight.T)
    torch.testing.assert_close(layer(x), torch.cat([q, k, v], -1), rtol=1e-5, atol=1e-5)


def test_the_layers_names_stay() -> None:
    plain = set(model_of("video_transformer").state_dict())
    state = model_of("video_transformer", adapter=[LORA | {"targets": ["q", "v", "fc1"]}]).state_dict()
    assert plain < set(state)
    layers = ("attn.qkv.lora.q", "attn.qkv.lora.v", "mlp.fc1.lora.all")
    prefixes = [f"backbone.vit.blocks.{i}.{layer}." for i in range(BACKBONE["depth"]) for layer in layers]
    assert set(state) - plain == {f"{prefix}{side}.weight" for prefix in prefixes for side in "AB"}
    assert {layer_of(name, 2) for name in set(state) - plain} == {3}


class Split(GraftableBlock):
    """Queries, keys and values apart."""

    def __init__(self) -> None:
        super().__init__()
        for letter in "qkv":
            self.add_module(f"{letter}_proj", nn.Linear(WIDTH, WIDTH, bias=letter != "k"))

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        return self.add_ffn(x, parts.q_proj(x) * parts.k_proj(x) * parts.v_proj(x))


def test_split_layers_answer_to_both_names() -> None:
    for targets in (["q", "v"], ["q_proj", "v_proj"]):
        blocks = nn.Sequential(Split())
        graft(blocks, targets=targets)
        names = [name for name, module in blocks.named_modules() if isinstance(module, LoRALinear)]
        assert names == ["0.q_proj", "0.v_proj"]


def test_timms_eva_block_calls_its_layers() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(EvaBlock(WIDTH, 2, qkv_bias=True, qkv_fused=True)).eval()
    x = torch.randn(1, 4, WIDTH)
    before = blocks(x)
    graft(blocks, targets=["q", "v"])
    torch.testing.assert_close(blocks(x), before)
    shake(blocks)
    assert not torch.allclose(blocks(x), before, atol=1e-3)


def test_on_clips() -> None:
    config = VideoMAEConfig(embed_dim=24, depth=2, num_heads=2, patch_size=8, frozen=True)
    trunk = VideoMAE(config, image_size=(16, 16))
    graft_lora(LoRAConfig(targets=["q", "v", "proj", "fc1", "fc2"]), trunk=trunk)
    trunk.train()(torch.randn(1, 3, 4, 16, 16))[0].sum().backward()
    for name, parameter in trunk.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora." in name), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_on_a_frozen_trunk(recompute: Any) -> None:
    model = model_of("video_transformer", adapter=[LORA | {"dropout": 0.5}], backbone={"frozen": True}).train()
    apply_recompute(model.recompute_units(), recompute)
    layer = model.backbone.blocks[0].attn.qkv
    assert not layer.training
    assert layer.lora.training
    shake(model)
    batch = batch_of("video_transformer")
    torch.manual_seed(1)
    first = loss_of(model(**batch))
    assert not torch.equal(first, loss_of(model(**batch)))  # dropout acts
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model(**batch)).backward()
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora." in name), name
    copied = copy.deepcopy(model).eval()
    images, sizes = batch["images"], batch["sizes"]
    expected: Tensor = copied(images, sizes)
    shake(model)
    assert torch.equal(copied(images, sizes), expected)


def test_recomputation_gives_the_same_gradients() -> None:
    gradients = []
    for policy in ("none", "full"):
        model = model_of("video_transformer", adapter=[LORA], backbone={"frozen": True})
        torch.manual_seed(2)
        shake(model)
        apply_recompute(model.recompute_units(), policy)  # type: ignore[arg-type]
        loss_of(model(**batch_of("video_transformer"))).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"no layer 'q_proj' in the trunk's blocks; name some of fc1, .*, q, k, v"):
        graft(blocks_of(), targets=["fc1", "q_proj"])
    with pytest.raises(ConfigError, match="lora does not fit block 0 of this trunk, a Linear"):
        graft(nn.Sequential(nn.Linear(3, 3)))
    for targets in ([], ["q", "q"], ["qkv", "v"], ["q", "q_proj"]):
        with pytest.raises(ValidationError, match="targets"):
            LoRAConfig(targets=targets)
