"""Layout, commit and reading of checkpoints, without DeepSpeed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support_checkpoints import VALUES, manifest_of, write

from vitgraft.configs.errors import CheckpointError
from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.files import replace_text, write_safetensors
from vitgraft.trainer.checkpoint.read import VectorReader, newest_valid, open_checkpoint, read_weights, verify


def test_files_are_plain_safetensors_and_hashed_as_written(tmp_path: Path) -> None:
    tensors = {"a": np.random.default_rng(0).normal(size=(3, 4)), "b": np.array(7), "c": np.zeros((0, 2), np.float32)}
    record = write_safetensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype
        assert loaded[key].shape == value.shape
        assert (loaded[key] == value).all()


@given(st.integers(1, 60), st.integers(1, 7), st.data())
def test_any_range_is_put_together_from_any_cut(length: int, world: int, data: st.DataObject) -> None:
    ranges = [layout.even_range(length, rank, world) for rank in range(world)]
    ranges = [(a, b) for a, b in ranges if a < b]
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    pieces = layout.intersections(ranges, start, stop, "test")
    covered = [i for index, low, high in pieces for i in range(low, high) if ranges[index][0] <= i < ranges[index][1]]
    assert covered == list(range(start, stop))


def test_a_gap_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="elements 3 to 9 are missing"):
        layout.intersections([(0, 3), (4, 9)], 0, 9, "w")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_vector_is_read_whatever_world_wrote_it(tmp_path: Path, world: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path, 3, world))
    verify(checkpoint)
    reader = VectorReader(checkpoint)
    assert (reader.read(layout.MASTER, "w", 2, 9) == VALUES[2:9] * 3).all()
    weights = read_weights(checkpoint)
    assert (weights["w"] == VALUES.reshape(2, 5) * 3).all()
    assert weights["steps"] == 3
    with pytest.raises(CheckpointError, match="holds no exp_avg of parameter w"):
        reader.read("exp_avg", "w", 0, 1)


def test_the_commit_leaves_manifest_pointer_and_nothing_else(tmp_path: Path) -> None:
    final = write(tmp_path, 5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000005"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    names = {"manifest.json", "buffers.safetensors", "rank-00000.safetensors", "rank-00001.safetensors"}
    assert {p.name for p in final.iterdir()} == names


def test_a_missing_shard_is_not_committed(tmp_path: Path) -> None:
    folder = commit.temporary_folder(tmp_path, 1, 1)
    folder.mkdir(parents=True)
    record = write_safetensors(folder / layout.BUFFERS, {})
    with pytest.raises(CheckpointError, match=r"expected the files .*rank-00000"):
        commit.commit(tmp_path, manifest_of(tmp_path, 1, [record], 1))
    assert newest_valid(tmp_path) == (None, [])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda c: flip(c / "rank-00001.safetensors"), "SHA-256 differs"),
    "a cut file": (lambda c: os.truncate(c / "rank-00001.safetensors", 20), "has 20 bytes"),
    "a lost file": (lambda c: (c / "rank-00000.safetensors").unlink(), "is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "not a committed checkpoint"),
    "a cut manifest": (lambda c: os.truncate(c / "manifest.json", 40), "not valid JSON"),
    "another step's files": (lambda c: c.rename(c.with_name("step-00000009")), "the manifest is of step 2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGE[name]
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    found, invalid = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 1
    assert reason in invalid[0][1]


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    final = write(tmp_path, 1)
    a, b = final / "rank-00000.safetensors", final / "rank-00001.safetensors"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify(open_checkpoint(final))


def test_sweep_removes_what_a_kill_left_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    half = commit.temporary_folder(tmp_path, 2, 1)
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")
    commit.sweep(tmp_path)
    assert not half.exists()
    assert newest_valid(tmp_path)[0] is not None


def test_replace_text_is_whole(tmp_path: Path) -> None:
    replace_text(tmp_path / "a", "one")
    replace_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("looks", "code"), [(0, errno.ESTALE), (1, errno.ENOENT)])
def test_a_checkpoint_that_goes_while_it_is_opened_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int, code: int
) -> None:
    """Retention renames it between two looks at one file, or its server has lost it."""
    path, real, seen = write(tmp_path, 3), Path.stat, []

    def stat(self: Path, **options: Any) -> os.stat_result:
        if self.name == layout.shard_name(0):
            seen.append(self)
            if len(seen) > looks:
                raise OSError(code, os.strerror(code))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with contextlib.suppress(CheckpointError):
        open_checkpoint(path)
    assert seen


def test_a_folder_in_the_place_of_a_run_is_not_marked_as_committed(tmp_path: Path) -> None:
    """The run is moved away between the rename of its first checkpoint and the mark; the attempt is the same."""
    run = tmp_path / "run"
    final = write(run, 1)
    run.rename(tmp_path / "elsewhere")
    run.mkdir()
    (run / "attempt").write_text("1\n")
    with pytest.raises(CheckpointError, match="the run was removed or moved"):
        commit.point_to(final, 1)
    assert {path.name for path in run.iterdir()} == {"attempt"}
