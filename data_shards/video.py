"""Videos by one small interface: their length, rate and size, and frames by number.

torchcodec does it where it is installed, else PyAV. Trusted to nothing that a header claims: frames are counted by
decoding them, and metadata in any encoding is passed over.
"""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vitgraft.configs.errors import ConfigError, DataError

MAX_FRAME_PIXELS = 80_000_000
"""Videos with larger frames are refused before they are decoded."""
MAX_FRAMES = 1_000_000

Decoder = Literal["pyav", "torchcodec"]


class Video(Protocol):
    """An open video. Every member may raise DataError: nothing is known before it is decoded."""

    @property
    def length(self) -> int:
        """How many frames can be decoded, at least 1."""

    @property
    def fps(self) -> float:
        """Mean frames per second; 0.0 where the container does not say."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) after the rotation tag."""

    def frames_at(self, indices: Sequence[int]) -> Tensor:
        """The frames with these ascending numbers (repetitions allowed): (T, 3, H, W) uint8 RGB, upright."""


def open_video(data: bytes | Path, where: str, decoder: Decoder | None = None) -> Video:
    """A video from its bytes or file.

    Args:
        where: names it in errors.
        decoder: ``None``: torchcodec where it is installed, and PyAV where it is not or cannot read this video.

    Raises:
        DataError: no such file.
        ConfigError: ``decoder`` is not installed.
    """
    if isinstance(data, Path) and not data.is_file():
        raise DataError(f"{where}: no such file; check the path")
    if decoder == "torchcodec" and _torchcodec() is None:
        raise ConfigError(
            "data.clip.decoder: torchcodec 0.11 or later cannot be imported; install it with FFmpeg's libraries, or "
            "set the key to pyav"
        )
    if decoder == "pyav" or _torchcodec() is None:
        return PyAVVideo(data, where)
    return TorchcodecVideo(data, where, fall_back=decoder is None)


class PyAVVideo:
    """By PyAV. Each question is answered by one pass from the start, as seeking is not exact in all containers."""

    def __init__(self, data: bytes | Path, where: str) -> None:
        self._data, self._where = data, where

    @functools.cached_property
    def _facts(self) -> tuple[int, float, tuple[int, int]]:
        with self._opened() as (container, stream):
            length, size = 0, (0, 0)
            for frame in container.decode(stream):
                if length == 0:
                    size = (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)
                length += 1
                if length > MAX_FRAMES:
                    raise DataError(f"{self._where}: more than {MAX_FRAMES} frames; cut the video")
            rate = stream.average_rate or stream.guessed_rate
        if not length:
            raise DataError(f"{self._where}: not one frame can be decoded; replace the video")
        return length, float(rate) if rate else 0.0, size

    @property
    def length(self) -> int:
        """See :class:`Video`."""
        return self._facts[0]

    @property
    def fps(self) -> float:
        """See :class:`Video`."""
        return self._facts[1]

    @property
    def size(self) -> tuple[int, int]:
        """See :class:`Video`."""
        return self._facts[2]

    def frames_at(self, indices: Sequence[int]) -> Tensor:
        """See :class:`Video`."""
        wanted = set(indices)
        found: dict[int, np.ndarray[Any, Any]] = {}
        with self._opened() as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))
                if len(found) == len(wanted):
                    break
        if missing := sorted(wanted - found.keys()):
            raise DataError(
                f"{self._where}: frame {missing[0]} cannot be decoded, {len(found)} of {len(wanted)} found; pack again"
            )
        shapes = {value.shape for value in found.values()}
        if len(shapes) > 1:
            raise DataError(
                f"{self._where}: frames change their size ({sorted(shapes)}); convert the video to one size"
            )
        stacked = np.stack([found[index] for index in indices])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Container and first video stream; whatever goes wrong inside the block becomes a DataError."""
        import av

        try:
            # Metadata in any encoding: titles are never read, so they must not stop the decoding.
            source = io.BytesIO(self._data) if isinstance(self._data, bytes) else str(self._data)
            with av.open(source, metadata_errors="ignore") as container:
                if not container.streams.video:
                    raise DataError(f"{self._where}: no video stream; expected a video")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1
                _check_size(stream.width, stream.height, self._where)
                yield container, stream
        except (av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
            raise _broken(self._where, error) from None


def _turns(frame: Any) -> int:
    """Quarter turns against the clock that bring a frame upright."""
    return round(int(getattr(frame, "rotation", 0)) / 90) % 4


class TorchcodecVideo:
    """By torchcodec, which seeks, so that few frames of a long video cost little; it turns frames upright itself.

    Args:
        fall_back: hand over to PyAV what torchcodec cannot read.
    """

    def __init__(self, data: bytes | Path, where: str, fall_back: bool = False) -> None:
        self._data, self._where = data, where
        self._other = PyAVVideo(data, where) if fall_back else None

    @functools.cached_property
    def _decoder(self) -> Any:
        decoders = _torchcodec()
        assert decoders is not None
        source = self._data if isinstance(self._data, bytes) else str(self._data)
        decoder = decoders.VideoDecoder(source, num_ffmpeg_threads=1, seek_mode="exact")
        _check_size(decoder.metadata.width or 0, decoder.metadata.height or 0, self._where)
        return decoder

    def _read(self, own: Any, other: Any) -> Any:
        try:
            return own(self._decoder)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            if self._other is None:
                raise _broken(self._where, error) from None
            return other(self._other)

    @functools.cached_property
    def length(self) -> int:
        """See :class:`Video`."""
        return int(self._read(_decodable, lambda other: other.length))

    @functools.cached_property
    def fps(self) -> float:
        """See :class:`Video`."""
        return float(self._read(lambda own: own.metadata.average_fps or 0.0, lambda other: other.fps))

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """See :class:`Video`."""
        height, width = self._read(lambda own: own.get_frame_at(0).data.shape[1:], lambda other: other.size)
        return int(height), int(width)

    def frames_at(self, indices: Sequence[int]) -> Tensor:
        """See :class:`Video`."""
        frames: Tensor = self._read(
            lambda own: own.get_frames_at(indices=list(indices)).data, lambda other: other.frames_at(indices)
        )
        return frames.contiguous()


def _decodable(decoder: Any) -> int:
    """The frames that are there: the container's packets less those at the end that hold none."""
    length = len(decoder)
    if length > MAX_FRAMES:
        raise ValueError(f"more than {MAX_FRAMES} frames")
    while length > 1:
        try:
            decoder.get_frame_at(length - 1)
            break
        except (RuntimeError, IndexError):
            length -= 1
    decoder.get_frame_at(0)
    return length


@functools.cache
def _torchcodec() -> Any:
    """torchcodec's decoders where they can be imported and turn frames upright (from 0.11), else ``None``."""
    try:
        decoders = importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):
        # Without FFmpeg's libraries it raises RuntimeError.
        return None
    fields = getattr(getattr(decoders, "VideoStreamMetadata", None), "__dataclass_fields__", {})
    return decoders if "rotation" in fields else None


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(f"{where}: frames of {width}x{height} pixels; shrink the video")


def _broken(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: broken video ({error}); expected one that FFmpeg decodes; replace it")
