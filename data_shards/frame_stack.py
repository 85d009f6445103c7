"""Frames of a clip, collected as they are decoded in one array that is allocated at the first frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.geometry import resized

MAX_CLIP_PIXELS = 1 << 28
"""Of all frames of a clip together, as they are kept: 32 of 4K, 129 of 1080p. Each takes three bytes."""

Size = tuple[int, int]
Target = Callable[[Size], Size]
"""From the (height, width) of decoded frames to that of those that are kept."""


class FrameStack:
    """Takes frames by their numbers and keeps each at its places in the clip.

    ``size``: (height, width) of the frames as decoded; ``None`` before the first. ``wanted``: the numbers that the clip
    needs, ascending. ``found``: those that came.

    Args:
        indices: the numbers of the clip's frames (repetitions allowed).
        where: names the video in errors.
        target: resize each frame, as a clip is resized: bit for bit what resizing them together gives.
    """

    def __init__(self, indices: Sequence[int], where: str, target: Target | None = None) -> None:
        self.size: Size | None = None
        self.found: set[int] = set()
        self._where, self._target = where, target
        self._places: dict[int, list[int]] = {}
        for place, number in enumerate(indices):
            self._places.setdefault(number, []).append(place)
        self._count = len(indices)
        self.wanted = sorted(self._places)
        self._frames = torch.empty(0, dtype=torch.uint8)

    def clear(self) -> None:
        """Forget all frames, to begin again."""
        self.size, self.found = None, set()

    def put(self, number: int, frame: Tensor) -> None:
        """Keep a frame (3, H, W) uint8 RGB of a wanted number.

        Raises:
            DataError: frames of several sizes, or a clip of more than ``MAX_CLIP_PIXELS``.
        """
        size = int(frame.shape[1]), int(frame.shape[2])
        if self.size is None:
            self._begin(size)
        elif size != self.size:
            raise changing_sizes({self.size, size}, self._where)
        kept = resized(frame[None], (int(self._frames.shape[2]), int(self._frames.shape[3])))[0]
        for place in self._places[number]:
            self._frames[place] = kept
        self.found.add(number)

    def _begin(self, size: Size) -> None:
        height, width = size if self._target is None else self._target(size)
        if self._count * height * width > MAX_CLIP_PIXELS:
            raise DataError(
                f"{self._where}: a clip of {self._count} frames of {width}x{height} pixels, more than "
                f"{MAX_CLIP_PIXELS} together; pack with --reencode and --short-side, or take fewer frames"
            )
        self.size = size
        self._frames = torch.empty((self._count, 3, height, width), dtype=torch.uint8)

    def frames(self) -> Tensor:
        """Return the clip (T, 3, h, w), uint8.

        Raises:
            DataError: a frame did not come.
        """
        if missing := [number for number in self.wanted if number not in self.found]:
            raise DataError(
                f"{self._where}: frame {missing[0]} cannot be decoded, {len(self.found)} of {len(self.wanted)} found; "
                "pack again"
            )
        return self._frames


def changing_sizes(sizes: set[Size], where: str) -> DataError:
    """Return the error of a video whose frames have several (height, width)."""
    found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
    return DataError(f"{where}: frames change their size ({found}); convert the video to one size")
