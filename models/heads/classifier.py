"""One linear classifier on the mean of a clip's or an image's tokens.

mean over time and place → ``fc_norm`` (VideoMAE, arXiv 2203.12602) → BatchNorm without weights (linear probes,
arXiv 2111.06377) → Linear. Names are those of AdaptFormer's code: ``fc_norm``, and ``head`` or, with the BatchNorm,
``head.0`` and ``head.1``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.heads import ClassifierConfig, ImageClassifierConfig
from vitgraft.models.contract import Counts, Losses, LossTerm
from vitgraft.models.norms import BatchNorm
from vitgraft.models.registry import register


@register("head", "classifier")
@register("head", "image_classifier")
class Classifier(nn.Module):
    """Logits for a clip or an image.

    Raises ``ConfigError`` when there are maps of several strides.
    """

    def __init__(
        self, config: ClassifierConfig | ImageClassifierConfig, *, channels: dict[int, int], num_classes: int
    ) -> None:
        super().__init__()
        if len(channels) != 1:
            raise ConfigError(
                f"model.head: {config.name} reads one map, not those of strides {list(channels)}; name a plain trunk "
                "without an adapter that makes several"
            )
        ((self.stride, width),) = channels.items()
        self.task = config.task
        self.label_smoothing = config.label_smoothing
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if config.fc_norm else nn.Identity()
        linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        probe = BatchNorm(width, eps=1e-6, affine=False)
        self.head = nn.Sequential(probe, linear) if config.batch_norm else linear

    def forward(
        self,
        maps: dict[int, Tensor],
        sizes: Tensor,
        canvas: tuple[int, int],
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Losses | Tensor:
        """Return losses, or logits without targets. maps: {stride: (B, T, C, H/stride, W/stride)}, of images without T;
        sizes and canvas are not needed.

        With targets (B,) int64, or soft ones (B, K) float32 (mixup, cutmix), the loss ``video`` or ``image``
        with weights (B,) for each; without, logits (B, K) float32.
        """
        tokens = maps[self.stride]
        pooled = self.fc_norm(tokens.mean((1, 3, 4) if tokens.ndim == 5 else (2, 3)))
        logits: Tensor = self.head(pooled).float()
        if targets is None:
            return logits
        with torch.autocast(logits.device.type, enabled=False):
            wrong = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
            if weights is None:
                weights = torch.ones_like(wrong)
            return {self.task: LossTerm((wrong * weights).sum(), weights.sum())}

    def counts(self, targets: Tensor, weights: Tensor) -> Counts:
        """Return the number of samples, weighted."""
        return {self.task: weights.sum()}

    def recompute_units(self) -> list[nn.Module]:
        """Return the units of activation checkpointing: none."""
        return []
