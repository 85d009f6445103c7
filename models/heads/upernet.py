"""UperNet (arXiv 1807.10221) without its part and material branches: one class for every pixel.

Pyramid pooling on the deepest map, lateral connections and a top-down path, all levels fused at the finest stride, one
classifier, and an auxiliary classifier on a map in the middle during training.

Pyramid pooling makes maps of one place, so a BatchNorm may see a single value per channel when a rank has one image;
``vitgraft.models.norms.BatchNorm`` then uses its running statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgraft.configs.schema.model import Norm, UperNetConfig
from vitgraft.models.contract import Counts, Losses, LossTerm
from vitgraft.models.norms import make_norm
from vitgraft.models.pooling import average_to_grid
from vitgraft.models.registry import register

IGNORED = 255
AUXILIARY_STRIDE = 16
AUXILIARY_CHANNELS = 256


class ConvNorm(nn.Sequential):
    """Convolution without bias that keeps the size, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Norm) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            make_norm(norm, outputs),
            nn.ReLU(inplace=True),
        )


class PyramidPooling(nn.Module):
    """Pyramid pooling (arXiv 1612.01105): (B, inputs, h, w) → (B, outputs, h, w) with context of every scale."""

    def __init__(self, inputs: int, outputs: int, scales: list[int], norm: Norm) -> None:
        super().__init__()
        self.scales = scales
        self.branches = nn.ModuleList(ConvNorm(inputs, outputs, 1, norm) for _ in scales)
        self.fuse = ConvNorm(inputs + len(scales) * outputs, outputs, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        context = [
            _resize(branch(average_to_grid(x, scale, scale)), x)
            for scale, branch in zip(self.scales, self.branches, strict=True)
        ]
        fused: Tensor = self.fuse(torch.cat([x, *context], 1))
        return fused


@register("head", "upernet")
class UperNet(nn.Module):
    """Logits for every pixel from maps of ascending strides (one map is enough: pyramid pooling alone)."""

    def __init__(self, config: UperNetConfig, *, channels: dict[int, int], num_classes: int) -> None:
        super().__init__()
        self.strides = sorted(channels)
        width, norm = config.channels, config.norm
        shallow = self.strides[:-1]
        self.pooling = PyramidPooling(channels[self.strides[-1]], width, config.pool_scales, norm)
        self.laterals = nn.ModuleList(ConvNorm(channels[stride], width, 1, norm) for stride in shallow)
        self.smooth = nn.ModuleList(ConvNorm(width, width, 3, norm) for _ in shallow)
        self.fuse = ConvNorm(len(self.strides) * width, width, 3, norm)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary_weight = config.auxiliary_weight
        self.auxiliary_stride = min(self.strides, key=lambda stride: abs(stride - AUXILIARY_STRIDE))
        if self.auxiliary_weight > 0:
            self.auxiliary = nn.Sequential(
                ConvNorm(channels[self.auxiliary_stride], AUXILIARY_CHANNELS, 3, norm),
                nn.Dropout2d(config.dropout),
                nn.Conv2d(AUXILIARY_CHANNELS, num_classes, 1),
            )

    def forward(
        self,
        maps: dict[int, Tensor],
        sizes: Tensor,
        canvas: tuple[int, int],
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Losses | Tensor:
        """Return losses, or logits without targets. maps: {stride: (B, C, H/stride, W/stride)}; sizes: (B, 2), not
        needed: padding is labelled 255.

        With targets (B, H, W) int64, the losses ``semantic`` and ``auxiliary`` (its total already multiplied by its
        weight) over all pixels but the ignored ones, with per-image weights (B,); without, logits (B, K, H, W) float32.
        """
        logits = self._upsample(self._logits(maps), self.strides[0], canvas)
        if targets is None:
            return logits
        losses = {"semantic": pixel_loss(logits, targets, weights)}
        if self.auxiliary_weight > 0:
            auxiliary = self._upsample(self.auxiliary(maps[self.auxiliary_stride]), self.auxiliary_stride, canvas)
            total, count = pixel_loss(auxiliary, targets, weights)
            losses["auxiliary"] = LossTerm(total * self.auxiliary_weight, count)
        return losses

    def counts(self, targets: Tensor, weights: Tensor) -> Counts:
        """Return the number of valid pixels, from targets (B, H, W) int64 and weights (B,)."""
        pixels = count_pixels(targets, weights)
        return {"semantic": pixels} | ({"auxiliary": pixels} if self.auxiliary_weight > 0 else {})

    def recompute_units(self) -> list[nn.Module]:
        """Return the units of activation checkpointing: those with 3 × 3 convolutions."""
        return [self.pooling, *self.smooth, self.fuse]

    def _logits(self, maps: dict[int, Tensor]) -> Tensor:
        """Return logits (B, K, h, w) at the finest stride."""
        deepest = self.pooling(maps[self.strides[-1]])
        levels = [lateral(maps[stride]) for lateral, stride in zip(self.laterals, self.strides[:-1], strict=True)]
        above = deepest
        for index in reversed(range(len(levels))):
            above = levels[index] = levels[index] + _resize(above, levels[index])
        smooth = [conv(level) for conv, level in zip(self.smooth, levels, strict=True)] + [deepest]
        fused = self.fuse(torch.cat([_resize(level, smooth[0]) for level in smooth], 1))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits

    def _upsample(self, logits: Tensor, stride: int, canvas: tuple[int, int]) -> Tensor:
        """Upsample to pixels; a map may exceed a canvas that is not a multiple of its stride."""
        whole = (logits.shape[-2] * stride, logits.shape[-1] * stride)
        with torch.autocast(logits.device.type, enabled=False):
            pixels = F.interpolate(logits.float(), whole, mode="bilinear", align_corners=False)
        return pixels[..., : canvas[0], : canvas[1]]


def pixel_loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> LossTerm:
    """Return the cross-entropy summed over pixels: logits (B, K, H, W) float32, targets (B, H, W) int64 with 255
    ignored."""
    with torch.autocast(logits.device.type, enabled=False):
        wrong = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").sum((1, 2))
        if weights is None:
            weights = torch.ones_like(wrong)
        return LossTerm((wrong * weights).sum(), count_pixels(targets, weights))


def count_pixels(targets: Tensor, weights: Tensor) -> Tensor:
    """Return the number of valid pixels, weighted by image: targets (B, H, W) int64, weights (B,) → scalar."""
    return ((targets != IGNORED).sum((1, 2)).float() * weights).sum()


def _resize(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
