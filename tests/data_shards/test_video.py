"""Seeking gives the frames that decoding from the start gives, bit by bit, or is not done."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitgraft.configs.errors import DataError
from vitgraft.data_shards import video
from vitgraft.data_shards.decode import decode_frames, probe_video
from vitgraft.data_shards.frame_stack import FrameStack
from vitgraft.data_shards.seeking import stretches_of
from vitgraft.data_shards.video import PyAVVideo

SOUND = {
    "torchvision/SOX5yA1l24A.mp4",
    "torchvision/R6llTwEh07w.mp4",
    "mmaction2/demo.mp4",
    "decord/flipping_a_pancake.mkv",
    "torchvision/v_SoccerJuggling_g23_c01.avi",
}
"""Clips of more than one key frame whose times can be trusted."""


def synthetic(frames: int = 97, form: str = "mp4", codec: str = "libx264", **options: str) -> bytes:
    """Moving noise, with B-frames unless told otherwise."""
    random = np.random.RandomState(0)
    base = random.randint(0, 255, (64, 96 + frames, 3)).astype(np.uint8)
    stream = io.BytesIO()
    if codec == "libx264":
        options = {"bf": "3", "g": "12", "x264-params": "threads=1:b-adapt=0"} | options
    with av.open(stream, "w", format=form) as container:
        track: Any = container.add_stream(codec, rate=30, options=options)
        track.height, track.width, track.pix_fmt = 64, 96, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(base[:, number : number + 96]), format="rgb24")
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


@pytest.fixture(scope="module")
def sources(test_data: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and true length of every clip that can be decoded."""
    root = test_data / "video_clips"
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}
    found = {name: data for name, data in found.items() if Path(name).suffix in (".mp4", ".avi", ".mkv", ".mov")}
    del found["decord/corrupted.mp4"]
    found |= {"B-frames": synthetic(), "open GOP": synthetic(**{"x264-params": "threads=1:open-gop=1:keyint=12"})}
    found |= {"B-frames, mkv": synthetic(form="matroska"), "transport stream": synthetic(form="mpegts")}
    for codec in {"libvpx", "libvpx-vp9"} & av.codecs_available:
        # With frames that are decoded and never shown.
        hidden = {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}
        found[f"{codec}, webm"] = synthetic(form="webm", codec=codec, **hidden)
    return {name: (data, PyAVVideo(data, name).length) for name, data in found.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_frames_of_any_clip(sources: dict[str, tuple[bytes, int]], data: st.DataObject) -> None:
    content, length = sources[data.draw(st.sampled_from(sorted(sources)))]
    wanted = sorted(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=6)))
    expected = decode_frames(content, wanted, "x", "pyav")
    assert torch.equal(decode_frames(content, wanted, "x", "pyav", length), expected)


def test_seeking_is_done_where_it_helps(sources: dict[str, tuple[bytes, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few frames are decoded for the last one of a clip with key frames, and none is sought without a length."""
    decoded = []
    opened = PyAVVideo._opened

    @contextmanager
    def counting(self: PyAVVideo) -> Iterator[Any]:
        with opened(self) as (container, stream):
            yield Counting(container), stream

    class Counting:
        def __init__(self, container: Any) -> None:
            self._container = container

        def decode(self, stream: Any) -> Any:
            for frame in self._container.decode(stream):
                decoded.append(frame.pts)
                yield frame

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

    monkeypatch.setattr(PyAVVideo, "_opened", counting)
    for name in sorted(SOUND | {"B-frames", "B-frames, mkv"}):
        content, length = sources[name]
        decoded.clear()
        decode_frames(PyAVVideo(content, name, length), [length - 1], "x")
        assert len(decoded) < length / 2, name
        decoded.clear()
        decode_frames(PyAVVideo(content, name), [length - 1], "x")
        assert len(decoded) == length, name
        # The first and the last: two stretches.
        decoded.clear()
        decode_frames(PyAVVideo(content, name, length), [0, length - 1], "x")
        assert len(decoded) < length / 2 + 2, name


@pytest.mark.parametrize("length", [96, 98, 1, 10**9])
def test_a_length_that_is_not_so_is_of_no_use(sources: dict[str, tuple[bytes, int]], length: int) -> None:
    content, true = sources["B-frames"]
    assert true == 97
    assert torch.equal(decode_frames(content, [96], "x", "pyav", length), decode_frames(content, [96], "x", "pyav"))


def test_a_stream_that_begins_anywhere(sources: dict[str, tuple[bytes, int]]) -> None:
    """Cut in the middle of a group: its first packets give no frames, so times and numbers do not fit."""
    content, whole = sources["transport stream"]
    cut = content[len(content) // 3 // 188 * 188 :]
    frames = list(PyAVVideo(cut, "x").frames())
    assert 10 < len(frames) < whole
    found = decode_frames(cut, [len(frames) - 1], "x", "pyav", len(frames))
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), frames[-1])


def jpegs(sizes: list[tuple[int, int]], form: str) -> bytes:
    """A clip of one JPEG for each (width, height); the header knows the first."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=form) as container:
        track: Any = container.add_stream("mjpeg", rate=10)
        track.width, track.height = sizes[0]
        track.pix_fmt = "yuvj420p"
        for number, size in enumerate(sizes):
            picture = io.BytesIO()
            Image.new("RGB", size, (number, 0, 0)).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = track, Fraction(1, 10), True
            packet.pts = packet.dts = number
            container.mux(packet)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["avi", "matroska"])
def test_frames_may_not_outgrow_their_header(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way they are decoded: from the start, after a seek, one by one or to count them."""
    content = jpegs([(64, 48)] * 12 + [(400, 300)] * 12, form)
    assert decode_frames(content, [20], "x", "pyav", 24).shape == (1, 3, 300, 400)
    assert PyAVVideo(content, "x", 24)._seek(FrameStack([20], "x"))
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 10_000)
    assert decode_frames(content, [11], "x", "pyav", 24).shape == (1, 3, 48, 64)
    assert not PyAVVideo(content, "x", 24)._seek(FrameStack([20], "x"))
    for read in (
        lambda: probe_video(content, "x"),
        lambda: decode_frames(content, [20], "x", "pyav"),
        lambda: decode_frames(content, [20], "x", "pyav", 24),
        lambda: list(PyAVVideo(content, "x").frames()),
    ):
        with pytest.raises(DataError, match=r"^x: frames of 400x300, more than 10000 pixels; shrink the video$"):
            read()


def test_frames_that_change_their_size_are_refused_when_they_are_counted() -> None:
    content = jpegs([(64, 48)] * 3 + [(48, 64)], "avi")
    for read in (lambda: probe_video(content, "x"), lambda: decode_frames(content, [0, 3], "x", "pyav")):
        with pytest.raises(DataError, match=r"^x: frames change their size \(64x48, 48x64\); convert the video"):
            read()
    assert probe_video(jpegs([(64, 48)] * 4, "avi"), "x")["frames"] == 4


def test_stretches() -> None:
    keys = [0, 12, 24, 36, 48]
    assert stretches_of([3], keys) == [(0, [3])]
    assert stretches_of([13], keys) == [(12, [13])]
    assert stretches_of([0, 13, 14, 50], keys) == [(0, [0]), (12, [13, 14]), (48, [50])]
    # A seek from 26 to 36 saves ten frames, one from 26 to 24 none.
    assert stretches_of([20, 25, 33, 37], keys) == [(12, [20, 25, 33, 37])]
    assert stretches_of([20, 25, 37], keys) == [(12, [20, 25]), (36, [37])]
    assert stretches_of([4, 13], keys) == [(0, [4, 13])]
