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
"""What is said of one input: plain JSON values, in the coordinates of the input's own image."""


class Metric(Protocol):
    """Collects predictions on one rank; the ranks' states are merged on one."""

    def add(self, predictions: Predictions, batch: Batch) -> None:
        """Take in a batch; a sample of weight 0 is unreadable and counts as wrong."""

    def state(self) -> Any:
        """What another process needs to merge, of JSON's types."""

    def merge(self, states: list[Any]) -> None:
        """Replace the own state by the union of all ranks' states."""

    def compute(self) -> Figures:
        """The figures, by name."""

    def confusion(self) -> NDArray[np.int64] | None:
        """How often what was taken for what: rows truth, columns prediction (K, K or K + 1: the last for what could not
        be read); ``None`` where that is not counted."""


class Task(Protocol):
    """What the evaluator and ``predict`` need to know."""

    classes: list[str]
    primary: list[str]
    """The figures shown in tables, most important first."""
    protocol: dict[str, Any]
    """How the figures are computed: written beside them."""
    threshold: float | None
    """Detection: the score from which on detections are drawn. Classes: the score from which on they are listed.
    ``None``: there are no scores."""

    def metric(self) -> Metric:
        """An empty metric."""

    def result(self, predictions: Predictions, index: int, valid: tuple[int, int], size: tuple[int, int]) -> Result:
        """One sample's prediction in the coordinates of its own image.

        Args:
            predictions: of a batch. index: in the batch. valid: height and width of the image on the canvas.
            size: height and width of the image itself.
        """

    def draw(self, image: Tensor, result: Result) -> Tensor:
        """A prediction on its image or frames: uint8 (3, H, W) or (T, 3, H, W) in, uint8 (3, H', W') out."""

    def remark(self, result: Result) -> str | None:
        """What must be said of a picture on which nothing is drawn."""

    def draw_truth(self, image: Tensor, truth: Truth) -> Tensor:
        """The ground truth, drawn the same way."""
