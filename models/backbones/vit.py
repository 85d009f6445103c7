"""Plain Vision Transformers (arXiv 2010.11929): any of timm by name, with learned or rotary positions (DINOv3, EVA-02),
or one given by its sizes.

The trunk returns one map: the last block's tokens without class and register tokens, after timm's final norm, as
``(B, embed_dim, H / patch, W / patch)``. Positions are resized when an input differs from the canvas it was built for:
of a named model as timm resizes them, of one given by its sizes by the bicubic kernel of DeiT, MAE and ViT-Adapter.

Blocks may attend within windows, as ViT-Adapter's trunks for detection do (arXiv 2205.08534, section 4.1): queries,
keys and values are zero where a window hangs over the map, and those zeros take part in the softmax.
"""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import ViTConfig
from vitgraft.models.backbones.trunk import Grid, Trunk, whole_patches
from vitgraft.models.backbones.windows import join_windows, split_windows
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.registry import register
from vitgraft.models.weight_names import shown
from vitgraft.models.weights import Layout, load_trunk


@register("backbone", "vit")
class ViT(Trunk):
    """A plain ViT as a trunk.

    ``image_size``: the canvas (height, width) in pixels, for which positions are laid out. Its timm model is
    ``self.vit``, so a tensor that timm calls ``blocks.0.norm1.weight`` is called
    ``backbone.vit.blocks.0.norm1.weight`` in a model.

    Raises ``ConfigError`` for an unknown timm name, one that is no VisionTransformer, a canvas that does not fit, or
    windows and tokens that the model cannot have; ``CheckpointError`` for weights that do not fit.
    """

    layout: ClassVar[Layout] = Layout(renames=((r"^(?!vit\.)", "vit."),))

    def __init__(self, config: ViTConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        vit = _by_name(config, image_size) if config.timm is not None else _by_sizes(config, image_size)
        if config.class_token is False:
            _drop_prefix_tokens(vit, config)
        self.vit: Any = _without_head(vit)
        self.embed_dim, self.patch_size = vit.embed_dim, _square_patch(vit)
        self.prefix_tokens = vit.num_prefix_tokens
        self.frozen = config.frozen
        self.by_sizes = config.timm is None
        self._set_windows(config)
        if config.weights is not None and config.weights != "timm":
            load_trunk(self, config.weights)
        self.freeze()

    @property
    def blocks(self) -> nn.Sequential:
        """The transformer blocks, first to last."""
        blocks: nn.Sequential = self.vit.blocks
        return blocks

    def embed(self, images: Tensor) -> Tensor:
        patches = self.vit.patch_embed(images)  # (B, h, w, C)
        grid = (patches.shape[1], patches.shape[2])
        if self.by_sizes and grid != self.vit.patch_embed.grid_size:
            tokens = patches.flatten(1, 2)
            if self.vit.cls_token is not None:
                tokens = torch.cat([self.vit.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1)
            tokens = tokens + self._positions(grid)
        else:
            tokens = self.vit._pos_embed(patches)
        if isinstance(self.vit, Eva):
            tokens, _ = tokens  # the rotation is made again for each block
        embedded: Tensor = self.vit.norm_pre(tokens)
        return embedded

    def _positions(self, grid: Grid) -> Tensor:
        """Return the positions resized to this grid, in float32: (1, prefix + h · w, C)."""
        table = self.vit.pos_embed
        prefix, places = table[:, : self.prefix_tokens], table[:, self.prefix_tokens :]
        places = places.float().transpose(1, 2).unflatten(2, self.vit.patch_embed.grid_size)
        places = F.interpolate(places, grid, mode="bicubic", align_corners=False)
        return torch.cat([prefix, places.flatten(2).transpose(1, 2).to(table.dtype)], 1)

    def run_block(self, index: int, tokens: Tensor, grid: Grid) -> Tensor:
        block = self.blocks[index]
        result: Tensor
        if isinstance(block, WindowedBlock):
            result = block(tokens, grid)
        elif isinstance(self.vit, Eva) and self.vit.rope is not None:
            result = block(tokens, rope=self.vit.rope.get_embed(shape=grid))
        else:
            result = block(tokens)
        return result

    def finish(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.vit.norm(tokens)
        return normed

    def without_final_norm(self) -> None:
        self.vit.norm = nn.Identity()

    def _set_windows(self, config: ViTConfig) -> None:
        if config.window_size is None:
            return
        if self.prefix_tokens:
            raise ConfigError(
                f"model.backbone.window_size: windows cut a map of patches, but {config.timm!r} has "
                f"{self.prefix_tokens} tokens beside it; set class_token: false"
            )
        sizes = config.window_size if isinstance(config.window_size, list) else [config.window_size] * self.depth
        beyond = [index for index in config.global_blocks if index >= self.depth]
        if len(sizes) != self.depth or beyond:
            raise ConfigError(
                f"model.backbone: window_size for {len(sizes)} blocks, global_blocks {config.global_blocks}; "
                f"{config.timm!r} has {self.depth} blocks: give each a size, and count from 0 to {self.depth - 1}"
            )
        for index, size in enumerate(sizes):
            if index not in config.global_blocks:
                _make_windowed(self.blocks[index], size)


class WindowedBlock(GraftableBlock, Block):  # type: ignore[misc]
    """A timm block that attends within windows; made from a plain one by :func:`_make_windowed`."""

    window_size: int

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Transform patch tokens (B, h · w, C) of ``grid``; the shape is kept."""
        block: Any = self  # timm's modules are not typed
        x = x + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), grid, self.window_size)))
        return self.add_ffn(x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


def _attend(attention: Any, tokens: Tensor, grid: Grid, size: int) -> Tensor:
    """Apply ``attention``, a timm Attention, in each window, padded after the projection to queries, keys and values.

    A padded key is zero, not the projection's bias: it has logit 0 and no value. Padding before the projection, as
    BEiT does, would give other numbers.
    """
    windows = split_windows(attention.qkv(tokens).unflatten(1, grid), size)  # (B · n, size, size, 3 · C)
    split = windows.view(windows.shape[0], size * size, 3, attention.num_heads, -1)
    query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value)  # (B · n, heads, size², width)
    joined = join_windows(attended.transpose(1, 2).reshape(windows.shape[0], size, size, -1), grid)
    result: Tensor = attention.proj(joined.flatten(1, 2))
    return result


def _make_windowed(block: Any, size: int) -> None:
    """Change a plain block's class, so that its modules, their names and the weights already loaded stay."""
    attention: Any = getattr(block, "attn", None)
    plain = type(block) is Block and type(attention) is Attention and attention.gate is None
    if not plain or not all(type(norm) is nn.Identity for norm in (attention.q_norm, attention.k_norm, attention.norm)):
        raise ConfigError(
            f"model.backbone.window_size: windows fit timm's Block with plain Attention, this trunk has a "
            f"{type(block).__name__} with {type(attention).__name__}, gates or norms; use another trunk or no windows"
        )
    block.__class__ = WindowedBlock
    block.window_size = size


def _drop_prefix_tokens(vit: Any, config: ViTConfig) -> None:
    """Remove the class and register tokens, with their positions."""
    if vit.num_prefix_tokens == 0:
        return
    if type(vit) is not VisionTransformer:
        raise ConfigError(
            f"model.backbone.class_token: {config.timm!r} is a {type(vit).__name__}, whose tokens cannot be left out; "
            "name a plain VisionTransformer, or remove class_token"
        )
    if vit.pos_embed is not None and not vit.no_embed_class:
        vit.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, vit.num_prefix_tokens :].clone())
    vit.cls_token = vit.reg_token = None
    vit.num_prefix_tokens = vit.num_reg_tokens = 0
    vit.has_class_token = False


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
                f"({type(error).__name__}: {shown(error)}); check the network, or name a local .safetensors file"
            ) from error
        raise ConfigError(
            f"model.backbone.timm: {name!r} cannot be built for images of {image_size} ({error}); "
            "name a VisionTransformer, e.g. 'vit_base_patch16_224'"
        ) from error
    if not isinstance(vit, VisionTransformer | Eva) or getattr(vit, "rope_mixed", False):
        raise ConfigError(
            f"model.backbone.timm: {name!r} is a {type(vit).__name__}, expected a VisionTransformer with learned or "
            "axial rotary positions, e.g. 'vit_base_patch16_224' or 'vit_base_patch16_dinov3'"
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
        class_token=bool(config.class_token),
        global_pool="",
        init_values=config.layer_scale,
        qkv_bias=config.qkv_bias is not False,
        num_classes=0,
        dynamic_img_size=True,
        drop_path_rate=config.drop_path,
    )
    # Positions that start as noise of 0.02 say nothing for hundreds of steps; these tell neighbours at once
    # (arXiv 2205.01580 keeps them fixed, here they are learned on).
    grid = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
    if vit.embed_dim % 4:
        return vit  # sines and cosines of two axes do not fill such a width
    with torch.no_grad():
        vit.pos_embed[:, vit.num_prefix_tokens :] = build_sincos2d_pos_embed(list(grid), dim=vit.embed_dim)
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
