"""A packed data set is either whole or not there."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.hashing import sha256_file
from vitgraft.data_shards.decode import decode_label
from vitgraft.data_shards.images import decode_image
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.stream import ShardReader


def write(out: Path, samples: int = 5, size: int = 2000, **options: Any) -> None:
    with DatasetWriter(out, "video", ["a", "b"], total=samples, samples_per_shard=2, **options) as writer:
        for number in range(samples):
            writer.add({"mp4": bytes([number]) * size}, {"label": number % 2})


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_content_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.samples, manifest.shard_sizes, manifest.classes) == (5, [2, 2, 1], ["a", "b"])
    reader = ShardReader(tmp_path / "set", manifest)
    for number in (4, 0, 3, 1, 2):
        raw = reader.read(number)
        assert raw.key == f"{number:09d}"
        assert raw.members["mp4"] == bytes([number]) * 2000
        assert json.loads(raw.members["json"]) == {"label": number % 2}
    assert siblings(tmp_path / "set") == ["set"]


def test_manifest_states_the_files_hashes(tmp_path: Path) -> None:
    write(tmp_path / "set")
    for shard in read_manifest(tmp_path / "set").shards:
        assert sha256_file(tmp_path / "set" / shard.name) == shard.sha256
        assert sha256_file(tmp_path / "set" / shard.index_name) == shard.index_sha256


def test_index_gives_the_first_header_of_each_sample(tmp_path: Path) -> None:
    import tarfile

    write(tmp_path / "set")
    with tarfile.open(tmp_path / "set" / "shard-000000.tar") as tar:
        headers = [member.offset for member in tar if member.name.endswith(".json")]
        end = tar.offset
    index = np.fromfile(tmp_path / "set" / "shard-000000.idx", dtype="<u8").tolist()
    assert index[:-1] == headers
    assert headers[-1] < index[-1] <= end


def test_same_samples_give_same_bytes_and_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "one", source={"from": "here"})
    write(tmp_path / "two", source={"from": "there"})
    one, two = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "two")
    assert (one.fingerprint, one.shards) == (two.fingerprint, two.shards)
    write(tmp_path / "three", size=2001)
    assert read_manifest(tmp_path / "three").fingerprint != one.fingerprint


def test_webdataset_reads_the_shards(packed: dict[str, Path]) -> None:
    import webdataset

    folder = packed["semantic"]
    manifest = read_manifest(folder)
    urls = [str(folder / shard.name) for shard in manifest.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(theirs) == 22
    reader = ShardReader(folder, manifest)
    for number, sample in enumerate(theirs):
        raw = reader.read(number)
        assert sample["__key__"] == raw.key
        assert sample["json"] == json.loads(raw.members["json"])
        image = decode_image(raw.members["jpg"], raw.where)
        assert torch.equal(image, torch.from_numpy(sample["jpg"].copy()).permute(2, 0, 1))
        label = np.asarray(Image.open(io.BytesIO(raw.members["label.png"])))
        assert torch.equal(decode_label(raw.members["label.png"], "x"), torch.from_numpy(label.astype(np.int32)))


def test_existing_sets_are_kept_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write(out)
    before = read_manifest(out).fingerprint
    with pytest.raises(ConfigError, match="already holds a data set"):
        write(out, size=9)
    assert read_manifest(out).fingerprint == before
    write(out, size=9, overwrite=True)
    assert read_manifest(out).fingerprint != before
    assert siblings(out) == ["set"]


def test_folders_with_other_files_are_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        write(out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("broken"), OSError(errno.EIO, "I/O error")])
def test_nothing_is_left_of_an_interrupted_packing(tmp_path: Path, failure: BaseException) -> None:
    def packing() -> None:
        with DatasetWriter(tmp_path / "set", "video", ["a"], samples_per_shard=2) as writer:
            for _ in range(3):
                writer.add({"mp4": b"x" * 5000}, {})
            assert len(list(tmp_path.iterdir())) == 1
            raise failure

    with pytest.raises(type(failure)):
        packing()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_set(tmp_path: Path) -> None:
    def packing() -> None:
        with DatasetWriter(tmp_path / "set", "video", ["a"], overwrite=True) as writer:
            writer.add({"mp4": b"x"}, {})
            raise KeyboardInterrupt

    write(tmp_path / "set")
    before = read_manifest(tmp_path / "set")
    with pytest.raises(KeyboardInterrupt):
        packing()
    assert read_manifest(tmp_path / "set") == before
    assert siblings(tmp_path / "set") == ["set"]


KILLED = """
import os, pathlib, signal, sys
from vitgraft.data_shards.pack.writer import DatasetWriter
with DatasetWriter(pathlib.Path(sys.argv[1]), "video", ["a"], samples_per_shard=2) as writer:
    for _ in range(3):
        writer.add({"mp4": b"x"}, {})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_packing_is_no_data_set_and_is_swept_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "set"
    subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert siblings(out) == ["set.packing"]
    with pytest.raises(DataError, match="no such folder"):
        read_manifest(out)
    write(out)
    assert siblings(out) == ["set"]


def test_two_packers_of_one_set_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "set"
    with DatasetWriter(out, "video", ["a"]) as writer:
        writer.add({"mp4": b"x"}, {})
        with pytest.raises(ConfigError, match=r"set: another process is packing it; .* \(locked by process \d+ "):
            write(out)
    assert read_manifest(out).samples == 1
    assert siblings(out) == ["set"]


def test_a_set_whose_replacement_died_between_two_renames_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write(out)
    out.with_name("set.packing").mkdir()
    out.rename(tmp_path / "set.packing" / "old")
    with pytest.raises(ConfigError, match="already holds a data set"):
        write(out)
    assert read_manifest(out).samples == 5
    assert siblings(out) == ["set"]


def test_what_was_replaced_goes_though_the_replacement_died_behind_both_renames(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write(out)
    (tmp_path / "set.packing" / "old").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds a data set"):
        write(out)
    assert siblings(out) == ["set"]


def test_empty_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        write(tmp_path / "set", samples=0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_finished_shards_alone(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        for options, left in (({}, []), ({"identity": str}, ["set.packing"])):
            with pytest.raises(DataError, match=r"disk full after \d+ samples .* needs about \d+ MB") as caught:
                write(small / "set", samples=100, size=100_000, **options)
            assert "\n" not in str(caught.value)
            assert [path.name for path in small.iterdir()] == left
        shards = sorted(path.name for path in (small / "set.packing" / "set").glob("*.tar"))
        journal = (small / "set.packing" / "journal.jsonl").read_text().splitlines()
        assert len(journal) > 1
        assert len(shards) - len(journal) in (0, 1)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_no_space_for_the_manifest_is_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="disk full"):
        write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
