"""Interface of trainer and models: losses as sums over normalisers, predictions by task."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from torch import Tensor


class LossTerm(NamedTuple):
    """One loss as a sum and its normaliser, so that ranks can be added before dividing: never a mean of means.

    ``total``: scalar float32 with gradient, the weighted sum over this rank's elements. ``count``: scalar float32
    without gradient, the sum of the weights of the same elements. The loss of a micro-step is
    ``sum over ranks of total / max(sum over ranks of count, 1)``.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is never called on a loss


Losses = dict[str, LossTerm]

Counts = dict[str, Tensor]
"""Of the losses whose ``count`` follows from targets and weights alone, that count, known before the forward pass. A
step of several micro-steps divides such a loss by its count over the whole step, as a single micro-step would; every
other loss by the count of each micro-step."""


class DetectionTarget(TypedDict):
    """One image: ``boxes`` (N, 4) float32 xyxy in canvas pixels; ``labels`` (N,) int64 in 0..K-1;
    ``masks`` (N, H, W) uint8 on the canvas."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


class DetectionPrediction(TypedDict):
    """One image, by falling score: ``boxes`` (N, 4) float32 xyxy in canvas pixels; ``labels`` (N,) int64 in 0..K-1;
    ``scores`` (N,) float32; ``masks`` (N, M, M) float32 probabilities inside each box (absent without a mask head)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


Targets = list[DetectionTarget] | Tensor
"""detection: one target per image; semantic: (B, H, W) int64, 255 ignored; video and image: (B,) int64 class ids."""

Predictions = list[DetectionPrediction] | Tensor
"""detection: one per image; semantic: logits (B, K, H, W) float32; video and image: logits (B, K) float32."""
