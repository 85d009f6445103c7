"""The trunk of EVA-01's detector (arXiv 2211.07636) and of ViTDet (arXiv 2203.16527).

A plain ViT with absolute positions and, in the attention, decomposed relative ones (arXiv 2112.01526, equation 4): the
logit of a query q at (y, x) and a key at (y', x') gets q · R_h[y - y'] + q · R_w[x - x']. Most blocks attend within
windows, without a mask, so that the zeros which fill up the last windows are attended to. There is no final norm.

EVA-01 adds options: no bias on the keys, layer scale, and another rule for resizing the relative positions (BEiT's).
Names in the state dict are the official ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn

from vitgraft.configs.schema.backbones import EVA01Config
from vitgraft.models.backbones.relative_position import resize_rel_pos_geometric, resize_rel_pos_linear
from vitgraft.models.backbones.trunk import Grid, Trunk, start_linear, to_map, whole_patches, with_positions
from vitgraft.models.backbones.windows import within_windows
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.norms import ChannelLayerNorm
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout, load_trunk


@register("backbone", "eva01")
class EVA01(Trunk):
    """(B, 3, H, W) → the last block's map, (B, embed_dim, H / patch, W / patch).

    ``image_size``: the canvas (height, width) in pixels, for whose grid the relative positions of the global blocks
    are laid out. Other inputs, square or not, get resized tables.

    Raises ``CheckpointError`` for weights that do not fit.
    """

    layout: ClassVar[Layout] = Layout(
        ignored=(
            (r"cls_token$", "the trunk has no class token"),
            (r"(mask_token$|decoder)", "only masked pre-training uses it"),
            (r"(norm|fc_norm|head|lm_head)\.", "the trunk ends with its last block"),
        ),
        fresh=(
            (r"blocks\.\d+\.attn\.rel_pos_[hw]$", "classifiers have no relative positions; they start at zero"),
            (r"blocks\.\d+\.residual\.", "classifiers have no convolutions; they start as the identity"),
        ),
    )

    def __init__(self, config: EVA01Config, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.frozen = config.embed_dim, config.patch_size, config.frozen
        height, width = (side // config.patch_size for side in whole_patches(image_size, config.patch_size))
        self.patch_embed = PatchEmbed(None, config.patch_size, embed_dim=config.embed_dim)
        # One more than the patches: the class token of the pre-training, whose row goes unused.
        places = 1 + (config.pretrain_size // config.patch_size) ** 2
        self.pos_embed: nn.Parameter | None = None
        if config.absolute_positions:
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, places, config.embed_dim), std=0.02))
        self.hold_blocks(Block(config, index, (height, width)) for index in range(config.depth))
        self.geometric = config.rel_pos == "geometric"
        self.apply(start_linear)
        if config.weights is not None:
            load_trunk(self, config.weights)
        self.freeze()

    def resize_loaded(self, name: str, value: Tensor) -> Tensor | None:
        """Tables of relative positions from a file, resized by the recipe's rule; ``None`` for anything else."""
        if not self.geometric or not name.endswith((".rel_pos_h", ".rel_pos_w")):
            return None
        return resize_rel_pos_geometric(value, len(self.get_parameter(name)))

    def embed(self, images: Tensor) -> Tensor:
        return with_positions(self.patch_embed(images), self.pos_embed, self.grid_of(images))


class Block(GraftableBlock):
    """x += γ₁ · attention(norm1(x)), x += γ₂ · mlp(norm2(x)), and for some blocks x += convolutions(x).

    ``grid``: that of the canvas. Tokens (B, N, C) and their grid in, tokens out.
    """

    def __init__(self, config: EVA01Config, index: int, grid: Grid) -> None:
        super().__init__()
        width = config.embed_dim
        self.window_size = 0 if index in config.global_blocks else config.window_size
        table = (self.window_size, self.window_size) if self.window_size else grid
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(config, table)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(config.drop_path * index / max(1, config.depth - 1))
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if config.layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((width,), float(config.layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((width,), float(config.layer_scale)))
        self.residual = ResidualBottleneck(width) if index in config.residual_blocks else None

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        maps = self.norm1(tokens).unflatten(1, grid)
        attended = within_windows(self.attn, maps, self.window_size).flatten(1, 2)
        tokens = tokens + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        branch = self.mlp(self.norm2(tokens))
        tokens = self.add_ffn(tokens, self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch))
        if self.residual is not None:
            tokens = self.residual(to_map(tokens, grid)).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Attention over maps (B, h, w, C) with decomposed relative positions, laid out for a grid ``table``."""

    def __init__(self, config: EVA01Config, table: Grid) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.rule = config.rel_pos
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias == "full")
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        if config.qkv_bias == "beit":
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        if config.rel_pos != "none":
            head = width // config.num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * table[0] - 1, head))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * table[1] - 1, head))

    def forward(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        qkv = self.qkv(maps)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]).to(qkv.dtype)
        qkv = qkv.view(batch, height * width, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self._bias(q, (height, width)) if self.rule != "none" else None
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        result: Tensor = self.proj(x.transpose(1, 2).reshape(batch, height, width, channels))
        return result

    def _bias(self, q: Tensor, grid: Grid) -> Tensor:
        """q: (B, heads, N, C / heads), not yet scaled → what the logits get, (B, heads, N, N)."""
        height, width = grid
        q = q.view(*q.shape[:2], height, width, -1)
        rows = torch.einsum("bnyxc,ykc->bnyxk", q, self._between(self.rel_pos_h, height).to(q.dtype))
        columns = torch.einsum("bnyxc,xkc->bnyxk", q, self._between(self.rel_pos_w, width).to(q.dtype))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)

    def _between(self, table: Tensor, length: int) -> Tensor:
        """A table (2 · size - 1, C) → the entries from every query to every key of an axis, (length, length, C)."""
        if len(table) != 2 * length - 1:
            resize = resize_rel_pos_linear if self.rule == "linear" else resize_rel_pos_geometric
            table = resize(table, 2 * length - 1)
        places = torch.arange(length, device=table.device)
        return table[places[:, None] - places[None] + length - 1]


class ResidualBottleneck(nn.Module):
    """maps (B, C, h, w) plus three convolutions of them, C → C / 2 → C / 2 → C, each with a norm; GELU in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width // 2, 1, bias=False)
        self.norm1 = ChannelLayerNorm(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.norm2 = ChannelLayerNorm(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 1, bias=False)
        self.norm3 = ChannelLayerNorm(width)
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm3.weight)

    def forward(self, maps: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(maps)))
        x = F.gelu(self.norm2(self.conv2(x)))
        result: Tensor = maps + self.norm3(self.conv3(x))
        return result
