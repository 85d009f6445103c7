"""Re-encoding of clips for fast random access: H.264 with frequent key frames, or an image for each frame."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.decode import probe_video
from vitgraft.data_shards.frames import frame_name
from vitgraft.data_shards.stream import MAX_SAMPLE_BYTES
from vitgraft.data_shards.video import Pixels, PyAVVideo

Form = Literal["gop", "frames"]

DEFAULT_QUALITY: dict[Form, int] = {"gop": 18, "frames": 90}
QUALITIES: dict[Form, tuple[int, int]] = {"gop": (0, 51), "frames": (1, 95)}
DEFAULT_GOP = 8
DEFAULT_RATE = Fraction(25)
"""Default where the container states none."""


@dataclass(frozen=True)
class Reencode:
    """Settings for re-encoding clips.

    ``form``: ``gop``: H.264 in mp4 with a key frame every ``gop`` frames and no frame that needs a later one;
    ``frames``: a JPEG for each frame. ``short_side``: larger clips are scaled down to it. ``quality``: x264's constant
    rate factor (0 is lossless, 51 worst), or JPEG's quality (1 to 95).

    Raises:
        ConfigError: a value out of range, ``gop`` with frames, or H.264 without x264 in PyAV.
    """

    form: Form
    gop: int | None = None
    short_side: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        import av

        low, high = QUALITIES[self.form]
        if self.quality is not None and not low <= self.quality <= high:
            raise ConfigError(f"--quality {self.quality}: expected {low} to {high} with --reencode {self.form}")
        if self.gop is not None and (self.form != "gop" or not 1 <= self.gop <= 1000):
            raise ConfigError(f"--gop {self.gop}: expected 1 to 1000, and only with --reencode gop")
        if self.short_side is not None and self.short_side < 16:
            raise ConfigError(f"--short-side {self.short_side}: expected at least 16 pixels")
        if self.form == "gop" and "libx264" not in av.codecs_available:
            raise ConfigError("--reencode gop: PyAV was built without libx264; pass --reencode frames")

    def as_source(self) -> dict[str, Any]:
        """Return the settings for the manifest."""
        return {**asdict(self), "gop": self._gop if self.form == "gop" else None, "quality": self._quality}

    @property
    def _gop(self) -> int:
        return self.gop or DEFAULT_GOP

    @property
    def _quality(self) -> int:
        return DEFAULT_QUALITY[self.form] if self.quality is None else self.quality

    def encode(self, data: bytes, where: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Re-encode a clip, frame by frame, upright; return its members and facts (frames, fps, height, width).

        Raises:
            DataError: it cannot be decoded or encoded, or its frames differ in size.
        """
        import av

        try:
            return self._encode(data, where)
        except (av.FFmpegError, OSError) as error:
            # All of it is in memory: what fails is the clip.
            reason = error.strerror or error
            raise DataError(f"{where}: cannot be encoded anew: {reason}; change --reencode or leave it out") from None

    def _encode(self, data: bytes, where: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        video = PyAVVideo(data, where)
        rate = video.rate()
        frames = _scaled(video.frames(), self.short_side, self.form == "gop", where)
        if self.form == "gop":
            counter = itertools.count()
            counted = (frame for frame, _ in zip(frames, counter, strict=False))
            encoded = encode_mp4(counted, _usual(rate), crf=self._quality, gop=self._gop)
            facts = probe_video(encoded, where)
            if facts["frames"] != (count := next(counter)):
                raise DataError(
                    f"{where}: {facts['frames']} of {count} frames came back from x264; pass --reencode frames"
                )
            return {"mp4": encoded}, {**facts, "fps": float(rate)}
        members, size, total = dict[str, bytes](), (0, 0), 0
        for number, frame in enumerate(frames):
            stream, size = io.BytesIO(), (frame.shape[0], frame.shape[1])
            Image.fromarray(frame).save(stream, "JPEG", quality=self._quality)
            members[frame_name(number)] = stream.getvalue()
            total += len(members[frame_name(number)])
            if total > MAX_SAMPLE_BYTES:
                raise DataError(
                    f"{where}: its frames take more than {MAX_SAMPLE_BYTES} bytes as images; pass --short-side, or cut "
                    "the video"
                )
        return members, {"frames": len(members), "fps": float(rate), "height": size[0], "width": size[1]}


def encode_mp4(frames: Iterable[Pixels], rate: Fraction | int, *, crf: int, gop: int | None = None) -> bytes:
    """Encode frames (H, W, 3) uint8 of one even size as mp4, by x264; the same frames always give the same bytes.

    Args:
        gop: a key frame every so many frames, and none that needs a later one; ``None``: x264's own choice.
    """
    import av

    # With its look-ahead in a thread of its own x264 does not always give the same bytes.
    params = "threads=1:lookahead-threads=1:sliced-threads=0:rc-lookahead=0:mbtree=0"
    if gop is not None:
        params += f":keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:open-gop=0"
    codec, options = "libx264", {"crf": str(crf), "preset": "veryfast", "x264-params": params}
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qscale": "2"}
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=options))
        for number, frame in enumerate(frames):
            if number == 0:
                video.height, video.width = frame.shape[0], frame.shape[1]
                video.pix_fmt = "yuv420p"
                video.codec_context.thread_count = 1
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def _usual(rate: Fraction) -> Fraction:
    """Return the rate limited to those valid in mp4, as containers state arbitrary ones."""
    return rate.limit_denominator(1001) if 1 <= rate <= 1000 else DEFAULT_RATE


def _scaled(frames: Iterable[Pixels], short_side: int | None, even: bool, where: str) -> Iterator[Pixels]:
    """Yield the frames, all of one size, at most ``short_side``."""
    first: tuple[int, ...] | None = None
    for frame in frames:
        if first is None:
            first = frame.shape
        if frame.shape != first:
            raise DataError(
                f"{where}: frames change their size ({first}, {frame.shape}); convert the video to one size"
            )
        height, width = frame.shape[:2]
        factor = 1.0 if short_side is None else min(1.0, short_side / min(height, width))
        # H.264's usual colour format needs even sides.
        sides = (round(width * factor), round(height * factor))
        target = tuple(max(2, side - side % 2) for side in sides) if even else sides
        if target != (width, height):
            frame = np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(target, Image.Resampling.BICUBIC))
        yield frame
    if first is None:
        raise DataError(f"{where}: not one frame can be decoded; replace the video")
