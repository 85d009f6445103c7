"""Video classification: top-1 and top-5 accuracy, over one view of each video or several."""

from __future__ import annotations

import torch
from torch import Tensor

from vitgraft.data_shards.batch import Batch, Truth
from vitgraft.data_shards.draw import draw_clip
from vitgraft.models.contract import Predictions
from vitgraft.trainer.draw import repeat
from vitgraft.trainer.tasks.base import Metric, Result


class VideoTask:
    """One class for a clip."""

    primary = ["top1", "top5"]
    protocol = {"metric": "top-1 and top-5 accuracy, one clip and one view per video"}

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def metric(self) -> Metric:
        """An empty metric."""
        return AccuracyMetric()

    def result(self, predictions: Predictions, index: int, valid: tuple[int, int], size: tuple[int, int]) -> Result:
        """The five most probable classes."""
        assert isinstance(predictions, Tensor)
        scores = predictions[index].detach().float().cpu().softmax(0)
        top = torch.topk(scores, min(5, len(self.classes)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {
            "height": size[0],
            "width": size[1],
            "classes": [{"class": c, "name": self.classes[c], "score": s} for c, s in pairs],
        }

    def draw(self, image: Tensor, result: Result) -> Tensor:
        """A strip of frames under the three best classes."""
        best = result["classes"][:3]
        return _strip(image, "   ".join(f"{c['name']} {c['score']:.2f}" for c in best))

    def draw_truth(self, image: Tensor, truth: Truth) -> Tensor:
        """A strip of frames under the true class."""
        return _strip(image, self.classes[truth.value])


def average_views(logits: Tensor, views: int) -> Tensor:
    """One prediction for each video: the mean of its views' probabilities.

    Args:
        logits: (B x views, K), all views of the first video, then all of the second, and so on.

    Returns:
        (B, K) float32: logarithms of the means, i.e. logits whose softmax they are.
    """
    probabilities = logits.float().softmax(1).reshape(-1, views, logits.shape[1]).mean(1)
    # A probability may underflow to 0; the smallest number keeps its logarithm finite.
    return torch.log(probabilities.clamp(min=torch.finfo(torch.float32).tiny))


def _strip(frames: Tensor, caption: str) -> Tensor:
    """At most six evenly spaced frames (T, 3, H, W) side by side, doubled when they are small."""
    count = min(6, len(frames))
    picks = [round(i * (len(frames) - 1) / max(count - 1, 1)) for i in range(count)]
    return draw_clip(repeat(frames[picks], 2 if frames.shape[-1] < 128 else 1), caption)


class AccuracyMetric:
    """Counts [top-1, top-5, all]."""

    def __init__(self) -> None:
        self._counts = [0, 0, 0]

    def add(self, predictions: Predictions, batch: Batch) -> None:
        """Take in a batch; an unreadable clip is wrong."""
        assert isinstance(predictions, Tensor)
        for index, truth in enumerate(batch.truths):
            self._counts[2] += 1
            if batch.weights[index] != 0:
                top = predictions[index].topk(min(5, predictions.shape[1])).indices.tolist()
                self._counts[0] += top[0] == truth.value
                self._counts[1] += truth.value in top

    def state(self) -> list[int]:
        """The counts."""
        return self._counts

    def merge(self, states: list[list[int]]) -> None:
        """Sum of the counts."""
        self._counts = [sum(column) for column in zip(*states, strict=True)]

    def compute(self) -> dict[str, float]:
        """top1 and top5 as shares."""
        top1, top5, total = self._counts
        return {"top1": top1 / max(total, 1), "top5": top5 / max(total, 1)}
