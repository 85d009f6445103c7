"""The video ViT of VideoMAE (arXiv 2203.12602), which AdaptFormer (arXiv 2205.13535) uses for its clips.

A clip is cut into tubelets (two frames deep, one patch wide) by a 3-d convolution; all tokens of all tubelets attend to
each other. Positions are fixed sinusoids over the flat token index in the order time, row, column, so they are computed
for a clip of any length and size. There is no class token and no final norm: the classifier norms the mean of the
tokens instead (``fc_norm`` in ``heads/classifier.py``). Keys have no bias. Names are those of VideoMAE's fine-tuned
model, without positions and classifier.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.backbones import VideoMAEConfig
from vitgraft.models.backbones.trunk import Grid, Trunk, Visit, start_linear
from vitgraft.models.grafting import GraftableBlock
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout, load_trunk


@register("backbone", "videomae")
class VideoMAE(Trunk):
    """A video ViT as a trunk: clips (B, 3, T, H, W) in, the map (B, T / tubelet, C, H / patch, W / patch) out.

    ``image_size``: the canvas (height, width) of a frame; nothing depends on it. A visit is shown the tubelets as if
    they were images: tokens (B · T / tubelet, h · w, C).

    Raises ``CheckpointError`` for weights that do not fit.
    """

    takes_clips: ClassVar[bool] = True
    layout: ClassVar[Layout] = Layout(ignored=((r"^pos_embed$", "fixed sinusoids, computed here"),))

    def __init__(self, config: VideoMAEConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.tubelet_size = config.embed_dim, config.patch_size, config.tubelet_size
        self.frozen = config.frozen
        self.patch_embed = TubeletEmbed(config)
        last = max(1, config.depth - 1)
        self.hold_blocks(VideoBlock(config, config.drop_path * index / last) for index in range(config.depth))
        self.blocks.apply(start_linear)
        if config.weights is not None:
            load_trunk(self, config.weights)
        self.freeze()

    def embed(self, images: Tensor) -> Tensor:
        """images: (B, 3, T, H, W), float, normalised RGB → tokens with positions (B, T / tubelet · h · w, C).

        Raises ``ConfigError`` for anything but clips, and for a length that is no multiple of the tubelet.
        """
        if images.ndim != 5:
            raise ConfigError(
                f"model.backbone: videomae reads clips (B, 3, T, H, W), not an input of shape {tuple(images.shape)}; "
                "give it video data, or name an image trunk"
            )
        if images.shape[2] % self.tubelet_size:
            raise ConfigError(
                f"data.clip.frames: {images.shape[2]} frames are no multiple of the {self.tubelet_size} that a "
                f"tubelet of videomae is deep; use e.g. {-(-images.shape[2] // self.tubelet_size) * self.tubelet_size}"
            )
        tokens: Tensor = self.patch_embed(images)
        return (tokens + positions(tokens.shape[1], self.embed_dim, tokens.device)).to(images.dtype)

    def run_block(self, index: int, tokens: Tensor, grid: Grid) -> Tensor:
        """One block over all tokens; they attend to each other across the clip."""
        result: Tensor = self.blocks[index](tokens)
        return result

    def _maps(self, images: Tensor, visit: Visit | None) -> tuple[Tensor, ...]:
        tokens = self.tokens(images, visit)[:, self.prefix_tokens :]
        height, width = self.grid_of(images)
        return (tokens.reshape(tokens.shape[0], -1, height, width, self.embed_dim).permute(0, 1, 4, 2, 3),)

    def _visited(self, visit: Visit | None, index: int, tokens: Tensor, grid: Grid) -> Tensor:
        if visit is None:
            return tokens

        def each_tubelet(index: int, tokens: Tensor, grid: Grid) -> Tensor:
            tubelets = tokens.reshape(-1, grid[0] * grid[1], self.embed_dim)
            return visit(index, tubelets, grid).reshape(tokens.shape)

        return super()._visited(each_tubelet, index, tokens, grid)


class TubeletEmbed(nn.Module):
    """Clips (B, 3, T, H, W) → tokens (B, T / tubelet · H / patch · W / patch, C) in the order time, row, column."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        size = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.embed_dim, size, stride=size)

    def forward(self, clips: Tensor) -> Tensor:
        tokens: Tensor = self.proj(clips).flatten(2).transpose(1, 2)
        return tokens


class VideoAttention(nn.Module):
    """Global self-attention over tokens (B, N, C), with biases on queries and values only."""

    def __init__(self, width: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        if bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]).to(qkv.dtype)
        heads = qkv.reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        result: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return result


class Mlp(nn.Module):
    """The FFN: two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class VideoBlock(GraftableBlock):
    """Attention and FFN, each after a LayerNorm (eps 1e-6) and beside a residual."""

    takes_prompts = True

    def __init__(self, config: VideoMAEConfig, drop_path: float) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VideoAttention(width, config.num_heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return self.add_ffn(x, self.drop_path(self.mlp(self.norm2(x))))


def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids of the flat token index n: (length, width) float32.

    Sines of n / 10000^(2 ⌊j / 2⌋ / width) in the even channels j, cosines in the odd ones (arXiv 1706.03762, section
    3.5). Angles are float64: those of long clips reach thousands.
    """
    channel = torch.arange(width, device=device)
    rate = 10000.0 ** -(2 * (channel // 2).double() / width)
    angle = torch.arange(length, device=device).double()[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
