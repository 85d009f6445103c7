"""The trunk of Uni-Perceiver (arXiv 2112.01522), as ViT-Adapter (arXiv 2205.08534) uses it.

A ViT that was trained on images, clips and text: places and times have tables of their own, and their sum with the
patches is normed before the first block. An image is the first moment of a clip. Blocks attend globally or within
windows. There is no final norm. The normed tokens are filled up with zeros to whole windows *before* the projection to
queries, keys and values, without a mask: the added tokens get the projection's bias and are attended to.

Names in the state dict are the official ones of the converted files, but for ``blocks``, officially ``layers``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn

from vitgraft.configs.schema.backbones import UniPerceiverConfig
from vitgraft.models.backbones.trunk import Grid, Trunk
from vitgraft.models.backbones.windows import within_windows
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout, load_trunk

EPS = 1e-5
MOMENTS = 8
"""Rows of the table of times."""


@register("backbone", "uniperceiver")
class UniPerceiver(Trunk):
    """(B, 3, H, W) → the last block's map, (B, embed_dim, H / patch, W / patch).

    Nothing is laid out for ``image_size``: the table of places is that of the pre-training, resized to every input.

    Raises ``CheckpointError`` for weights that do not fit.
    """

    layout: ClassVar[Layout] = Layout(
        renames=(
            # The original release; converted files need none but the last.
            (r"^fused_encoder\.", ""),
            (r"\.in_proj_(weight|bias)$", r".in_proj.\1"),
            (r"^video_embed\.", "visual_embed."),
            (r"^visual_embed\.embeddings\.", "visual_embed.patch_embed.proj."),
            (r"^visual_embed\.embeddings_st_pos\.", "visual_embed.patch_embed."),
            (r"^layers\.", "blocks."),
        ),
        ignored=(
            (r"loss_prepare", "only pre-training uses it"),
            (r"token_embed", "it embeds text"),
        ),
    )

    def __init__(self, config: UniPerceiverConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.frozen = config.embed_dim, config.patch_size, config.frozen
        self.visual_embed = VisualEmbedding(config)
        self.hold_blocks(Block(config, index) for index in range(config.depth))
        self.apply(_initialise)
        if config.weights is not None:
            load_trunk(self, config.weights)
        self.freeze()

    def embed(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.visual_embed(images)
        return tokens


class VisualEmbedding(nn.Module):
    """Images (B, 3, H, W) → norm(patches + place + time), (B, N, C)."""

    def __init__(self, config: UniPerceiverConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config)
        self.embeddings_norm = nn.LayerNorm(config.embed_dim, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.embeddings_norm(self.patch_embed(images))
        return tokens


class PatchEmbedding(nn.Module):
    """Images (B, 3, H, W) → patches + place + time, (B, N, C)."""

    def __init__(self, config: UniPerceiverConfig) -> None:
        super().__init__()
        places = (config.pretrain_size // config.patch_size) ** 2
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, stride=config.patch_size)
        self.spatial_pos_embed = nn.Embedding(places, config.embed_dim)
        self.temporal_pos_embed = nn.Embedding(MOMENTS, config.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.proj(images)
        # The tables are asked as modules, so that ZeRO-3 gathers them.
        places = torch.arange(self.spatial_pos_embed.num_embeddings, device=images.device)[None]
        place: Tensor = resample_abs_pos_embed(
            self.spatial_pos_embed(places), list(maps.shape[-2:]), num_prefix_tokens=0, antialias=False
        )
        time: Tensor = self.temporal_pos_embed(places[:, :1])
        return maps.flatten(2).transpose(1, 2) + place + time


class Block(GraftableBlock):
    """x += γ₁ · attention(norm1(x)), x += γ₂ · linear2(gelu(linear1(norm2(x)))).

    Tokens (B, N, C) and their grid in, tokens out. Drop path stands before γ, which is the same as behind it.
    """

    def __init__(self, config: UniPerceiverConfig, index: int) -> None:
        super().__init__()
        width, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.window_size = config.window_sizes()[index]
        self.takes_prompts = self.window_size == 0
        self.self_attn = Attention(width, config.num_heads)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.drop_path = DropPath(config.drop_path * index / max(1, config.depth - 1))
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if config.layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((width,), float(config.layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((width,), float(config.layer_scale)))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        attended = self.drop_path(self._attended(self.norm1(tokens), grid))
        tokens = tokens + (attended if self.gamma_1 is None else self.gamma_1 * attended)
        branch = self.drop_path(self.linear2(F.gelu(self.linear1(self.norm2(tokens)))))
        return self.add_ffn(tokens, branch if self.gamma_2 is None else self.gamma_2 * branch)

    def _attended(self, tokens: Tensor, grid: Grid) -> Tensor:
        if self.window_size == 0:
            # Prompts may stand before the tokens, so these need not fill the grid.
            attended: Tensor = self.self_attn(tokens)
            return attended

        def attention(windows: Tensor) -> Tensor:
            inside: Tensor = self.self_attn(windows.flatten(1, 2))
            return inside.view_as(windows)

        maps = tokens.view(tokens.shape[0], *grid, tokens.shape[-1])
        return within_windows(attention, maps, self.window_size).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention over tokens (B, N, C), with biases on queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.in_proj(tokens).view(*tokens.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))
        return result


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
