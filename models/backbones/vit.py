"""Plain Vision Transformers (arXiv 2010.11929): any VisionTransformer of timm by name, or one given by its sizes.

The trunk returns one map: the last block's tokens without class and register tokens, after timm's final norm, as
``(B, embed_dim, H / patch, W / patch)``. Positions are resized when an input differs from the canvas it was built for.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import ViTConfig
from vitgraft.models.backbones.trunk import Trunk, whole_patches
from vitgraft.models.registry import register
from vitgraft.models.weights import load_trunk


@register("backbone", "vit")
class ViT(Trunk):
    """A plain ViT as a trunk.

    ``image_size``: the canvas (height, width) in pixels, for which positions are laid out. Its timm model is
    ``self.vit``, so a tensor that timm calls ``blocks.0.norm1.weight`` is called
    ``backbone.vit.blocks.0.norm1.weight`` in a model.

    Raises ``ConfigError`` for an unknown timm name, one that is no VisionTransformer, or a canvas that does not fit;
    ``CheckpointError`` for weights that do not fit.
    """

    def __init__(self, config: ViTConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        vit = _by_name(config, image_size) if config.timm is not None else _by_sizes(config, image_size)
        self.vit: Any = _without_head(vit)
        self.embed_dim, self.patch_size = vit.embed_dim, _square_patch(vit)
        self.prefix_tokens = vit.num_prefix_tokens
        self.frozen = config.frozen
        if config.weights is not None and config.weights != "timm":
            load_trunk(self.vit, config.weights)
        self.freeze()

    @property
    def blocks(self) -> nn.Sequential:
        """The transformer blocks, first to last."""
        blocks: nn.Sequential = self.vit.blocks
        return blocks

    def embed(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(self.vit.patch_embed(images))))
        return tokens

    def finish(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.vit.norm(tokens)
        return normed

    def without_final_norm(self) -> None:
        self.vit.norm = nn.Identity()


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
    image_size = whole_patches(image_size, config.patch_size)
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
