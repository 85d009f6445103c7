"""Trunks from files of transformers compute what transformers computes with them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from timm.layers import QuickGELU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers_table import TABLE, clip, picture, values

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.schema.model import BackboneConfig
from vitgraft.models.backbones.vit import ViT
from vitgraft.models.build import registry  # building registers the trunks
from vitgraft.models.weights import load_weights

SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
VIT = SIZES | {"name": "vit", "class_token": True}
BEIT = SIZES | {"name": "beit", "pretrain_size": 8, "class_token": True, "layer_scale": 0.1}
DINOV3: dict[str, Any] = {
    "num_reg_tokens": 4,
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "init_values": 1.0,
    "use_fc_norm": False,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}
CLIP: dict[str, Any] = {
    "pre_norm": True,
    "act_layer": QuickGELU,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}


class OfTimm(nn.Module):
    """A trunk around a model of timm, as ``ViT`` is of one by name."""

    layout = ViT.layout

    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__()
        self.vit = make(img_size=8, num_classes=0, **(SIZES | options))
        self.vit.attn_pool = None

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.vit.forward_features(images)
        return tokens[:, -4:]


class Own(nn.Module):
    """A trunk of the registry, whose map is returned as tokens."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__()
        config: Any = TypeAdapter(BackboneConfig).validate_python(section)
        self.trunk = registry.build("backbone", config, image_size=(8, 8))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)[-1]  # (B, C, h, w), of clips (B, T, C, h, w)
        return (maps if maps.ndim == 5 else maps[:, None]).permute(0, 1, 3, 4, 2).flatten(1, 3)


CASES: list[tuple[str, Any]] = [
    ("vit", partial(Own, VIT)),
    ("vit", partial(Own, VIT | {"class_token": False, "layer_scale": 1.0})),
    ("vit", partial(OfTimm, VisionTransformer)),
    ("vit classifier", partial(Own, VIT)),
    ("deit", partial(OfTimm, VisionTransformerDistilled)),
    ("mae", partial(Own, VIT)),
    ("mae", partial(OfTimm, VisionTransformer)),
    ("dinov2", partial(Own, VIT | {"layer_scale": 1.0})),
    ("dinov2", partial(OfTimm, VisionTransformer, init_values=1.0)),
    (
        "dinov2 swiglu",
        partial(
            OfTimm, VisionTransformer, init_values=1.0, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=32 / 8
        ),
    ),
    ("dinov2 registers", partial(OfTimm, VisionTransformer, init_values=1.0, reg_tokens=4, no_embed_class=True)),
    ("dinov3", partial(OfTimm, Eva, qkv_bias=True, **DINOV3)),
    ("dinov3 gated", partial(OfTimm, Eva, qkv_bias=True, swiglu_mlp=True, swiglu_align_to=8, **DINOV3)),
    ("clip", partial(OfTimm, VisionTransformer, **CLIP)),
    ("clip vision", partial(OfTimm, VisionTransformer, **CLIP)),
    ("siglip", partial(OfTimm, VisionTransformer, class_token=False, global_pool="map", act_layer="gelu_tanh")),
    ("videomae", partial(Own, SIZES | {"name": "videomae"})),
    ("videomae classifier", partial(Own, SIZES | {"name": "videomae"})),
    ("beit", partial(Own, BEIT)),
    ("data2vec", partial(Own, BEIT)),
    ("ijepa", partial(Own, VIT | {"class_token": False})),
]


def of(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """A file's tensors and the tokens that are expected of it."""
    entry = json.loads(TABLE.read_text())[case]
    state = {name: values(name, tuple(shape)) for name, shape in entry["shapes"].items()}
    return state, torch.tensor(entry["tokens"]).reshape(1, -1, 8)


@pytest.mark.parametrize(("case", "make"), CASES, ids=[f"{i}-{case}" for i, (case, _) in enumerate(CASES)])
def test_the_tokens_are_those_of_transformers(case: str, make: Any) -> None:
    state, expected = of(case)
    model = make().eval()
    report = load_weights(model.trunk if isinstance(model, Own) else model, state, where="test")
    assert not report.unexpected
    assert not report.fresh or "ls1" in "".join(report.fresh)
    with torch.no_grad():
        tokens = model(clip() if "videomae" in case else picture())
    if case == "vit" and not getattr(getattr(model, "trunk", None), "prefix_tokens", 1):
        assert tokens.shape == expected.shape  # other tokens, without the class token
    else:
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=2e-5)


def test_biases_that_a_trunk_has_no_place_for_are_refused_unless_they_are_zero() -> None:
    """Of DINOv3's published files they are zero."""
    state, _ = of("dinov3")
    with pytest.raises(CheckpointError, match=r"layer\.0\.attention\.[qv]_proj\.bias has no place in the trunk"):
        load_weights(OfTimm(Eva, qkv_bias=False, **DINOV3), state, where="test")
    zero = {
        name: value * 0 if name.endswith("v_proj.bias") or "q_proj.bias" in name else value
        for name, value in state.items()
    }
    report = load_weights(OfTimm(Eva, qkv_bias=False, **DINOV3), zero, where="test")
    assert report.ignored["layer.0.attention.v_proj.bias"] == "is zero, and adds nothing"


def test_a_norm_before_the_blocks_is_not_left_out() -> None:
    state, _ = of("clip")
    state["vision_model.embeddings.patch_embedding.bias"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match=r"pre_layrnorm\.weight norms the tokens before the first block"):
        load_weights(Own(VIT).trunk, state, where="test")
