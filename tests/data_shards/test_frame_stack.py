"""Clips are kept in one array of bounded size, and resized while they are decoded without changing a bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitgraft.configs.errors import DataError
from vitgraft.data_shards import frame_stack
from vitgraft.data_shards.dataset import prepare_clip
from vitgraft.data_shards.decode import decode_frames, decode_resized, sample_frames
from vitgraft.data_shards.frame_stack import FrameStack
from vitgraft.data_shards.geometry import fitted, resized
from vitgraft.data_shards.pack.reencode import Reencode, encode_mp4
from vitgraft.data_shards.transforms import Transforms


def noise(count: int, height: int, width: int) -> list[Any]:
    generator = np.random.RandomState(0)
    return [generator.randint(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(count)]


@pytest.mark.parametrize("target", [(30, 40), (7, 91), (120, 160), (1, 1)])
def test_frames_resized_one_by_one_are_those_resized_together(target: tuple[int, int]) -> None:
    frames = [torch.from_numpy(frame).permute(2, 0, 1) for frame in noise(4, 60, 80)]
    stack = FrameStack([5, 7, 7, 9, 12], "x", lambda size: target)
    for number, frame in zip((5, 7, 9, 12), frames, strict=True):
        stack.put(number, frame)
    together = torch.stack([frames[0], frames[1], frames[1], frames[2], frames[3]])
    assert torch.equal(stack.frames(), resized(together, target))
    assert stack.size == (60, 80)


def test_clips_of_evaluation_and_prediction_are_bit_for_bit_what_resizing_the_whole_clip_gives(
    tmp_path: Path, configure: Any
) -> None:
    data = encode_mp4(noise(20, 64, 80), 10, crf=20)
    (tmp_path / "a.mp4").write_bytes(data)
    config = configure(tmp_path, image_size=[32, 32])
    whole = decode_frames(data, sample_frames(20, config.clip, train=False), "x")
    expected = Transforms(config).prepare(whole)
    found = prepare_clip(tmp_path / "a.mp4", config)
    assert torch.equal(found.canvas, expected.canvas)
    assert (found.size, found.scale) == (expected.size, expected.scale)


def test_a_clip_of_too_many_pixels_is_refused_unless_it_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_mp4(noise(10, 64, 80), 10, crf=40)
    monkeypatch.setattr(frame_stack, "MAX_CLIP_PIXELS", 5 * 64 * 80)
    assert decode_frames(data, range(5), "x").shape == (5, 3, 64, 80)
    with pytest.raises(DataError, match=r"^x: a clip of 6 frames of 80x64 pixels, more than 25600 together; pack with"):
        decode_frames(data, range(6), "x")
    frames, size = decode_resized(data, range(10), "x", lambda size: fitted(size, (32, 32)))
    assert (frames.shape, size) == ((10, 3, 26, 32), (64, 80))


def test_frames_that_change_their_size_and_frames_that_are_missing() -> None:
    stack = FrameStack([0, 1], "x")
    stack.put(0, torch.zeros(3, 4, 6, dtype=torch.uint8))
    with pytest.raises(DataError, match="frame 1 cannot be decoded, 1 of 2 found"):
        stack.frames()
    with pytest.raises(DataError, match=r"frames change their size \(6x4, 4x6\)"):
        stack.put(1, torch.zeros(3, 6, 4, dtype=torch.uint8))


@pytest.mark.slow
def test_a_small_file_of_large_frames_takes_the_memory_of_its_frames_once(tmp_path: Path) -> None:
    """In 0.1 MB lie 8 frames of 27 MB each."""
    blank = np.zeros((3000, 3000, 3), np.uint8)
    data = encode_mp4([blank] * 8, 10, crf=40)
    assert len(data) < 200_000
    (tmp_path / "a.mp4").write_bytes(data)

    def peak(what: str) -> int:
        """MiB beyond what the modules take."""
        lines = (
            "import resource, sys",
            "from pathlib import Path",
            "from vitgraft.data_shards.decode import decode_frames, decode_resized",
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
            what,
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)",
        )
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    path = tmp_path / "a.mp4"
    # Besides the clip: a frame or two, and what the decoder refers to.
    assert peak(f"decode_frames(Path({str(path)!r}), range(8), 'x', 'pyav')") < 8 * 26 + 250
    assert peak(f"decode_resized(Path({str(path)!r}), range(8), 'x', lambda size: (64, 64), 'pyav')") < 250


def test_images_for_each_frame_are_bounded_while_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitgraft.data_shards.pack import reencode

    data = encode_mp4(noise(10, 64, 80), 10, crf=30)
    monkeypatch.setattr(reencode, "MAX_SAMPLE_BYTES", 20_000)
    with pytest.raises(DataError, match=r"^x: its frames take more than 20000 bytes as images"):
        Reencode("frames").encode(data, "x")
