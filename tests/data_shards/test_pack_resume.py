"""However often a packing is broken off, and whatever the number of processes, the same bytes are there at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing_items
import pytest
from support import wait_until

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards import parallel
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.pack.imagefolder import pack_arrays, pack_imagefolder
from vitgraft.data_shards.pack.items import pack_items
from vitgraft.data_shards.pack.label_report import LabelReport
from vitgraft.data_shards.pack.panoptic import pack_panoptic
from vitgraft.data_shards.pack.semantic import pack_semantic
from vitgraft.data_shards.pack.video import pack_video
from vitgraft.data_shards.report import verify


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twenty-two files; with shards of five: four full ones and a rest."""
    (tmp_path / "texts").mkdir()
    for number in range(22):
        (tmp_path / "texts" / f"{number:02d}").write_bytes(b"%d" % number * 900)
    return tmp_path / "texts"


def pack(texts: Path, out: Path, told: list[str] | None = None, **options: Any) -> Manifest:
    items = [packing_items.Text(path) for path in sorted(texts.glob("[0-9]*"))]
    options = {"samples_per_shard": 5, "say": [].append if told is None else told.append} | options
    return pack_items(items, out, "video", LabelReport("clips", ["a"]), source={"packer": "test"}, **options)


def stop_after(count: int, error: BaseException) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        assert total == 22
        if done == count:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("full"), RuntimeError("a mistake")])
@pytest.mark.parametrize("jobs", [1, 2])
def test_finished_shards_are_kept_and_gone_on_with(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, jobs: int
) -> None:
    monkeypatch.setattr(parallel, "PATIENCE_S", 0.0)
    told: list[str] = []
    with pytest.raises(type(error)):
        pack(texts, tmp_path / "set", told, progress=stop_after(13, error), jobs=jobs)
    assert told == [
        f"10 samples in 2 finished shards are kept in {tmp_path}/set.packing: the same command goes on with them"
    ]
    assert siblings(tmp_path / "set") == ["set.packing", "texts"]
    with pytest.raises(KeyboardInterrupt):
        pack(texts, tmp_path / "set", told, progress=stop_after(21, KeyboardInterrupt()), jobs=jobs)
    assert told[1] == f"going on after 10 samples in 2 finished shards of {tmp_path}/set.packing"
    seen: list[tuple[int, int]] = []
    pack(texts, tmp_path / "set", told, progress=lambda *pair: seen.append(pair), jobs=jobs)
    assert seen == [(20, 22), (21, 22), (22, 22)]
    assert siblings(tmp_path / "set") == ["set", "texts"]
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    assert read_manifest(tmp_path / "set").shard_sizes == [5, 5, 5, 5, 2]


def test_a_bad_sample_is_replaced_and_the_packing_goes_on(texts: Path, tmp_path: Path) -> None:
    (texts / "12").write_bytes(b"bad")
    (texts / "03").write_bytes(b"none")
    told: list[str] = []
    with pytest.raises(DataError, match=r"^12: bad sample; replace it$"):
        pack(texts, tmp_path / "set", told)
    (texts / "12").write_bytes(b"none")
    manifest = pack(texts, tmp_path / "set", told)
    assert told[1].startswith("going on after 10 samples in 2 finished shards")
    assert manifest.source["skipped"] == ["03: none", "12: none"]
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_killed_process_leaves_the_finished_shards(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PATIENCE_S", 0.0)
    (texts / "20").write_bytes(b"kill")
    with pytest.raises(DataError, match=r"worker process died \(exit code -9\)"):
        pack(texts, tmp_path / "set", jobs=2)
    (texts / "tame").touch()
    told: list[str] = []
    pack(texts, tmp_path / "set", told)
    assert told[0].startswith("going on after ")
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def broken_off(texts: Path, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(texts, out, progress=stop_after(17, KeyboardInterrupt()))


def test_other_settings_or_source_files_start_anew(texts: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "set", list[str]()
    broken_off(texts, out)
    assert pack(texts, out, told, samples_per_shard=6).shard_sizes == [6, 6, 6, 4]
    broken_off(texts, tmp_path / "set2")
    (texts / "00").write_bytes(b"new" * 600)
    pack(texts, tmp_path / "set2", told)
    anew = "holds nothing that fits these settings and source files: starting anew"
    assert told == [f"{tmp_path}/set.packing {anew}", f"{tmp_path}/set2.packing {anew}"]
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set2") == content(tmp_path / "whole")


def test_shards_count_up_to_the_first_whose_samples_changed(texts: Path, tmp_path: Path) -> None:
    broken_off(texts, tmp_path / "set")
    (texts / "07").write_bytes(b"new")
    told: list[str] = []
    pack(texts, tmp_path / "set", told)
    assert told == [f"going on after 5 samples in 1 finished shards of {tmp_path}/set.packing"]
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_file_that_changes_behind_its_reading_is_packed_anew(texts: Path, tmp_path: Path) -> None:
    def change(done: int, _: int) -> None:
        if done == 2:
            # Read, but its shard of five is not closed.
            (texts / "01").write_bytes(b"new")
        elif done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(texts, tmp_path / "set", progress=change)
    pack(texts, tmp_path / "set")
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "index", "journal"])
def test_damaged_shards_are_never_trusted(texts: Path, tmp_path: Path, damage: str) -> None:
    broken_off(texts, tmp_path / "set")
    place = tmp_path / "set.packing"
    tar, journal = place / "set" / "shard-000001.tar", place / "journal.jsonl"
    data = tar.read_bytes()
    if damage == "byte":
        tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    elif damage == "cut":
        tar.write_bytes(data[:-512])
    elif damage == "gone":
        tar.unlink()
    elif damage == "index":
        tar.with_suffix(".idx").write_bytes(bytes(48))
    else:
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(lines[0] + lines[1][:40])
    told: list[str] = []
    pack(texts, tmp_path / "set", told)
    assert told == [f"going on after 5 samples in 1 finished shards of {place}"]
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_short_last_shard_is_gone_on_with_only_while_it_is_the_last(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vitgraft.data_shards.pack.writer.make_manifest", fail)
        with pytest.raises(KeyboardInterrupt):
            pack(texts, tmp_path / "set")
    (texts / "22").write_bytes(b"one more")
    told: list[str] = []
    pack(texts, tmp_path / "set", told)
    assert told == [f"going on after 20 samples in 4 finished shards of {tmp_path}/set.packing"]
    pack(texts, tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_replacing_a_set_is_resumable_too(texts: Path, tmp_path: Path) -> None:
    pack(texts, tmp_path / "set", samples_per_shard=9)
    with pytest.raises(KeyboardInterrupt):
        pack(texts, tmp_path / "set", progress=stop_after(17, KeyboardInterrupt()), overwrite=True)
    assert read_manifest(tmp_path / "set").shard_sizes == [9, 9, 4]
    # Without --overwrite nothing is replaced, and what is finished stays.
    with pytest.raises(ConfigError, match="already holds a data set"):
        pack(texts, tmp_path / "set")
    told: list[str] = []
    assert pack(texts, tmp_path / "set", told, overwrite=True).shard_sizes == [5, 5, 5, 5, 2]
    assert told[0].startswith("going on after 15 samples")
    assert siblings(tmp_path / "set") == ["set", "texts"]


KILLED = """
import multiprocessing, pathlib, sys, time
from vitgraft.data_shards import parallel
from vitgraft.data_shards.pack.imagefolder import pack_imagefolder

def progress(done, total):
    # Slow enough to be killed on the way.
    time.sleep(0.02)
    if done == 1:
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)

if __name__ == "__main__":
    parallel.PATIENCE_S = 0.0
    photos, out = map(pathlib.Path, sys.argv[1:])
    pack_imagefolder(photos, out, samples_per_shard=6, jobs=2, progress=progress)
"""


def test_a_real_kill(test_data: Path, tmp_path: Path) -> None:
    photographs = sorted((test_data / "coco_tiny" / "images" / "train2017").glob("*.jpg"))
    for number in range(64):
        link = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photographs[number % len(photographs)])
    out, script = tmp_path / "sets" / "set", tmp_path / "killed.py"
    script.write_text(KILLED)
    journal = out.with_name("set.packing") / "journal.jsonl"
    for lines in (2, 5):
        command = [sys.executable, str(script), str(tmp_path / "photos"), str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def enough(lines: int = lines) -> bool:
            return journal.exists() and journal.read_bytes().count(b"\n") >= lines

        wait_until(enough, 60, process)
        with pytest.raises(ConfigError, match="another process is packing it"):
            pack_imagefolder(tmp_path / "photos", out, samples_per_shard=6)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        if lines == 2:
            # Workers end with the packer, though nobody tells them.
            workers = [int(pid) for pid in (process.communicate()[0]).split()]
            assert len(workers) == 2
            deadline = time.monotonic() + 20
            while any(Path(f"/proc/{pid}").exists() for pid in workers):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    told: list[str] = []
    pack_imagefolder(tmp_path / "photos", out, samples_per_shard=6, say=told.append)
    finished = [line for line in told if line.startswith("going on after")]
    assert len(finished) == 1
    assert int(finished[0].split()[3]) >= 30
    pack_imagefolder(tmp_path / "photos", tmp_path / "whole", samples_per_shard=6)
    assert content(out) == content(tmp_path / "whole")
    assert siblings(out) == ["set"]
    assert verify(out, jobs=2).ok


def test_every_packer_writes_the_same_bytes_in_any_number_of_processes(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.setattr(parallel, "PATIENCE_S", 0.0)
    coco, clips, sample = (test_data / name for name in ("coco_tiny", "video_clips", "coco_panoptic_sample"))
    instances = coco / "annotations" / "instances_train2017.json"
    names = [str(number) for number in range(12)]
    camvid = test_data / "camvid_mini"
    np.savez(
        tmp_path / "a.npz", images=np.arange(12 * 12 * 3 * 9, dtype=np.uint8).reshape(9, 12, 12, 3), y=[0, 1, 2] * 3
    )
    packers: dict[str, Callable[..., Manifest]] = {
        "coco": lambda out, **kw: pack_coco(coco / "images" / "train2017", instances, out, **kw),
        "semantic": lambda out, **kw: pack_semantic(camvid / "train", camvid / "trainannot", out, names, **kw),
        "panoptic": lambda out, **kw: pack_panoptic(
            sample / "input_images", sample / "panoptic_examples.json", out, masks=sample / "panoptic_examples", **kw
        ),
        "video": lambda out, **kw: pack_video(clips, out, on_error="skip", **kw),
        "arrays": lambda out, **kw: pack_arrays(tmp_path / "a.npz", out, **kw),
        "imagefolder": lambda out, **kw: pack_imagefolder(coco / "images", out, **kw),
    }
    for name, packer in packers.items():
        told: dict[int, list[Any]] = {1: [], 3: []}
        for jobs, seen in told.items():
            add: Callable[..., None] = lambda *what, seen=seen: seen.append(what)  # noqa: E731
            packer(tmp_path / f"{name}{jobs}", jobs=jobs, samples_per_shard=7, checked=add, progress=add, say=add)
        assert content(tmp_path / f"{name}1") == content(tmp_path / f"{name}3"), name
        assert told[1] == told[3]
        done, total = told[1][-1]
        assert done == total
    skipped = json.loads((tmp_path / "video3" / "manifest.json").read_text())["source"]["skipped"]
    assert len(skipped) == 1
    assert "corrupted.mp4" in skipped[0]
