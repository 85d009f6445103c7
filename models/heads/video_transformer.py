"""A joint space-time transformer over the maps of a clip's frames, and one classifier for the clip.

Each place of a frame's map is read together with how it changes in time, the difference between the next frame and
the one before (a temporal difference as in arXiv 2012.10071, here central and on the trunk's features), so that motion
is seen before the map is pooled to a small grid of tokens. All tokens of all frames attend to each other (the joint
attention of ViViT's model 1, arXiv 2103.15691, on a frozen or trained image trunk). Places have learned positions,
frames sinusoids (arXiv 1706.03762, section 3.5), so a clip may have any number of frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.schema.model import VideoTransformerConfig
from vitgraft.models.contract import Counts, Losses, LossTerm
from vitgraft.models.pooling import average_to_grid
from vitgraft.models.registry import register


@register("head", "video_transformer")
class VideoTransformer(nn.Module):
    """Logits for a clip. Maps of several strides are each pooled to the same grid, projected and added."""

    def __init__(self, config: VideoTransformerConfig, *, channels: dict[int, int], num_classes: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.grid = config.grid
        self.label_smoothing = config.label_smoothing
        self.projections = nn.ModuleDict(
            {str(stride): nn.Linear(2 * channels[stride], width) for stride in sorted(channels)}
        )
        self.position = nn.Parameter(torch.empty(1, 1, config.grid**2, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(
            *(
                Block(width, config.num_heads, qkv_bias=True, proj_drop=config.dropout, attn_drop=config.dropout)
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        maps: dict[int, Tensor],
        sizes: Tensor,
        canvas: tuple[int, int],
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Losses | Tensor:
        """Return losses, or logits without targets. maps: {stride: (B, T, C, H/stride, W/stride)}; sizes and canvas are
        not needed.

        With targets (B,) int64, or soft ones (B, K) float32 (mixup, cutmix), the loss ``video`` with weights (B,) for
        each clip; without, logits (B, K) float32.
        """
        logits = self._logits(maps)
        if targets is None:
            return logits
        with torch.autocast(logits.device.type, enabled=False):
            wrong = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
            if weights is None:
                weights = torch.ones_like(wrong)
            return {"video": LossTerm((wrong * weights).sum(), weights.sum())}

    def counts(self, targets: Tensor, weights: Tensor) -> Counts:
        """Return the number of clips, weighted."""
        return {"video": weights.sum()}

    def recompute_units(self) -> list[nn.Module]:
        """Return the units of activation checkpointing: the blocks."""
        return list(self.blocks)

    def _logits(self, maps: dict[int, Tensor]) -> Tensor:
        pooled = [
            _pool(F.gelu(projection(_with_change(maps[int(stride)]))), self.grid)
            for stride, projection in self.projections.items()
        ]
        tokens = torch.stack(pooled).sum(0)
        frames = sinusoids(tokens.shape[1], tokens.shape[3], tokens.device).to(tokens.dtype)
        tokens = (tokens + self.position + frames[None, :, None]).flatten(1, 2)
        clip = self.norm(self.blocks(tokens)).mean(1)
        logits: Tensor = self.classifier(self.dropout(clip))
        return logits.float()


def _with_change(frames: Tensor) -> Tensor:
    """Append temporal differences: (B, T, C, h, w) → (B, T, h, w, 2 C); first and last frame are repeated."""
    padded = torch.cat([frames[:, :1], frames, frames[:, -1:]], 1)
    return torch.cat([frames, padded[:, 2:] - padded[:, :-2]], 2).permute(0, 1, 3, 4, 2)


def _pool(places: Tensor, grid: int) -> Tensor:
    """Pool (B, T, h, w, C) → (B, T, grid², C)."""
    batch, length = places.shape[:2]
    pooled = average_to_grid(places.flatten(0, 1).permute(0, 3, 1, 2), grid, grid)
    return pooled.flatten(2).transpose(1, 2).reshape(batch, length, grid * grid, -1)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Return sines (even channels) and cosines (odd ones) of positions 0..length-1: (length, width) float32."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]
