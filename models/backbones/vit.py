"""Plain Vision Transformers (arXiv 2010.11929): any VisionTransformer of timm by name, or one given by its sizes.

The trunk returns one map: the last block's tokens without class and register tokens, after timm's final norm, as
``(B, embed_dim, H / patch, W / patch)``. Positions are resized when an input differs from the canvas it was built for.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import ViTConfig
from vitgraft.models.grafting import trunk_modules, trunk_parameters
from vitgraft.models.registry import register
from vitgraft.models.weights import load_trunk

_BLOCK = re.compile(r"^backbone\.(?:.*\.)?blocks\.(\d+)\.")
_STEM = re.compile(
    r"^backbone\.(?:.*\.)?(patch_embed\.|norm_pre\.|(pos_embed|cls_token|reg_token|dist_token|mask_token)$)"
)


@register("backbone", "vit")
class ViT(nn.Module):
    """A plain ViT as a trunk.

    ``image_size``: the canvas (height, width) in pixels, multiples of the patch size. Its timm model is ``self.vit``,
    so a tensor that timm calls ``blocks.0.norm1.weight`` is called ``backbone.vit.blocks.0.norm1.weight`` in a model.

    Raises ``ConfigError`` for an unknown timm name, one that is no VisionTransformer, or a canvas that does not fit;
    ``CheckpointError`` for weights that do not fit.
    """

    def __init__(self, config: ViTConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.frozen = config.frozen
        vit = _by_name(config, image_size) if config.timm is not None else _by_sizes(config, image_size)
        self.vit: nn.Module = _without_head(vit)
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = _square_patch(vit)
        self._prefix_tokens: int = vit.num_prefix_tokens
        _check_canvas(image_size, self.patch_size)
        if config.weights is not None and config.weights != "timm":
            load_trunk(self.vit, config.weights)
        if self.frozen:
            for parameter in trunk_parameters(self):
                parameter.requires_grad_(False)
            self.train(self.training)

    @property
    def blocks(self) -> nn.Sequential:
        """The transformer blocks, first to last."""
        blocks = self.vit.blocks
        assert isinstance(blocks, nn.Sequential)
        return blocks

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    def train(self, mode: bool = True) -> ViT:
        """Set training mode; a frozen trunk stays in evaluation mode (no drop path, no dropout), its grafts do not."""
        super().train(mode)
        if self.frozen:
            for module in trunk_modules(self.vit):
                module.training = False
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), float, normalised RGB, H and W multiples of the patch → (B, C, H / patch, W / patch).

        Keeps no activations when nothing inside wants a gradient.
        """
        if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in self.parameters()):
            with torch.no_grad():
                return self._features(images)
        return self._features(images)

    forward = forward_features

    def _features(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        _check_canvas((height, width), self.patch_size)
        tokens: Tensor = self.vit.forward_features(images)  # type: ignore[operator]
        tokens = tokens[:, self._prefix_tokens :]
        shape = (batch, self.embed_dim, height // self.patch_size, width // self.patch_size)
        return tokens.transpose(1, 2).reshape(shape)


def layer_of(parameter_name: str, depth: int) -> int:
    """The layer of a model's parameter for layer-wise learning-rate decay (BEiT, arXiv 2106.08254).

    0: what comes before the trunk's blocks (patch embedding, positions, prefix tokens). i + 1: block i. depth + 1:
    everything else, grafts inside the blocks included, because they start untrained.
    """
    if ".adaptmlp." in parameter_name:
        return depth + 1
    if (block := _BLOCK.match(parameter_name)) is not None:
        return int(block.group(1)) + 1
    return 0 if _STEM.match(parameter_name) else depth + 1


def _by_name(config: ViTConfig, image_size: tuple[int, int]) -> Any:
    name = config.timm
    assert name is not None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see timm.list_models('vit_*')"
        raise ConfigError(f"model.backbone.timm: timm {timm.__version__} has no model {name!r}; {hint}")
    options = {"num_classes": 0, "dynamic_img_size": True, "drop_path_rate": config.drop_path}
    pretrained = config.weights == "timm"
    try:
        vit = timm.create_model(name, pretrained=pretrained, img_size=image_size, **options)
    except Exception as error:  # what timm and its download layer raise is not bounded to a class
        if pretrained:
            raise ConfigError(
                f"model.backbone.weights: timm's pretrained weights of {name!r} could not be fetched "
                f"({type(error).__name__}: {str(error)[:160]}); check the network, or name a local .safetensors file"
            ) from error
        raise ConfigError(
            f"model.backbone.timm: {name!r} cannot be built for images of {image_size} ({error}); "
            "name a VisionTransformer, e.g. 'vit_base_patch16_224'"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(
            f"model.backbone.timm: {name!r} is a {type(vit).__name__}, expected a VisionTransformer, "
            "e.g. 'vit_base_patch16_224'"
        )
    return vit


def _by_sizes(config: ViTConfig, image_size: tuple[int, int]) -> Any:
    assert config.patch_size is not None
    _check_canvas(image_size, config.patch_size)
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=4.0 if config.mlp_ratio is None else config.mlp_ratio,
        class_token=False,
        global_pool="",
        num_classes=0,
        dynamic_img_size=True,
        drop_path_rate=config.drop_path,
    )
    # Positions that start as noise of 0.02 say nothing for hundreds of steps; these tell neighbours at once
    # (arXiv 2205.01580 keeps them fixed, here they are learned on).
    grid = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
    with torch.no_grad():
        vit.pos_embed.copy_(build_sincos2d_pos_embed(list(grid), dim=vit.embed_dim))
    return vit


def _without_head(vit: Any) -> nn.Module:
    """Drop what only classifies: it would never get a gradient, and a checkpoint should not have to hold it."""
    vit.attn_pool = None
    for name in ("fc_norm", "head_drop", "head", "head_dist"):
        if hasattr(vit, name):
            setattr(vit, name, nn.Identity())
    vit.global_pool = ""
    module: nn.Module = vit
    return module


def _square_patch(vit: Any) -> int:
    height, width = vit.patch_embed.patch_size
    if height != width:
        raise ConfigError(f"model.backbone: patches of {height} × {width} pixels; expected square ones")
    return int(height)


def _check_canvas(image_size: tuple[int, int], patch_size: int) -> None:
    if any(side % patch_size for side in image_size):
        raise ConfigError(
            f"data.image_size: {list(image_size)} are no multiples of the trunk's patch size {patch_size}; "
            f"use e.g. {[max(1, round(side / patch_size)) * patch_size for side in image_size]}"
        )
