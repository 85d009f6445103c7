"""How much is read and hashed: what is needed, once."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from model_checkpoints import model_of, save_model
from support import tiny_recipe
from support_checkpoints import VALUES, write

from vitgraft.configs.hashing import sha256_file
from vitgraft.configs.load import validate_recipe
from vitgraft.trainer.checkpoint import layout, read
from vitgraft.trainer.checkpoint.read import VectorReader, newest_valid, open_checkpoint, verify


class Recorder:
    """A safetensors handle that notes how many elements are taken from each key."""

    def __init__(self, handle: Any, taken: Counter[str]) -> None:
        self.handle, self.taken = handle, taken

    def get_slice(self, key: str) -> Any:
        piece, taken = self.handle.get_slice(key), self.taken

        class Piece:
            def __getitem__(self, part: slice) -> Any:
                taken[key] += part.stop - part.start
                return piece[part]

        return Piece()


@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_rank_reads_its_ranges_and_no_others(tmp_path: Path, world: int) -> None:
    reader = VectorReader(open_checkpoint(write(tmp_path, 1, world=3)))
    taken: Counter[str] = Counter()
    reader._handles = [Recorder(handle, taken) for handle in reader._handles]
    for rank in range(world):
        taken.clear()
        start, stop = layout.even_range(10, rank, world)
        assert (reader.read(layout.MASTER, "w", start, stop) == VALUES[start:stop]).all()
        assert sum(taken.values()) == stop - start


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core hashes one file at a time")
def test_files_are_hashed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them are under way at once, or the barrier breaks."""
    together = threading.Barrier(2)

    def hash_when_two_are_there(path: Path) -> str:
        together.wait(timeout=30)
        return sha256_file(path)

    monkeypatch.setattr(read, "sha256_file", hash_when_two_are_there)
    checkpoint = open_checkpoint(write(tmp_path, 1, world=3))  # four files
    seen: list[tuple[int, int]] = []
    verify(checkpoint, lambda done, total: seen.append((done, total)))
    assert len(seen) == 4
    assert seen[-1] == (seen[-1][1], sum(record.bytes for record in checkpoint.manifest.files))


def test_a_start_hashes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen trunk too, which all checkpoints name, although two of them are damaged; readers hash nothing."""
    tree = tiny_recipe("video", "data", model__backbone__frozen=True)
    run, model = tmp_path / "run", model_of(validate_recipe(tree, "recipe"))
    for step in (1, 2, 3):
        path = save_model(run, tree, model, step=step)
        if step > 1:
            shard = path / "rank-00001.safetensors"
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
    hashed: Counter[Path] = Counter()

    def count(path: Path) -> str:
        hashed[path] += 1
        return sha256_file(path)

    monkeypatch.setattr(read, "sha256_file", count)
    found, invalid = newest_valid(run)
    assert found is not None
    assert (found.step, len(invalid)) == (1, 2)
    assert set(hashed.values()) == {1}
    assert {path.parent.name for path in hashed} == {"blobs", "step-00000001", "step-00000002", "step-00000003"}
    hashed.clear()
    read.read_weights(open_checkpoint(found.path))
    assert not hashed
