"""Nothing that is not the packer's is ever removed, and whatever ends a replacement, one whole set is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack import journal
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.stream import ShardReader


def write(out: Path, samples: int = 3, size: int = 2000, **options: Any) -> None:
    with DatasetWriter(out, "video", ["a"], total=samples, samples_per_shard=2, **options) as writer:
        for number in range(writer.items_done, samples):
            writer.add({"mp4": bytes([number]) * size}, {"label": 0})


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"identity": str}])
@pytest.mark.parametrize("place", ["folder", "link", "link-inside", "file"])
def test_what_is_not_ours_beside_out_is_refused_and_kept(tmp_path: Path, options: dict[str, Any], place: str) -> None:
    home, packing = tmp_path / "home", tmp_path / "set.packing"
    (home / "notes").mkdir(parents=True)
    (home / "notes" / "my.txt").write_text("mine")
    (home / "set").mkdir()
    if place == "folder":
        home.rename(packing)
    elif place == "link":
        packing.symlink_to(home)
    elif place == "link-inside":
        packing.mkdir()
        (packing / "set").symlink_to(home)
    else:
        packing.write_text("mine")
    for existing in (False, True):
        if existing:
            (tmp_path / "set").mkdir()
            (tmp_path / "set" / "manifest.json").write_text("{}")
        before = names(tmp_path)
        with pytest.raises(ConfigError, match=r"set\.packing: .* move it away or choose another --out$"):
            write(tmp_path / "set", **options)
        assert names(tmp_path) == before


def test_what_comes_during_a_packing_is_kept(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", "video", ["a"]) as writer:
        writer.add({"mp4": b"x"}, {})
        (tmp_path / "set.packing" / "my.txt").write_text("mine")
    assert read_manifest(tmp_path / "set").samples == 1
    assert names(tmp_path / "set.packing") == ["my.txt"]


def test_a_link_stays_and_the_bytes_go_where_it_points(tmp_path: Path) -> None:
    disk, out = tmp_path / "disk", tmp_path / "home" / "set"
    disk.mkdir()
    out.parent.mkdir()
    out.symlink_to(disk / "train")
    for options in ({}, {"overwrite": True}):
        write(out, **options)
        assert out.is_symlink()
        assert read_manifest(disk / "train").samples == 3
        assert [path.name for path in disk.iterdir()] == ["train"]
        assert [path.name for path in out.parent.iterdir()] == ["set"]


def interrupted(at: int, before: bool, error: BaseException) -> Callable[..., None]:
    """A rename that works, but that ``error`` comes before or after the one of this number among those of sets."""
    rename, count = os.rename, 0

    def replacement(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if before and count == at:
            raise error
        rename(source, target)
        if not before and count == at:
            raise error

    return replacement


@pytest.mark.parametrize("identity", [None, str])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize(
    ("at", "before", "whole"), [(1, True, "old"), (1, False, "old"), (2, True, "old"), (2, False, "new")]
)
def test_an_interrupt_around_the_renames_leaves_one_whole_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    before: bool,
    whole: str,
    error: BaseException,
    identity: Any,
) -> None:
    out, told = tmp_path / "set", list[str]()
    write(out, 5)
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "rename", interrupted(at, before, error))
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError):
            write(out, overwrite=True, identity=identity, say=told.append)
    assert read_manifest(out).samples == (5 if whole == "old" else 3)
    kept = whole == "old" and identity is not None
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["set", "set.packing"][: 1 + kept]
    # Nobody is told to go on with what is finished.
    assert bool(told) == kept
    write(out, overwrite=True, identity=identity)
    assert read_manifest(out).samples == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_old_set_that_cannot_be_put_back_at_once_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set", 5)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target.name == "set":
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "rename", fail)
        with pytest.raises(DataError, match="I/O error"):
            write(tmp_path / "set", overwrite=True)
    with pytest.raises(ConfigError, match="already holds a data set"):
        write(tmp_path / "set")
    assert read_manifest(tmp_path / "set").samples == 5


def test_no_space_for_a_line_of_the_journal_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, buffering: int = -1) -> BinaryIO:
        path.symlink_to("/dev/full")
        return path.open("wb", buffering=0)

    monkeypatch.setattr(journal, "create", full)
    # A device has nothing to sync.
    monkeypatch.setattr(journal, "sync", lambda stream: stream.flush())
    with pytest.raises(DataError, match=r"set: disk full after 2 samples .* free some space"):
        write(tmp_path / "set", identity=str)


def test_a_sample_is_as_large_as_a_reader_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pack.writer", "stream"):
        monkeypatch.setattr(f"vitgraft.data_shards.{module}.MAX_SAMPLE_BYTES", 8192)
    # Two headers, and the JSON in a block.
    largest = 8192 - 3 * 512
    write(tmp_path / "set", size=largest)
    reader = ShardReader(tmp_path / "set", read_manifest(tmp_path / "set"))
    assert len(reader.read(0).members["mp4"]) == largest
    with pytest.raises(DataError, match=r"sample 000000000: a sample of 8704 bytes, more than 8192; split it"):
        write(tmp_path / "other", size=largest + 1)
    assert names(tmp_path / "other.packing") == []


@pytest.mark.parametrize("name", ["lock", "set", "journal.new"])
@pytest.mark.parametrize("planted", ["link", "fifo"])
def test_what_is_planted_in_the_workplace_is_not_written_through(tmp_path: Path, name: str, planted: str) -> None:
    (tmp_path / "set.packing").mkdir()
    target, path = tmp_path / "precious", tmp_path / "set.packing" / name
    target.write_text("mine")
    if planted == "link":
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=f"holds '{name}', which no packer wrote; move it away"):
        write(tmp_path / "set")
    assert target.read_text() == "mine"


def test_new_files_are_new(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        journal.create(tmp_path / "link")
    assert (tmp_path / "target").read_text() == "mine"


def test_a_workplace_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set.packing").mkdir()
    owner = (tmp_path / "set.packing").stat().st_uid
    monkeypatch.setattr(journal.os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=rf"set\.packing: belongs to another user \(number {owner}\); move it away"):
        write(tmp_path / "set")
