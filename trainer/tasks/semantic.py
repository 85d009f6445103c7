"""Semantic segmentation: mean intersection over union at the images' own resolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from vitgraft.data_shards.batch import Batch, Truth
from vitgraft.data_shards.draw import draw_label_map
from vitgraft.models.contract import Predictions
from vitgraft.trainer.draw import enlarge, repeat
from vitgraft.trainer.tasks.base import Figures, Metric, Result

IGNORE = 255


class SemanticTask:
    """A class for every pixel."""

    primary = ["mIoU", "mAcc", "aAcc"]
    protocol = {"metric": "mIoU over the classes that occur in truth or prediction, 255 ignored, single scale, no flip"}
    threshold: float | None = None

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def metric(self) -> Metric:
        """Return an empty metric."""
        return ConfusionMetric(self)

    def label_map(self, predictions: Predictions, index: int, valid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return the label map (H, W) int64 at the original resolution: logits are resized before the argmax, as
        usual."""
        assert isinstance(predictions, Tensor)
        logits = predictions[index, :, : valid[0], : valid[1]].detach().float().cpu()
        return interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)

    def result(self, predictions: Predictions, index: int, valid: tuple[int, int], size: tuple[int, int]) -> Result:
        """Return the label map and the share of each class."""
        labels = self.label_map(predictions, index, valid, size)
        counts = torch.bincount(labels.flatten(), minlength=len(self.classes)).tolist()
        shares = {name: count / labels.numel() for name, count in zip(self.classes, counts, strict=True) if count}
        return {"height": size[0], "width": size[1], "shares": shares, "labels": labels.to(torch.uint8)}

    def draw(self, image: Tensor, result: Result) -> Tensor:
        """Draw the label map over the image."""
        return self._draw(image, result["labels"])

    def remark(self, result: Result) -> None:
        """Return ``None``: every prediction is drawn."""

    def draw_truth(self, image: Tensor, truth: Truth) -> Tensor:
        """Draw the true label map over the image."""
        return self._draw(image, torch.as_tensor(truth.value))

    def _draw(self, image: Tensor, labels: Tensor) -> Tensor:
        big, factor = enlarge(image)
        return draw_label_map(big, repeat(labels, factor), self.classes)


class ConfusionMetric:
    """A confusion matrix (rows truth, columns prediction); the last column counts pixels of unreadable images."""

    def __init__(self, task: SemanticTask) -> None:
        self._task = task
        classes = len(task.classes)
        self.matrix: NDArray[np.int64] = np.zeros((classes, classes + 1), np.int64)

    def add(self, predictions: Predictions, batch: Batch) -> None:
        """Add a batch; all pixels of an unreadable image are wrong."""
        for index, truth in enumerate(batch.truths):
            if truth.value is None:  # the label cannot be read either: no pixel to count
                continue
            target = np.asarray(truth.value)
            if batch.weights[index] == 0:
                predicted = np.full(target.shape, len(self._task.classes))
            else:
                height, width = (int(v) for v in batch.sizes[index])
                predicted = self._task.label_map(predictions, index, (height, width), truth.size).numpy()
            self.count(target, predicted)

    def count(self, target: NDArray[Any], predicted: NDArray[Any]) -> None:
        """Add one image's pixels, both (H, W)."""
        keep = target != IGNORE
        classes = len(self._task.classes)
        flat = target[keep].astype(np.int64) * (classes + 1) + predicted[keep]
        self.matrix += np.bincount(flat, minlength=classes * (classes + 1)).reshape(classes, classes + 1)

    def state(self) -> list[list[int]]:
        """Return the matrix."""
        rows: list[list[int]] = self.matrix.tolist()
        return rows

    def merge(self, states: list[list[list[int]]]) -> None:
        """Sum of the matrices."""
        self.matrix = np.sum(np.array(states, np.int64), axis=0)

    def confusion(self) -> NDArray[np.int64]:
        """Return the confusion matrix of pixels."""
        return self.matrix

    def compute(self) -> Figures:
        """Return mIoU, mAcc (mean recall), aAcc, and IoU_CLASS; ``None`` for a class in neither truth nor
        prediction."""
        classes = len(self._task.classes)
        hits = np.diag(self.matrix[:, :classes]).astype(float)
        truth, predicted = self.matrix.sum(1), self.matrix[:, :classes].sum(0)
        union = truth + predicted - hits
        occurs, in_truth = union > 0, truth > 0
        iou = hits / np.maximum(union, 1)
        figures: dict[str, float | None] = {
            "mIoU": float(iou[occurs].mean()) if occurs.any() else None,
            "mAcc": float((hits[in_truth] / truth[in_truth]).mean()) if in_truth.any() else None,
            "aAcc": float(hits.sum() / truth.sum()) if in_truth.any() else None,
        }
        for number, name in enumerate(self._task.classes):
            figures[f"IoU_{name}"] = float(iou[number]) if occurs[number] else None
        return figures
