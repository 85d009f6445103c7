"""Clips that were packed as one image for each frame: any frame costs one image, wherever it is."""

from __future__ import annotations

from typing import Any

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import VIDEO_EXTENSIONS
from vitgraft.data_shards.frame_stack import FrameStack
from vitgraft.data_shards.images import decode_image, image_size
from vitgraft.data_shards.stream import RawSample


def frame_name(number: int) -> str:
    """Return the member that holds a frame."""
    return f"{number:06d}.jpg"


class ImageFrames:
    """A :class:`~vitgraft.data_shards.video.Video` of the members that :func:`frame_name` names."""

    def __init__(self, members: dict[str, bytes], fps: Any, where: str) -> None:
        self._members, self._where = members, where
        self.fps = float(fps) if isinstance(fps, int | float) and 0 < fps < 1e9 else 0.0

    @property
    def length(self) -> int:
        """Number of frames before the first that is missing."""
        number = 0
        while frame_name(number) in self._members:
            number += 1
        return number

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first frame."""
        return image_size(self._frame(0), f"{self._where}: frame 0")

    def fill(self, stack: FrameStack) -> None:
        """See :class:`~vitgraft.data_shards.video.Video`."""
        for number in stack.wanted:
            stack.put(number, decode_image(self._frame(number), f"{self._where}: frame {number}"))

    def _frame(self, number: int) -> bytes:
        if frame_name(number) not in self._members:
            raise DataError(f"{self._where}: frame {number} is missing; pack again")
        return self._members[frame_name(number)]


def clip_of(raw: RawSample, metadata: dict[str, Any]) -> bytes | ImageFrames:
    """Return a packed sample's clip: a video file's bytes, or images.

    Raises:
        DataError: it has neither.
    """
    if frame_name(0) in raw.members:
        return ImageFrames(raw.members, metadata.get("fps"), raw.where)
    return raw.first(VIDEO_EXTENSIONS)
