"""Video classification: top-1 and top-5 accuracy, over one view of each video or several."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitgraft.data_shards.batch import Batch, Truth
from vitgraft.data_shards.draw import draw_clip
from vitgraft.models.contract import Predictions
from vitgraft.trainer.draw import repeat
from vitgraft.trainer.tasks.base import Metric, Result

MAX_CONFUSED = 400
"""Largest number of classes with a confusion matrix: larger ones are unreadable."""


class VideoTask:
    """One class for a clip."""

    primary = ["top1", "top5"]
    protocol = {"metric": "top-1 and top-5 accuracy, one clip and one view per video"}
    threshold: float | None = 0.0

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def metric(self) -> Metric:
        """Return an empty metric."""
        return AccuracyMetric(len(self.classes))

    def result(self, predictions: Predictions, index: int, valid: tuple[int, int], size: tuple[int, int]) -> Result:
        """Return the five most probable classes, as far as their score is ``threshold`` or more."""
        assert isinstance(predictions, Tensor)
        scores = predictions[index].detach().float().cpu().softmax(0)
        threshold = self.threshold or 0.0
        top = torch.topk(scores, min(5, len(self.classes)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {
            "height": size[0],
            "width": size[1],
            "classes": [{"class": c, "name": self.classes[c], "score": s} for c, s in pairs if s >= threshold],
        }

    def draw(self, image: Tensor, result: Result) -> Tensor:
        """Draw the three best classes below a strip of frames."""
        return _strip(image, self.caption(result))

    def caption(self, result: Result) -> str:
        """Return the three best classes in one line."""
        best = "   ".join(f"{c['name']} {c['score']:.2f}" for c in result["classes"][:3])
        return best or f"nothing of score {self.threshold or 0:g} or more"

    def remark(self, result: Result) -> None:
        """Return ``None``: the caption lists the classes."""

    def draw_truth(self, image: Tensor, truth: Truth) -> Tensor:
        """Draw the true class below a strip of frames."""
        return _strip(image, self.classes[truth.value])


def average_views(logits: Tensor, views: int) -> Tensor:
    """Return one prediction for each video: the mean of its views' probabilities.

    Args:
        logits: (B x views, K), all views of the first video, then all of the second, and so on.

    Returns:
        (B, K) float32: logarithms of the means, i.e. logits whose softmax they are.
    """
    probabilities = logits.float().softmax(1).reshape(-1, views, logits.shape[1]).mean(1)
    # A probability may underflow to 0; the smallest number keeps its logarithm finite.
    return torch.log(probabilities.clamp(min=torch.finfo(torch.float32).tiny))


def _strip(frames: Tensor, caption: str) -> Tensor:
    """Draw at most six evenly spaced frames (T, 3, H, W) side by side, doubled when they are small."""
    count = min(6, len(frames))
    picks = [round(i * (len(frames) - 1) / max(count - 1, 1)) for i in range(count)]
    return draw_clip(repeat(frames[picks], 2 if frames.shape[-1] < 128 else 1), caption)


class AccuracyMetric:
    """Counts [top-1, top-5, all], and the confusion matrix for at most ``MAX_CONFUSED`` classes."""

    def __init__(self, classes: int = 0) -> None:
        self._counts = [0, 0, 0]
        classes = classes if classes <= MAX_CONFUSED else 0
        self._matrix: NDArray[np.int64] = np.zeros((classes, classes + 1), np.int64)

    def add(self, predictions: Predictions, batch: Batch) -> None:
        """Add a batch; an unreadable clip is wrong."""
        assert isinstance(predictions, Tensor)
        for index, truth in enumerate(batch.truths):
            self._counts[2] += 1
            column = -1
            if batch.weights[index] != 0:
                top = predictions[index].topk(min(5, predictions.shape[1])).indices.tolist()
                self._counts[0] += top[0] == truth.value
                self._counts[1] += truth.value in top
                column = top[0]
            if len(self._matrix) and truth.value is not None:
                self._matrix[truth.value, column] += 1

    def state(self) -> list[int]:
        """Return the counts, and the matrix row by row."""
        return [*self._counts, *self._matrix.flatten().tolist()]

    def merge(self, states: list[list[int]]) -> None:
        """Sum of the counts."""
        counts = [sum(column) for column in zip(*states, strict=True)]
        self._counts, self._matrix = counts[:3], np.array(counts[3:], np.int64).reshape(self._matrix.shape)

    def compute(self) -> dict[str, float]:
        """Return top1 and top5 as fractions."""
        top1, top5, total = self._counts
        return {"top1": top1 / max(total, 1), "top5": top5 / max(total, 1)}

    def confusion(self) -> NDArray[np.int64] | None:
        """Return the confusion matrix of clips or images; the last column: unreadable ones."""
        return self._matrix if len(self._matrix) else None
