"""Common interface of video decoders: length, rate and size, and frames by number.

torchcodec does it where it is installed, else PyAV. Trusted to nothing that a header claims: frames are counted by
decoding them, and metadata in any encoding is passed over.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.frame_stack import FrameStack, changing_sizes
from vitgraft.data_shards.seeking import SEEK_GAIN, stretches_of, times_of

MAX_FRAME_PIXELS = 40_000_000
"""Videos are refused by their header, before they are decoded, or at the first frame that is larger."""
MAX_FRAMES = 1_000_000
_PART_PIXELS = 1 << 26
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,asf,flv,ogg,gif"
"""FFmpeg's own names. Playlists and scripts are not among them: they would have it read other files, or a network."""
_HEAD = 64 << 10

Decoder = Literal["pyav", "torchcodec"]
Pixels = npt.NDArray[np.uint8]


class Video(Protocol):
    """An open video. Every member may raise DataError: nothing is known before it is decoded."""

    @property
    def length(self) -> int:
        """Number of frames that can be decoded, at least 1."""

    @property
    def fps(self) -> float:
        """Mean frames per second; 0.0 where the container does not say."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) after the rotation tag."""

    def fill(self, stack: FrameStack) -> None:
        """Decode the wanted frames into the stack, RGB and upright."""


def open_video(
    data: bytes | Path | Video, where: str, decoder: Decoder | None = None, length: int | None = None
) -> Video:
    """Open a video from its bytes or file; an open one is returned unchanged.

    Args:
        length: how many frames can be decoded, where that is known: PyAV can seek then.
        where: names it in errors.
        decoder: ``None``: torchcodec where it is installed, and PyAV where it is not or cannot read this video.

    Raises:
        DataError: no such file.
        ConfigError: ``decoder`` is not installed.
    """
    if not isinstance(data, bytes | Path):
        return data
    if isinstance(data, Path) and not data.is_file():
        raise DataError(f"{where}: no such file; check the path")
    if decoder == "torchcodec" and _torchcodec() is None:
        raise ConfigError(
            "data.clip.decoder: torchcodec 0.11 or later cannot be imported; install it with FFmpeg's libraries, or "
            "set the key to pyav"
        )
    if decoder == "pyav" or _torchcodec() is None:
        return PyAVVideo(data, where, length)
    if _is_text(data):
        # torchcodec takes no list of containers.
        raise DataError(f"{where}: a text and no video; playlists and scripts are not followed; replace it")
    return TorchcodecVideo(data, where, fall_back=decoder is None)


def _is_text(data: bytes | Path) -> bool:
    """Tell whether nothing near the start is a zero byte, as no container lacks one."""
    if isinstance(data, bytes):
        return b"\0" not in data[:_HEAD]
    with data.open("rb") as stream:
        return b"\0" not in stream.read(_HEAD)


class PyAVVideo:
    """By PyAV. Each question is answered by one pass from the start, or by seeking where that is sure to be exact.

    Args:
        length: how many frames can be decoded, where that is known; seeking needs it.
    """

    def __init__(self, data: bytes | Path, where: str, length: int | None = None) -> None:
        self._data, self._where, self._length = data, where, length

    @functools.cached_property
    def _facts(self) -> tuple[int, float, tuple[int, int]]:
        with self._opened() as (container, stream):
            length, sizes = 0, set[tuple[int, int]]()
            for frame in self._decoded(container, stream):
                sizes.add((frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width))
                if len(sizes) > 1:
                    raise changing_sizes(sizes, self._where)
                length += 1
            rate = stream.average_rate or stream.guessed_rate
        if not length:
            raise DataError(f"{self._where}: not one frame can be decoded; replace the video")
        return length, float(rate) if rate else 0.0, next(iter(sizes))

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

    def fill(self, stack: FrameStack) -> None:
        """See :class:`Video`."""
        if not self._seek(stack):
            stack.clear()
            self._from_start(stack)

    def rate(self) -> Fraction:
        """Return the frames per second stated by the container, 0 where absent."""
        with self._opened() as (_, stream):
            return Fraction(stream.average_rate or stream.guessed_rate or 0)

    def frames(self) -> Iterator[Pixels]:
        """Yield all frames (H, W, 3), uint8 RGB, upright."""
        with self._opened() as (container, stream):
            for frame in self._decoded(container, stream):
                yield _upright(frame)

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the frames from the container's position, within the limits of number and size."""
        for number, frame in enumerate(container.decode(stream)):
            if number >= MAX_FRAMES:
                raise DataError(f"{self._where}: more than {MAX_FRAMES} frames; cut the video")
            # Of many codecs each frame has a size of its own, whatever the header says.
            _check_size(frame.width, frame.height, self._where)
            yield frame

    def _from_start(self, stack: FrameStack) -> None:
        wanted = set(stack.wanted)
        with self._opened() as (container, stream):
            for number, frame in enumerate(self._decoded(container, stream)):
                if number in wanted:
                    stack.put(number, _tensor(frame))
                if len(stack.found) == len(wanted):
                    break

    def _seek(self, stack: FrameStack) -> bool:
        """Decode each stretch of the wanted frames from the key frame before it; tell whether all were found.

        Return False where seeking saves nothing or could give other frames than decoding from the start: timestamps
        that are missing or inconsistent, or a container that seeks to another position.
        """
        wanted = stack.wanted
        if self._length is None or not wanted or not SEEK_GAIN < wanted[-1] < self._length:
            return False
        try:
            with self._opened() as (container, stream):
                times = times_of(container, stream, self._length)
                stretches = [] if times is None else stretches_of(wanted, times.keys)
                if times is None or (len(stretches) == 1 and stretches[0][0] == 0):
                    return False
                for key, numbers in stretches:
                    container.seek(times.shown[key], stream=stream)
                    _stretch(self._decoded(container, stream), times.shown, numbers, stack)
        except DataError:
            return False
        return len(stack.found) == len(wanted)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the container and its first video stream; errors inside the block become a DataError."""
        import av

        try:
            # Metadata in any encoding: titles are never read, so they must not stop the decoding.
            source = io.BytesIO(self._data) if isinstance(self._data, bytes) else str(self._data)
            allowed = {"format_whitelist": _CONTAINERS}
            with av.open(source, metadata_errors="ignore", container_options=allowed) as container:
                if not container.streams.video:
                    raise DataError(f"{self._where}: no video stream; expected a video")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise DataError(f"{self._where}: a video of a codec that FFmpeg does not know; convert it")
                stream.codec_context.thread_count = 1
                _check_size(stream.width, stream.height, self._where)
                yield container, stream
        except (av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
            raise _broken(self._where, error) from None


def _turns(frame: Any) -> int:
    """Return the counterclockwise quarter turns that make a frame upright."""
    return round(int(getattr(frame, "rotation", 0)) / 90) % 4


def _upright(frame: Any) -> Pixels:
    return np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))


def _tensor(frame: Any) -> Tensor:
    """Return a frame as (3, H, W) uint8, upright, with the channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(_upright(frame))).permute(2, 0, 1)


def _stretch(frames: Iterable[Any], shown: Sequence[int], numbers: Sequence[int], stack: FrameStack) -> None:
    """Add the frames of these ascending numbers to the stack; stop at a frame out of order by its timestamp.

    Args:
        frames: decoded after a seek, which may have gone further back than asked for.
        shown: see :class:`~vitgraft.data_shards.seeking.Times`.
    """
    following: int | None = None
    for frame in frames:
        if following is None and frame.pts is not None:
            following = bisect.bisect_left(shown, frame.pts)
        if following is None or following > numbers[-1] or frame.pts != shown[following]:
            break
        if following in numbers:
            stack.put(following, _tensor(frame))
        if following == numbers[-1]:
            break
        following += 1


class TorchcodecVideo:
    """By torchcodec, which seeks, so that few frames of a long video cost little; it turns frames upright itself.

    What it would number wrongly is handed over to PyAV.

    Args:
        fall_back: hand over too what torchcodec cannot read.
    """

    def __init__(self, data: bytes | Path, where: str, fall_back: bool = False) -> None:
        self._data, self._where, self._fall_back = data, where, fall_back
        self._other = PyAVVideo(data, where)

    @functools.cached_property
    def _decoder(self) -> Any:
        decoders = _torchcodec()
        assert decoders is not None
        source = self._data if isinstance(self._data, bytes) else str(self._data)
        decoder = decoders.VideoDecoder(source, num_ffmpeg_threads=1, seek_mode="exact")
        _check_size(decoder.metadata.width or 0, decoder.metadata.height or 0, self._where)
        return decoder

    @functools.cached_property
    def _numbered(self) -> bool:
        """Tell whether frame numbers agree with timestamps, by which torchcodec finds frames.

        In AVI files with B-frames the first frame comes one or two after the first packet, as do all others.
        """
        first, begin = self._decoder.get_frame_at(0).pts_seconds, self._decoder.metadata.begin_stream_seconds
        return math.isclose(first, begin, abs_tol=1e-4)

    def _read(self, own: Any, other: Any) -> Any:
        try:
            if self._numbered:
                return own(self._decoder)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            if not self._fall_back:
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

    def fill(self, stack: FrameStack) -> None:
        """See :class:`Video`."""

        def own(decoder: Any) -> None:
            # A part at a time: all frames at once may be more than is kept of them.
            width, height = decoder.metadata.width or 0, decoder.metadata.height or 0
            part = max(1, _PART_PIXELS // max(1, width * height))
            for first in range(0, len(stack.wanted), part):
                numbers = stack.wanted[first : first + part]
                for number, frame in zip(numbers, decoder.get_frames_at(indices=numbers).data, strict=True):
                    stack.put(number, frame)

        def other(video: PyAVVideo) -> None:
            stack.clear()
            video.fill(stack)

        self._read(own, other)


def _decodable(decoder: Any) -> int:
    """Return the number of decodable frames: the container's packets less empty ones at the end."""
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
    """Return torchcodec's decoders where they can be imported and turn frames upright (from 0.11), else ``None``."""
    try:
        decoders = importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):
        # Without FFmpeg's libraries it raises RuntimeError.
        return None
    fields = getattr(getattr(decoders, "VideoStreamMetadata", None), "__dataclass_fields__", {})
    return decoders if "rotation" in fields else None


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(f"{where}: frames of {width}x{height}, more than {MAX_FRAME_PIXELS} pixels; shrink the video")


def _broken(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: broken video ({error}); expected one that FFmpeg decodes; replace it")
