"""The trunk of BEiT (arXiv 2106.08254) and BEiTv2 (arXiv 2208.06366), as ViT-Adapter (arXiv 2205.08534) uses it.

A ViT whose attention adds a learned bias to every logit, one for each head and each offset between two tokens. In
detection the blocks attend within windows, each block with a size of its own, and there is no class token; in
segmentation they attend globally, and a class token may travel along. There is no final norm. The normed tokens are
filled up with zeros to whole windows *before* the projection to queries, keys and values, without a mask: the added
tokens get the projection's bias and are attended to.

Names in the state dict are the official ones, index buffers left out.
"""

from __future__ import annotations

import math
import re
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn

from vitgraft.configs.schema.backbones import BEiTConfig
from vitgraft.models.backbones.relative_position import (
    CLASS_ROWS,
    offsets,
    relative_position_index,
    resize_bias_table,
)
from vitgraft.models.backbones.trunk import Grid, Trunk, start_linear, whole_patches, with_positions
from vitgraft.models.backbones.windows import within_windows
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout, load_trunk


@register("backbone", "beit")
class BEiT(Trunk):
    """(B, 3, H, W) → the last block's map, (B, embed_dim, H / patch, W / patch).

    ``image_size``: the canvas (height, width) in pixels, for whose grid the biases of the global blocks are laid out.
    Another input, square or not, gets them resized: the same offset keeps its bias on a smaller grid, and a larger one
    is reached by the authors' geometric rule.

    Raises ``CheckpointError`` for weights that do not fit.
    """

    layout: ClassVar[Layout] = Layout(
        ignored=((r"^cls_pt_layers\.", "only the masked pre-training needs it"),),
        fresh=(
            (
                r"^blocks\.\d+\.attn\.relative_position_bias_table$",
                "trunks without relative positions have no biases; they start at zero",
            ),
        ),
    )

    def __init__(self, config: BEiTConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        width = config.embed_dim
        self.embed_dim, self.patch_size, self.frozen = width, config.patch_size, config.frozen
        rows, columns = (side // config.patch_size for side in whole_patches(image_size, config.patch_size))
        self.patch_embed = PatchEmbed(None, config.patch_size, embed_dim=width)
        self.cls_token: nn.Parameter | None = None
        if config.class_token:
            self.prefix_tokens = 1
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.pos_embed: nn.Parameter | None = None
        if config.absolute_positions:
            # The first row is the class token's; like the official dense trunks, this one does not use it.
            places = 1 + (config.pretrain_size // config.patch_size) ** 2
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, places, width), std=0.02))
        self.hold_blocks(Block(config, index, (rows, columns)) for index in range(config.depth))
        self.apply(start_linear)
        for index, block in enumerate(self.blocks):
            cast(Block, block).scale_start(index + 1)
        if config.weights is not None:
            load_trunk(self, config.weights)
        self.freeze()

    def embed(self, images: Tensor) -> Tensor:
        tokens = with_positions(self.patch_embed(images), self.pos_embed, self.grid_of(images))
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        return tokens

    def resize_loaded(self, name: str, value: Tensor) -> Tensor | None:
        """A bias table from a file, (rows, heads), for the block that it belongs to; ``None`` for anything else.

        Tables of a file are those of a square grid, with or without the rows of a class token.
        """
        block = re.fullmatch(r"blocks\.(\d+)\.attn\.relative_position_bias_table", name)
        if block is None or value.ndim != 2:
            return None
        return cast(Block, self.blocks[int(block.group(1))]).attn.fitted_table(value)


class Block(GraftableBlock):
    """x += γ₁ · attention(norm1(x)), x += γ₂ · mlp(norm2(x)).

    ``grid``: that of the canvas. Tokens (B, N, C), class token included, and the grid of the others in, tokens out.
    """

    def __init__(self, config: BEiTConfig, index: int, grid: Grid) -> None:
        super().__init__()
        width = config.embed_dim
        self.window_size = config.window_sizes()[index]
        self.takes_prompts = self.window_size == 0 and not config.relative_bias
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(config, (self.window_size, self.window_size) if self.window_size else grid)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(config.drop_path * index / max(1, config.depth - 1))
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if config.layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((width,), float(config.layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((width,), float(config.layer_scale)))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        attended = self._attended(self.norm1(tokens), grid)
        tokens = tokens + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        branch = self.mlp(self.norm2(tokens))
        return self.add_ffn(tokens, self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch))

    def scale_start(self, layer: int) -> None:
        """BEiT's start: what the ``layer``-th block (from 1) adds to the stream is divided by √(2 · layer)."""
        with torch.no_grad():
            self.attn.proj.weight.div_(math.sqrt(2 * layer))
            self.mlp.fc2.weight.div_(math.sqrt(2 * layer))

    def _attended(self, tokens: Tensor, grid: Grid) -> Tensor:
        size = self.window_size
        if size == 0:
            attended: Tensor = self.attn(tokens, grid)
            return attended

        def attention(windows: Tensor) -> Tensor:
            inside: Tensor = self.attn(windows.flatten(1, 2), (size, size))
            return inside.view_as(windows)

        maps = tokens.view(tokens.shape[0], *grid, tokens.shape[-1])
        return within_windows(attention, maps, size).flatten(1, 2)


class Attention(nn.Module):
    """softmax(q kᵀ / √d + bias of the offset) v, over tokens (B, N, C) of a grid, a class token first if there is one.

    ``built``: the grid or window that the table of biases is laid out for.
    """

    def __init__(self, config: BEiTConfig, built: Grid) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.built = built
        self.extra_rows = CLASS_ROWS if config.class_token else 0
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        if config.qkv_bias:
            # A bias of the keys would add the same to all logits of a query.
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.relative_position_bias_table: nn.Parameter | None = None
        if config.relative_bias:
            table = torch.zeros(offsets(built) + self.extra_rows, config.num_heads)
            self.relative_position_bias_table = nn.Parameter(table)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        qkv = self.qkv(tokens)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]).to(qkv.dtype)
        q, k, v = qkv.view(*tokens.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self._bias(grid)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        result: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return result

    def fitted_table(self, table: Tensor) -> Tensor | None:
        """A table (rows, heads) of a square grid as one for ours; ``None`` when it is no such table.

        The rows of a class token are dropped where there is none; where they lack they are zeros.
        """
        sides = {extra: math.isqrt(max(0, len(table) - extra)) for extra in (0, CLASS_ROWS)}
        extra = next((extra for extra, side in sides.items() if side % 2 and side**2 + extra == len(table)), None)
        if extra is None:
            return None
        side = (sides[extra] + 1) // 2
        resized, rows = resize_bias_table(table, (side, side), self.built, extra), offsets(self.built)
        of_class = resized[rows:] if extra else resized.new_zeros(CLASS_ROWS, table.shape[1])
        return torch.cat([resized[:rows], of_class[: self.extra_rows]])

    def _bias(self, grid: Grid) -> Tensor | None:
        """Return the bias added to the attention logits: (heads, N, N)."""
        table = self.relative_position_bias_table
        if table is None:
            return None
        resized = resize_bias_table(table, self.built, grid, self.extra_rows, lowest_ratio=1)
        index = relative_position_index(grid, self.extra_rows > 0, table.device)
        return resized[index.flatten()].view(*index.shape, self.num_heads).permute(2, 0, 1).contiguous()
