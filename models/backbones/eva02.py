"""The trunk of EVA-02's detector (arXiv 2303.11331).

A plain ViT with absolute positions, rotary positions on two axes (arXiv 2104.09864) in the attention, and SwiGLU
(arXiv 2002.05202), with a LayerNorm inside it for the larger ones, as FFN. Most blocks attend within windows, without
a mask, so that the zeros which fill up the last windows are attended to. There is no final norm.

The rotary tables are computed for the grid at hand and never loaded. Names in the state dict are the official ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed
from torch import Tensor, nn

from vitgraft.configs.schema.backbones import EVA02Config
from vitgraft.models.backbones.eva01 import ResidualBottleneck
from vitgraft.models.backbones.trunk import Grid, Trunk, start_linear, to_map, with_positions
from vitgraft.models.backbones.windows import within_windows
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout, load_trunk

NORM_EPS = 1e-6


@register("backbone", "eva02")
class EVA02(Trunk):
    """(B, 3, H, W) → the last block's map, (B, embed_dim, H / patch, W / patch).

    ``image_size``: the canvas (height, width) in pixels; nothing is laid out for it.

    Raises ``CheckpointError`` for weights that do not fit.
    """

    layout: ClassVar[Layout] = Layout(
        ignored=(
            (r"cls_token$", "the trunk has no class token"),
            (r"mask_token$", "only masked pre-training uses it"),
            (r"(norm|fc_norm|head|lm_head)\.", "the trunk ends with its last block"),
            (r"(.*\.)?rope(_win|_glb)?\.freqs_(cos|sin)$", "the rotary tables are computed"),
        ),
        fresh=((r"blocks\.\d+\.residual\.", "classifiers have no convolutions; they start as the identity"),),
    )

    def __init__(self, config: EVA02Config, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.frozen = config.embed_dim, config.patch_size, config.frozen
        self.patch_embed = PatchEmbed(None, config.patch_size, embed_dim=config.embed_dim)
        # One more than the patches: the class token of the pre-training, whose row goes unused.
        places = 1 + (config.pretrain_size // config.patch_size) ** 2
        self.pos_embed: nn.Parameter | None = None
        if config.absolute_positions:
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, places, config.embed_dim), std=0.02))
        self.hold_blocks(Block(config, index) for index in range(config.depth))
        self.apply(start_linear)
        if config.weights is not None:
            load_trunk(self, config.weights)
        self.freeze()

    def embed(self, images: Tensor) -> Tensor:
        return with_positions(self.patch_embed(images), self.pos_embed, self.grid_of(images))


class Block(GraftableBlock):
    """x += attention(norm1(x)), x += swiglu(norm2(x)); tokens (B, N, C) and their grid in, tokens out."""

    def __init__(self, config: EVA02Config, index: int) -> None:
        super().__init__()
        self.window_size = 0 if index in config.global_blocks else config.window_size
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.mlp = SwiGLU(config)
        self.drop_path = DropPath(config.drop_path * index / max(1, config.depth - 1))
        self.residual = ResidualBottleneck(config.embed_dim) if index in config.residual_blocks else None

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        maps = self.norm1(tokens).unflatten(1, grid)
        attended = within_windows(self.attn, maps, self.window_size).flatten(1, 2)
        tokens = tokens + self.drop_path(attended)
        tokens = self.add_ffn(tokens, self.drop_path(self.mlp(self.norm2(tokens))))
        if self.residual is not None:
            tokens = self.residual(to_map(tokens, grid)).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Attention over maps (B, h, w, C) with rotary positions; no bias on the keys."""

    def __init__(self, config: EVA02Config) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.rope_grid = config.num_heads, config.rope_grid
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        q, k, v = self.q_proj(maps), self.k_proj(maps), self.v_proj(maps)
        q, v = q + self.q_bias.to(q.dtype), v + self.v_bias.to(v.dtype)
        q, k, v = (x.view(batch, height * width, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        angles = rotary_angles((height, width), q.shape[-1], self.rope_grid, q.device)
        x = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        result: Tensor = self.proj(x.transpose(1, 2).reshape(batch, height, width, channels))
        return result


def rotary_angles(grid: Grid, head: int, pretrain_grid: int, device: torch.device) -> Tensor:
    """The angle of every pair of a head's channels at every token of ``grid``: (h · w, head / 2), float32.

    The first half of the pairs turns with y, the second with x, at 10000^(-2j / (head / 2)) per step, j = 0 … head / 4
    - 1. A step is one token of the pre-training's grid: the grid at hand, whatever its size, spans ``pretrain_grid``.
    """
    height, width = grid
    pairs = torch.arange(0, head // 2, 2, dtype=torch.float32, device=device)
    speed = 10_000.0 ** (-pairs / (head // 2))
    y = torch.arange(height, dtype=torch.float32, device=device) * (pretrain_grid / height)
    x = torch.arange(width, dtype=torch.float32, device=device) * (pretrain_grid / width)
    of_y = (y[:, None] * speed)[:, None].expand(height, width, -1)
    of_x = (x[:, None] * speed)[None].expand(height, width, -1)
    return torch.cat([of_y, of_x], -1).flatten(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x: (B, heads, N, head), its neighbouring channels (0, 1), (2, 3), … turned as pairs; computed in float32."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """w3(norm(silu(w1(x)) · w2(x)))."""

    def __init__(self, config: EVA02Config) -> None:
        super().__init__()
        width, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=NORM_EPS) if config.sub_ln else nn.Identity()
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
        return result
