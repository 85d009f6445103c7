"""The interface of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitgraft.data_shards.batch import Batch, Truth
from vitgraft.models.contract import Predictions

Figures = Mapping[str, float | None]
"""``None``: there is no ground truth for a figure, e.g. no small object for the AP of small ones."""
Result = dict[str, Any]
"""Prediction of one input: plain JSON values, in the coordinates of the original image."""


class Metric(Protocol):
    """Collects predictions on one rank; the ranks' states are merged on one."""

    def add(self, predictions: Predictions, batch: Batch) -> None:
        """Add a batch; a sample of weight 0 is unreadable and counts as wrong."""

    def state(self) -> Any:
        """Return the state for merging in another process, of JSON's types."""

    def merge(self, states: list[Any]) -> None:
        """Replace the own state by the union of all ranks' states."""

    def compute(self) -> Figures:
        """Return the figures, by name."""

    def confusion(self) -> NDArray[np.int64] | None:
        """Return the confusion matrix: rows truth, columns prediction (K, K or K + 1: the last for samples that could
        not be read); ``None``: not counted."""


class Task(Protocol):
    """Interface of a task to the evaluator and ``predict``."""

    classes: list[str]
    primary: list[str]
    """Metrics shown in tables, most important first."""
    protocol: dict[str, Any]
    """Protocol of the metrics, written beside them."""
    threshold: float | None
    """Detection: the score from which on detections are drawn. Classes: the score from which on they are listed.
    ``None``: there are no scores."""

    def metric(self) -> Metric:
        """Return an empty metric."""

    def result(self, predictions: Predictions, index: int, valid: tuple[int, int], size: tuple[int, int]) -> Result:
        """Return one sample's prediction in the coordinates of its own image.

        Args:
            predictions: of a batch. index: in the batch. valid: height and width of the image on the canvas.
            size: height and width of the image itself.
        """

    def draw(self, image: Tensor, result: Result) -> Tensor:
        """Draw a prediction on its image or frames: uint8 (3, H, W) or (T, 3, H, W) in, uint8 (3, H', W') out."""

    def remark(self, result: Result) -> str | None:
        """Return the note on a picture without any drawn prediction; ``None``: there are predictions."""

    def draw_truth(self, image: Tensor, truth: Truth) -> Tensor:
        """Draw the ground truth in the same way."""
