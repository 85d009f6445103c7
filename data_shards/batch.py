"""A batch on its way from the loader to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOT_FINITE = "the loss was not finite"
"""Reason of an entry left out whose sample is valid."""


class Entry(NamedTuple):
    """One place in an epoch: which sample, and the how-manieth visit of it in this epoch."""

    epoch: int
    position: int
    sample: int
    repetition: int


class Skipped(NamedTuple):
    """An entry that was left out because its sample cannot be read, or was not read (``NOT_FINITE``). ``key``: the
    sample's; ``reason``: one line."""

    entry: Entry
    key: str
    reason: str


@dataclass
class Truth:
    """Ground truth of one sample in the coordinates of its own image, for evaluation and pictures.

    ``key``: the sample's key in its shard. ``size``: (height, width) of the image as packed. ``value``: detection: the
    list of annotations as packed; semantic: the label map, uint8 (height, width); video: the class id.
    """

    key: str
    size: tuple[int, int]
    value: Any


@dataclass
class Batch:
    """One rank's share of a micro-step.

    ``images``: (B, 3, H, W) or clips (B, 3, T, H, W), float32, normalised, zero beyond the valid part. ``sizes``: (B,
    2) int64, valid height and width of each. ``weights``: (B,) float32; 0 for a filler and for the ``skipped`` entries.
    ``targets``: detection: a list of {boxes (N, 4) float32 xyxy, labels (N,) int64, masks (N, H, W) uint8}; semantic:
    (B, H, W) int64 with 255 ignored; video and image: (B,) int64, or with mixup or cutmix (B, K) float32. ``truths``:
    in evaluation only. Evaluation by V views: ``images`` and ``sizes`` have B x V rows, all views of the first video,
    then all of the second, and so on.
    """

    images: Tensor
    sizes: Tensor
    weights: Tensor
    targets: Any
    entries: list[Entry] = field(default_factory=list)
    truths: list[Truth] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def map(self, function: Any) -> Batch:
        """The batch with ``function`` of each of its tensors."""

        def mapped(targets: Any) -> Any:
            if isinstance(targets, list):
                return [mapped(target) for target in targets]
            if isinstance(targets, dict):
                return {key: function(value) for key, value in targets.items()}
            return None if targets is None else function(targets)

        return Batch(
            function(self.images),
            function(self.sizes),
            function(self.weights),
            mapped(self.targets),
            self.entries,
            self.truths,
            self.skipped,
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; copies from pinned memory do not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU do not block."""
        return self.map(lambda tensor: tensor.pin_memory())
