"""Clips encoded anew hold the same frames: as many, upright, in the same colours, each near a key frame."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards import decode
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.frames import ImageFrames, clip_of
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.reencode import Reencode, encode_mp4
from vitgraft.data_shards.pack.video import pack_video
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import RawSample, ShardReader
from vitgraft.launch.cli import app


def raws(folder: Path, manifest: Manifest) -> list[tuple[RawSample, dict[str, Any]]]:
    reader = ShardReader(folder, manifest)
    samples = [reader.read(i) for i in range(len(reader))]
    return [(raw, json.loads(raw.members["json"])) for raw in samples]


@pytest.mark.parametrize("form", ["gop", "frames"])
def test_real_clips(test_data: Path, tmp_path: Path, form: Any) -> None:
    """All that can be decoded: counts as recorded by an independent script, colours as well, rotations applied once."""
    root = test_data / "video_clips"
    facts = {fact["file"]: fact for fact in json.loads((root / "clips.json").read_text())}
    del facts["decord/corrupted.mp4"]
    (tmp_path / "list.csv").write_text("".join(f"{name},x\n" for name in facts))
    how = Reencode(form, short_side=112)
    manifest = pack_video(tmp_path / "list.csv", tmp_path / "set", root=root, reencode=how, jobs=2)
    assert manifest.source["reencode"] == how.as_source()
    for raw, metadata in raws(tmp_path / "set", manifest):
        fact = facts[metadata["file_name"]]
        count = fact["frames_decoded_pyav"]
        assert metadata["frames"] == count
        assert metadata["fps"] == pytest.approx(float(Fraction(fact["fps"])), rel=0.02)
        clip = clip_of(raw, metadata)
        means = decode.decode_frames(clip, [0, count // 2, count - 1], "x", length=count).float().mean((2, 3))
        expected = torch.tensor([fact[f"mean_rgb_{name}"] for name in ("first", "middle", "last")])
        assert torch.allclose(means, expected, atol=2.5), (metadata["file_name"], means, expected)
        # Smaller ones do not grow.
        assert min(metadata["height"], metadata["width"]) == min(112, fact["height"], fact["width"])
        if "video_90" in fact["file"] or "video_270" in fact["file"]:
            assert metadata["height"] > metadata["width"]
        if isinstance(clip, bytes):
            with av.open(io.BytesIO(clip)) as container:
                packets = [packet for packet in container.demux(video=0) if packet.size]
            assert [packet.is_keyframe for packet in packets] == [number % 8 == 0 for number in range(count)]
            # No frame waits for a later one: they are stored in the order in which they are shown.
            assert [packet.pts for packet in packets] == sorted(packet.pts for packet in packets)
    assert verify(tmp_path / "set", jobs=2).ok


def test_rotated_pixels_stand_upright(test_data: Path, tmp_path: Path) -> None:
    path = test_data / "video_clips" / "decord" / "video_270.mov"
    source = decode.decode_frames(path, [1], "x").float()
    for form in ("gop", "frames"):
        members, facts = Reencode(form).encode(path.read_bytes(), "x")  # type: ignore[arg-type]
        clip = clip_of(RawSample("s", "k", members), facts)
        assert (facts["height"], facts["width"]) == tuple(source.shape[2:]) == (568, 320)
        assert float((decode.decode_frames(clip, [1], "x").float() - source).abs().mean()) < 4


def test_training_reads_both_forms(
    packed: dict[str, Path], tmp_path: Path, configure: Callable[..., DataConfig]
) -> None:
    """The same clips, labels and frames as from the files themselves, but for the coding."""
    clips = tmp_path / "clips"
    clips.mkdir()
    source = read_manifest(packed["video"])
    lines = []
    for number, (raw, metadata) in enumerate(raws(packed["video"], source)):
        (clips / f"{number}.mp4").write_bytes(raw.members["mp4"])
        lines.append(f"{number}.mp4,{source.classes[metadata['label']]}\n")
    (clips / "list.csv").write_text("".join(lines))
    batches = []
    for form in (None, "gop", "frames"):
        out = tmp_path / f"set-{form}"
        how = None if form is None else Reencode(form, quality={"gop": 4, "frames": 95}[form])  # type: ignore[arg-type, index]
        pack_video(clips / "list.csv", out, classes=source.classes, reencode=how)
        dataset = PackedDataset(out, configure(out), "video", train=False)
        batches.append(dataset.eval_batch(list(range(8))))
        assert not batches[-1].errors
    assert len({json.dumps([truth.value for truth in item.batch.truths]) for item in batches}) == 1
    for other in batches[1:]:
        assert float((other.batch.images - batches[0].batch.images).abs().mean()) < 0.1
    report = inspect(tmp_path / "set-frames", draw=1, out=tmp_path / "pictures")
    assert Image.open(report.pictures[0]).width > 300


def test_the_same_clip_gives_the_same_bytes() -> None:
    frames = [np.random.RandomState(i).randint(0, 255, (32, 48, 3)).astype(np.uint8) for i in range(20)]
    assert len({encode_mp4(frames, 12, crf=18, gop=4) for _ in range(3)}) == 1


def test_odd_sizes_and_odd_rates(tmp_path: Path) -> None:
    """H.264's colours go by pairs of pixels; small clips do not grow; a rate that nobody says becomes a usual one."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="avi") as container:
        track: Any = container.add_stream("png", rate=30)
        track.width, track.height, track.pix_fmt = 45, 33, "rgb24"
        for number in range(5):
            container.mux(
                track.encode(av.VideoFrame.from_ndarray(np.full((33, 45, 3), 50 * number, np.uint8), "rgb24"))
            )
        container.mux(track.encode())
    for form, size in (("gop", (32, 44)), ("frames", (33, 45))):
        members, facts = Reencode(form, short_side=64).encode(stream.getvalue(), "x")  # type: ignore[arg-type]
        assert (facts["frames"], facts["height"], facts["width"], facts["fps"]) == (5, *size, 30.0)
        clip = clip_of(RawSample("s", "k", members), facts)
        means = decode.decode_frames(clip, range(5), "x").float().mean((1, 2, 3))
        assert torch.allclose(means, torch.tensor([0.0, 50, 100, 150, 200]), atol=3)


def test_broken_clips_stop_or_are_listed(test_data: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("decord/corrupted.mp4,x\ndecord/video_0.mov,x\n")
    root = test_data / "video_clips"
    with pytest.raises(DataError, match=r"corrupted\.mp4: broken video"):
        pack_video(tmp_path / "list.csv", tmp_path / "set", root=root, reencode=Reencode("gop"))
    assert not (tmp_path / "set").exists()
    for form in ("gop", "frames"):
        how = Reencode(form)  # type: ignore[arg-type]
        manifest = pack_video(tmp_path / "list.csv", tmp_path / form, root=root, reencode=how, on_error="skip")
        assert manifest.samples == 1
        assert "corrupted.mp4" in manifest.source["skipped"][0]


@pytest.mark.parametrize(("form", "width"), [("gop", 20000), ("frames", 70000)])
def test_clips_that_no_encoder_takes_stop_or_are_listed(test_data: Path, tmp_path: Path, form: Any, width: int) -> None:
    """x264 takes sides of up to 16384 pixels, JPEG of up to 65500."""
    with av.open(str(tmp_path / "wide.mkv"), "w") as container:
        track: Any = container.add_stream("ffv1", rate=30)
        track.width, track.height, track.pix_fmt = width, 16, "yuv420p"
        container.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((16, width, 3), np.uint8), "rgb24")))
        container.mux(track.encode())
    (tmp_path / "good.mov").symlink_to(test_data / "video_clips" / "decord" / "video_0.mov")
    (tmp_path / "list.csv").write_text("wide.mkv,x\ngood.mov,x\n")
    with pytest.raises(DataError, match=r"wide\.mkv: cannot be encoded anew: .*; change --reencode") as caught:
        pack_video(tmp_path / "list.csv", tmp_path / "set", reencode=Reencode(form))
    assert "\n" not in str(caught.value)
    manifest = pack_video(tmp_path / "list.csv", tmp_path / "set", reencode=Reencode(form), on_error="skip")
    assert manifest.samples == 1
    assert "wide.mkv" in manifest.source["skipped"][0]


def test_frames_that_are_missing_or_damaged(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    metadata = {"label": 0, "frames": 3, "fps": 10.0, "height": 10, "width": 20}
    sets: dict[str, tuple[dict[str, bytes], str | None]] = {
        "whole": ({"000000.jpg": jpeg, "000001.jpg": jpeg, "000002.jpg": jpeg}, None),
        "missing": ({"000000.jpg": jpeg, "000002.jpg": jpeg}, "1 frames, expected 3"),
        "damaged": ({"000000.jpg": jpeg, "000001.jpg": jpeg[:300], "000002.jpg": jpeg}, "frame 1: broken image"),
    }
    for name, (members, reason) in sets.items():
        with DatasetWriter(tmp_path / name, "video", ["a"]) as writer:
            writer.add(members, metadata)
        found = list(verify(tmp_path / name).bad_samples.values())
        assert len(found) == (reason is not None), found
        assert reason is None or reason in found[0]
    with pytest.raises(DataError, match=r"^w: frame 1 is missing; pack again$"):
        decode.decode_frames(ImageFrames(sets["missing"][0], 10.0, "w"), [0, 1], "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "gop", "quality": 52}, "--quality 52: expected 0 to 51 with --reencode gop"),
        ({"form": "frames", "quality": 0}, "--quality 0: expected 1 to 95"),
        ({"form": "frames", "gop": 4}, "--gop 4: .* only with --reencode gop"),
        ({"form": "gop", "gop": 0}, "--gop 0: expected 1 to 1000"),
        ({"form": "gop", "short_side": 2}, "--short-side 2: expected at least 16 pixels"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Reencode(**options)


def test_without_x264(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(ConfigError, match=r"--reencode gop: .* without libx264; pass --reencode frames"):
        Reencode("gop")
    Reencode("frames")


def test_the_command(test_data: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("decord/video_0.mov,x\n")
    command = [
        "shards",
        "pack",
        "video",
        "--list",
        str(tmp_path / "list.csv"),
        "--root",
        str(test_data / "video_clips"),
    ]
    command += ["--out", str(tmp_path / "set"), "--short-side", "64"]
    failed = CliRunner().invoke(app, command)
    assert isinstance(failed.exception, ConfigError)
    assert "--reencode" in str(failed.exception)
    done = CliRunner().invoke(app, [*command, "--reencode", "frames", "--quality", "80", "--jobs", "2"])
    assert done.exit_code == 0, done.output
    (raw, metadata), *_ = raws(tmp_path / "set", inspect(tmp_path / "set").manifest)
    assert sorted(raw.members) == ["000000.jpg", "000001.jpg", "000002.jpg", "json"]
    assert (metadata["height"], metadata["width"]) == (64, 114)
