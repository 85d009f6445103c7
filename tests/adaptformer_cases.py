"""The official AdaptFormer models' numbers (loss, outputs, gradients), computed by our trunks, grafts and head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitgraft.configs.schema.adapters import AdaptFormerConfig, VPTConfig
from vitgraft.configs.schema.backbones import VideoMAEConfig, ViTConfig
from vitgraft.configs.schema.heads import ClassifierConfig
from vitgraft.models import registry
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.build import REGISTERING
from vitgraft.models.weights import convert_weights

assert REGISTERING


class Official(nn.Module):
    """Trunk and classifier with the official pooling: images or clips → logits and what the classifier reads."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        built, tuned = about["constructor"], about["tuning_config"]
        sizes = {key: built[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
        mlp_ratio, image_size = float(built["mlp_ratio"]), (built["img_size"],) * 2
        self.video = "tubelet_size" in built
        self.pooled = self.video or built["global_pool"]
        self.backbone: Trunk
        if self.video:
            video = VideoMAEConfig(**sizes, mlp_ratio=mlp_ratio, tubelet_size=built["tubelet_size"])
            self.backbone = registry.build("backbone", video, image_size=image_size)
        else:
            image = ViTConfig(**sizes, mlp_ratio=mlp_ratio, class_token=True)
            self.backbone = registry.build("backbone", image, image_size=image_size)
        scale = tuned["ffn_adapter_scalar"]
        adaptformer = AdaptFormerConfig(
            bottleneck=tuned["ffn_num"],
            scale="learnable" if scale == "learnable_scalar" else float(scale),
            layout=tuned["ffn_option"],
            layernorm=tuned["ffn_adapter_layernorm_option"],
            init=tuned["ffn_adapter_init_option"],
        )
        registry.build("graft", adaptformer, trunk=self.backbone)
        self.prompts = tuned["vpt_num"] if tuned["vpt_on"] else 0
        if self.prompts:
            registry.build("graft", VPTConfig(prompts=self.prompts), trunk=self.backbone)
        if self.pooled and not self.video:
            self.backbone.without_final_norm()
        head = ClassifierConfig(fc_norm=self.pooled)
        self.head = registry.build("head", head, channels=self.backbone.channels, num_classes=built["num_classes"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.pooled:
            (features,) = self.backbone(images)
            pooled = self.head.fc_norm((features if self.video else features[:, None]).mean((1, 3, 4)))
        else:
            pooled = self.backbone.tokens(images)[:, 0]
        return self.head.head(pooled), pooled


def compare(folder: Path, name: str) -> None:
    """Outputs of blocks and classifier within 1e-4, gradient norms of every official parameter within 1e-3."""
    case = np.load(folder / "parity" / f"{name}.npz")
    about = json.loads((folder / "parity" / f"{name}.json").read_text())
    arrays = {key: torch.from_numpy(case[key]) for key in case.files if key != "meta_json"}
    model = Official(about).eval()
    state = {key.removeprefix("sd/"): value.requires_grad_() for key, value in arrays.items() if key.startswith("sd/")}
    parts = {"backbone": model.backbone, "head": model.head}
    values = convert_weights(parts, state, where=name, strict=True).values
    seen: list[Tensor] = []
    for index in (0, -1):
        model.backbone.blocks[index].register_forward_hook(lambda module, inputs, output: seen.append(output))
    named = {f"{part}.{key}": value for part, tensors in values.items() for key, value in tensors.items()}
    images = arrays["in/x"].requires_grad_()
    logits, pooled = functional_call(model, named, (images,))
    close(logits, arrays["out/logits"])
    close(pooled, arrays["out/pre_logits"])
    # The official hooks see the prompts, which are cut off here before a block is left.
    close(seen[0], arrays["out/tokens_block0"][:, model.prompts :])
    close(seen[1], arrays["out/tokens_last"][:, model.prompts :])
    logits.square().mean().backward()
    close(images.grad, arrays["grad/x"])
    for key, norm in about["param_grad_l2"].items():
        gradient = state[key].grad
        found = 0.0 if gradient is None else float(gradient.norm())
        assert abs(found - norm) <= 1e-3 * norm + 1e-6, (key, found, norm)
    for key, value in arrays.items():
        if key.startswith("grad/") and key != "grad/x":
            close(state[key.removeprefix("grad/")].grad, value)


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
