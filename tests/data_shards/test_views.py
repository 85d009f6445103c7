"""Several views of each video: which frames, which parts, and one vote for each video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitgraft.configs.schema.data import ClipConfig, ViewsConfig
from vitgraft.data_shards import decode
from vitgraft.data_shards.batch import Batch, Truth
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.geometry import resized
from vitgraft.data_shards.pack.digits import encode_clip
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.transforms import Transforms
from vitgraft.data_shards.views import clips_of, crops_of
from vitgraft.trainer.tasks.video import AccuracyMetric, average_views


def clip(frames: int, sampling: str = "dense", stride: int = 1) -> ClipConfig:
    return ClipConfig.model_validate({"frames": frames, "sampling": sampling, "stride": stride})


def test_clips_by_hand() -> None:
    # 100 frames, windows of 7: starts 0..93 in two halves 0..46 and 47..93.
    assert clips_of(100, clip(4, stride=2), 2) == [[23, 25, 27, 29], [70, 72, 74, 76]]
    # Four segments of 6 frames, each in three parts of 2.
    assert clips_of(24, clip(4, "uniform"), 3) == [[0, 6, 12, 18], [2, 8, 14, 20], [4, 10, 16, 22]]
    # Two starts for three clips.
    assert clips_of(5, clip(4), 3) == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4]]
    assert clips_of(2, clip(4, "uniform"), 2) == [[0, 1, 1, 1]] * 2
    assert clips_of(1, clip(3), 2) == [[0, 0, 0]] * 2


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
@pytest.mark.parametrize("frames", [1, 4, 8])
def test_one_clip_is_the_one_without_views(sampling: str, frames: int) -> None:
    for count in (1, 2, 3, 7, 8, 9, 50, 333):
        config = clip(frames, sampling, 3)
        assert clips_of(count, config, 1) == [decode.sample_frames(count, config, False)]


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_clips_stay_inside_and_in_order(sampling: str) -> None:
    for count in range(1, 60):
        for clips in (2, 4, 5):
            found = clips_of(count, clip(6, sampling, 2), clips)
            assert len(found) == clips
            assert all(frames == sorted(frames) for frames in found)
            assert min(map(min, found)) >= 0
            assert max(map(max, found)) < count
            assert found == sorted(found)


def position_clip(height: int, width: int) -> torch.Tensor:
    """Each pixel says where it is: red its row, green its column; blue the frame's number."""
    frames = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    frames[:, 0] = torch.arange(height)[:, None]
    frames[:, 1] = torch.arange(width)
    frames[1, 2] = 1
    return frames


@pytest.mark.parametrize(
    ("size", "crops", "corners"),
    [
        ((64, 100), 3, [(0, 0), (0, 18), (0, 36)]),
        ((100, 64), 3, [(0, 0), (18, 0), (36, 0)]),
        ((64, 101), 1, [(0, 18)]),
        ((64, 100), 2, [(0, 0), (0, 36)]),
        ((64, 64), 3, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_crops_by_hand(configure: Any, size: tuple[int, int], crops: int, corners: list[tuple[int, int]]) -> None:
    """The short side is the canvas's already: every pixel of a crop is one of the clip's."""
    transforms = Transforms(configure(Path("x"), image_size=[64, 64], mean=[0.0] * 3, std=[1.0] * 3))
    views = crops_of(position_clip(*size), size, transforms, crops)
    assert len(views) == crops
    for view, (top, left) in zip(views, corners, strict=True):
        assert view.size == (64, 64)
        assert view.canvas.shape == (3, 2, 64, 64)
        expected = position_clip(*size)[:, :, top : top + 64, left : left + 64].transpose(0, 1) / 255
        assert torch.allclose(view.canvas, expected)


def test_the_short_side_is_resized_to_the_canvas(configure: Any) -> None:
    transforms = Transforms(configure(Path("x"), image_size=[32, 32]))
    views = crops_of(resized(position_clip(64, 128), (32, 64)), (64, 128), transforms, 3)
    assert [view.scale for view in views] == [(0.5, 0.5)] * 3
    means = [float(view.canvas[1].mean()) for view in views]
    assert means == sorted(means)
    assert len(set(means)) == 3


def write_videos(folder: Path, count: int = 3) -> Path:
    """Videos of 24 frames, 48x32: the left half dark, the right half bright, all brighter from frame to frame."""
    with DatasetWriter(folder, "video", ["a", "b"]) as writer:
        for number in range(count):
            frames = []
            for index in range(24):
                frame = np.full((32, 48, 3), 4 * index, dtype=np.uint8)
                frame[:, 24:] += 100
                frames.append(frame)
            facts = {"label": number % 2, "file_name": f"{number}", "frames": 24, "fps": 10, "height": 32, "width": 48}
            data = encode_clip(frames, 10) if number != 1 else b"broken"
            writer.add({"mp4": data}, facts)
    return folder


def test_the_views_of_a_batch(tmp_path: Path, configure: Any) -> None:
    folder = write_videos(tmp_path / "set")
    config = configure(folder, image_size=[32, 32], mean=[0.0] * 3, std=[1.0] * 3, clip={"frames": 2, "stride": 1})
    views = ViewsConfig(clips=2, crops=3)
    item = PackedDataset(folder, config, "video", train=False, views=views).eval_batch([0, 1, 2])
    batch = item.batch
    assert batch.images.shape == (18, 3, 2, 32, 32)
    assert batch.sizes.tolist() == [[32, 32]] * 18
    assert batch.weights.tolist() == [1, 0, 1]
    assert [truth.value for truth in batch.truths] == [0, 1, 0]
    assert [number for number, _ in item.errors] == [1]
    assert not batch.images[6:12].any()
    assert torch.equal(batch.images[:6], batch.images[12:])
    # Rows: the first clip's left, centre and right crop, then the second's.
    means = (batch.images[:6, 0].mean((1, 2, 3)) * 255).tolist()
    starts = [frames[0] for frames in clips_of(24, config.clip, 2)]
    bright = [0.25, 0.5, 0.75]
    expected = [4 * (start + 0.5) + 100 * share for start in starts for share in bright]
    assert means == pytest.approx(expected, abs=3)


def test_each_frame_is_decoded_once(tmp_path: Path, configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitgraft.data_shards import dataset as module

    folder = write_videos(tmp_path / "set", 1)
    config = configure(folder, image_size=[32, 32], clip={"frames": 8, "stride": 2})
    asked: list[list[int]] = []
    original = module.decode_resized
    monkeypatch.setattr(
        module,
        "decode_resized",
        lambda data, indices, *rest: [asked.append(list(indices)), original(data, indices, *rest)][1],
    )
    PackedDataset(folder, config, "video", train=False, views=ViewsConfig(clips=4, crops=3)).eval_batch([0])
    assert len(asked) == 1
    assert asked[0] == sorted(set(asked[0]))


def test_probabilities_are_averaged_not_logits() -> None:
    """One view that is certain outweighs two that are nearly undecided, as it would not by its logit alone."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator) * 4
    averaged = average_views(logits, 3)
    expected = logits.softmax(1).reshape(2, 3, 5).mean(1)
    assert torch.allclose(averaged.softmax(1), expected, atol=1e-6)
    assert torch.allclose(averaged.exp(), expected, atol=1e-6)
    certain = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    assert torch.isfinite(average_views(certain, 1)).all()
    assert torch.allclose(average_views(certain, 2).softmax(1), torch.tensor([[0.5, 0.5]]))


def test_each_video_counts_once() -> None:
    """Video 0: two of three views are for the wrong class, but the third is surer; video 1 is unreadable."""
    logits = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.0, 9.0], [5.0, 0.0], [5.0, 0.0], [5.0, 0.0]])
    truths = [Truth("0", (4, 4), 1), Truth("1", (4, 4), 0)]
    metric = AccuracyMetric()
    sizes, weights = torch.full((6, 2), 4), torch.tensor([1.0, 0.0])
    metric.add(average_views(logits, 3), Batch(torch.zeros(6, 3, 1, 4, 4), sizes, weights, None, truths=truths))
    assert metric.state() == [1, 1, 2]
