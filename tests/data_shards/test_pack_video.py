"""Videos are packed as they are, with the frames that they really have."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import decode_frames
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.digits import encode_clip
from vitgraft.data_shards.pack.video import pack_video
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import RawSample, ShardReader


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """a.mp4 and b.mp4 of five frames in a folder."""
    frames = [np.full((32, 48, 3), 40 * i, dtype=np.uint8) for i in range(5)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(encode_clip(frames, 10))
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text)
    return path


def raws(folder: Path, manifest: Manifest) -> list[RawSample]:
    reader = ShardReader(folder, manifest)
    return [reader.read(i) for i in range(len(reader))]


def test_real_videos(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "video_clips"
    facts = [fact for fact in json.loads((root / "clips.json").read_text()) if fact.get("label")]
    # The corrupted file has a label too; it has a test of its own.
    facts = [fact for fact in facts if "corrupted" not in fact["file"]]
    assert len(facts) >= 10
    listing = write(tmp_path, "".join(f"{fact['file']}, {fact['label']}\n" for fact in facts))
    manifest = pack_video(listing, tmp_path / "set", root=root)
    assert manifest.classes == sorted({fact["label"] for fact in facts})
    assert verify(tmp_path / "set").ok
    for raw, fact in zip(raws(tmp_path / "set", manifest), facts, strict=True):
        metadata = json.loads(raw.members["json"])
        data = raw.members[Path(fact["file"]).suffix[1:]]
        assert data == (root / fact["file"]).read_bytes()
        assert metadata["frames"] == fact["frames_decoded_pyav"]
        # First, middle and last, as training asks for them: with the length that was packed.
        wanted = [0, metadata["frames"] // 2, metadata["frames"] - 1]
        colours = decode_frames(data, wanted, raw.where, "pyav", metadata["frames"]).float().mean((2, 3))
        expected = torch.tensor([fact[f"mean_rgb_{name}"] for name in ("first", "middle", "last")])
        assert torch.allclose(colours, expected, atol=0.05), fact["file"]
        assert (metadata["width"], metadata["height"]) == (fact["width"], fact["height"])
        assert manifest.classes[metadata["label"]] == fact["label"]
        assert metadata["fps"] == pytest.approx(float(Fraction(fact["fps"])))


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_webm(codec: str, tmp_path: Path) -> None:
    """VP8 and VP9: grey frames, each lighter than the one before."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    stream = io.BytesIO()
    with av.open(stream, "w", format="webm") as container:
        track: Any = container.add_stream(codec, rate=10, options={"deadline": "realtime"})
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            picture = np.full((48, 64, 3), 10 * number, dtype=np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(track.encode())
    (tmp_path / "clip.webm").write_bytes(stream.getvalue())
    manifest = pack_video(write(tmp_path, "clip.webm rising\n"), tmp_path / "set")
    assert verify(tmp_path / "set").ok
    (raw,) = raws(tmp_path / "set", manifest)
    assert raw.members["webm"] == stream.getvalue()
    metadata = json.loads(raw.members["json"])
    assert (metadata["frames"], metadata["width"], metadata["height"], metadata["fps"]) == (20, 64, 48, 10)
    found = decode_frames(raw.members["webm"], [0, 9, 19], raw.where, "pyav", 20).float().mean((1, 2, 3))
    assert torch.allclose(found, torch.tensor([0.0, 90.0, 190.0]), atol=4)


def test_a_corrupted_video_stops_or_is_listed(test_data: Path, clips: Path) -> None:
    (clips / "bad.mp4").write_bytes((test_data / "video_clips" / "decord" / "corrupted.mp4").read_bytes())
    listing = write(clips, "a.mp4 x\nbad.mp4 y\nb.mp4 x\n")
    with pytest.raises(DataError, match=r"bad\.mp4: broken video"):
        pack_video(listing, clips / "set")
    assert not (clips / "set").exists()
    manifest = pack_video(listing, clips / "set", on_error="skip")
    assert manifest.samples == 2
    assert len(manifest.source["skipped"]) == 1
    assert "bad.mp4" in manifest.source["skipped"][0]
    assert verify(clips / "set").ok
    report = inspect(clips / "set", draw=1, out=clips / "pictures")
    assert report.class_counts == {"x": 2, "y": 0}
    assert report.pictures[0].is_file()


def test_a_video_that_cannot_be_read_or_is_too_large_is_left_out(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large for the reader, that is."""
    frames = [np.random.RandomState(i).randint(0, 255, (64, 64, 3)).astype(np.uint8) for i in range(30)]
    (clips / "large.mp4").write_bytes(encode_clip(frames, 10))
    gone = clips / "gone.mp4"
    # What the small ones need, with headers and JSON.
    limit = 3 * 512 + -(-(clips / "a.mp4").stat().st_size // 512) * 512
    monkeypatch.setattr("vitgraft.data_shards.pack.writer.MAX_SAMPLE_BYTES", limit)
    monkeypatch.setattr("vitgraft.data_shards.stream.MAX_SAMPLE_BYTES", limit)
    for name, message in (("large", f"a sample of [0-9]+ bytes, more than {limit}"), ("gone", "no such file")):
        listing = write(clips, f"a.mp4 x\n{name}.mp4 x\nb.mp4 x\n")
        gone.touch()
        # Told before the first is read.
        with pytest.raises(DataError, match=rf"{name}\.mp4: {message}"):
            pack_video(listing, clips / name, say=lambda _: gone.unlink(missing_ok=True))
        gone.touch()
        manifest = pack_video(listing, clips / name, on_error="skip", say=lambda _: gone.unlink(missing_ok=True))
        assert len(raws(clips / name, manifest)) == 2
        assert f"{name}.mp4" in manifest.source["skipped"][0]


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        ("a.mp4 wave\nb.mp4 run\n", None, (["run", "wave"], [1, 0])),
        ("a.mp4,arm wrestling\n# note\n\nb.mp4 , run\n", None, (["arm wrestling", "run"], [0, 1])),
        ("a.mp4 10\nb.mp4 9\n", None, (["9", "10"], [1, 0])),
        ("a.mp4 1\nb.mp4 0\n", ["x", "y"], (["x", "y"], [1, 0])),
        ("a.mp4 y\nb.mp4 x\n", ["x", "y", "z"], (["x", "y", "z"], [1, 0])),
    ],
)
def test_lists(clips: Path, text: str, classes: list[str] | None, expected: Any) -> None:
    manifest = pack_video(write(clips, text), clips / "set", classes=classes)
    labels = [json.loads(raw.members["json"])["label"] for raw in raws(clips / "set", manifest)]
    assert (manifest.classes, labels) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data set is empty"),
        ("# nothing\n", "data set is empty"),
        ("a.mp4\n", r"list\.txt:1: 'a\.mp4'; expected PATH LABEL"),
        ("a.mp4 x\nc.mp4 x\n", r"list\.txt:2: .*c\.mp4: no such video"),
        ("../a.mp4 x\n", "leads out of"),
        ("list.txt x\n", "broken video"),
        ("a.mp4 x\nb.mp4 unknown\n", r"list\.txt:2: label 'unknown' is none of the 2 classes"),
    ],
)
def test_wrong_lists(clips: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack_video(write(clips, text), clips / "set", classes=["x", "y"])
    assert not (clips / "set").exists()


def test_a_list_that_is_no_text_or_missing(clips: Path) -> None:
    (clips / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        pack_video(clips / "list.txt", clips / "set")
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        pack_video(clips / "none.txt", clips / "set")


def odd_folder(folder: Path, videos: Path) -> Path:
    """CLASS/CLIP of suffixes that are not the usual ones, and what systems leave among them."""
    for label in ("wave", "jump"):
        (folder / label).mkdir(parents=True)
        (folder / label / f"{label}.M4V").write_bytes((videos / "m.m4v").read_bytes())
        (folder / label / f"{label}2.mpg").write_bytes((videos / "m.mpg").read_bytes())
        (folder / label / f"._{label}.M4V").write_bytes(b"Mac OS X        ")
    (folder / "wave" / "Thumbs.db").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    return folder


def test_videos_of_other_names_and_what_lies_among_them(fault_data: Path, tmp_path: Path) -> None:
    folder, told = odd_folder(tmp_path / "clips", fault_data / "videos_odd"), list[str]()
    manifest = pack_video(folder, tmp_path / "set", say=told.append)
    assert manifest.samples == 4
    assert verify(tmp_path / "set").ok
    members = [sorted(raw.members) for raw in raws(tmp_path / "set", manifest)]
    assert members == [["json", "m4v"], ["json", "mpg"]] * 2
    assert any("passed over: 3 hidden files" in line for line in told)
    assert any("passed over: 1 other files" in line for line in told)
    named = str(manifest.source["label_report"]["passed_over"])
    assert "._jump.M4V" in named
    assert "Thumbs.db" in named


def test_a_listed_video_may_have_any_name(clips: Path) -> None:
    """Its content decides, and so it does of a text that is called mp4."""
    (clips / "a.mp4").rename(clips / "a.video")
    manifest = pack_video(write(clips, "a.video x\nb.mp4 y\n"), clips / "set")
    assert [sorted(raw.members) for raw in raws(clips / "set", manifest)] == [["json", "mp4"]] * 2
    (clips / "c.mp4").write_text("just a note")
    with pytest.raises(DataError, match=r"c\.mp4: broken video"):
        pack_video(write(clips, "c.mp4 x\nb.mp4 y\n"), clips / "other")


@pytest.mark.parametrize("decoder", ["pyav", None])
def test_a_playlist_is_no_video(clips: Path, monkeypatch: pytest.MonkeyPatch, decoder: Any) -> None:
    """FFmpeg would open the files and addresses that such a text names."""
    monkeypatch.chdir(clips)
    for text in ("ffconcat version 1.0\nfile 'a.mp4'\n", "#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n"):
        (clips / "list.mp4").write_text(text)
        for data in (text.encode(), clips / "list.mp4"):
            with pytest.raises(DataError, match=r"list: (broken video|a text and no video)"):
                decode_frames(data, [0], "list", decoder)
