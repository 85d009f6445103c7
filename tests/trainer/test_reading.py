"""How much is read and hashed: what is needed, once."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_checkpoints import model_of, save_model
from support import tiny_recipe
from support_checkpoints import VALUES, write

from vitgraft.configs.errors import CheckpointError, TrainingError
from vitgraft.configs.hashing import sha256_file
from vitgraft.configs.load import validate_recipe
from vitgraft.trainer.checkpoint import layout, read
from vitgraft.trainer.checkpoint.read import VectorReader, newest_valid, open_checkpoint, verify


@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_rank_reads_its_ranges_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    reader, taken = VectorReader(open_checkpoint(write(tmp_path, 1, world=3))), []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        taken.append(len(buffers[0]))
        return of_the_system(descriptor, buffers, offset)

    of_the_system = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    for rank in range(world):
        taken.clear()
        start, stop = layout.even_range(10, rank, world)
        assert (reader.read(layout.MASTER, "w", start, stop) == VALUES[start:stop]).all()
        assert sum(taken) == 4 * (stop - start)


def test_a_read_that_stops_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does beyond 2 GiB, and network file systems at times."""
    reader, of_the_system = VectorReader(open_checkpoint(write(tmp_path, 1, world=3))), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: of_the_system(file, [views[0][:3]], offset))
    assert (reader.read(layout.MASTER, "w", 1, 9) == VALUES[1:9]).all()


def test_a_shard_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 1, world=2)
    reader = VectorReader(open_checkpoint(path))
    shard = path / layout.shard_name(1)
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors: cannot be read: it ends at byte \d+"):
        reader.read(layout.MASTER, "w", 0, 10)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors: cannot be read: .*No such file"):
        reader.read(layout.MASTER, "w", 0, 10)
    assert (reader.read(layout.MASTER, "w", 0, 5) == VALUES[:5]).all()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_storage_that_fails_for_a_moment_is_left_to_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """E.g. a network file system: nothing says that the checkpoint is damaged, which would end the run for good."""
    path = write(tmp_path, 1, world=1)
    shard, reader = path / layout.shard_name(0), VectorReader(open_checkpoint(path))
    real = Path.open

    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    def open_others(file: Path, *arguments: Any, **options: Any) -> Any:
        return fail() if file == shard else real(file, *arguments, **options)

    def read_again() -> None:
        reader.read(layout.MASTER, "w", 0, 10)

    uses: list[Callable[[], object]] = [read_again]
    if call == "open":
        monkeypatch.setattr(Path, "open", open_others)
        uses += [lambda: VectorReader(open_checkpoint(path)), lambda: read.read_all(shard)]
    else:
        monkeypatch.setattr(os, "preadv", fail)
    for use in uses:
        with pytest.raises(
            TrainingError, match=rf"rank-00000\.safetensors: cannot be read: .*{os.strerror(number)}"
        ) as e:
            use()
        assert e.value.cause == ("host_memory" if number == errno.ENOMEM else None)


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


@pytest.mark.parametrize(
    ("number", "failures", "tries"),
    [(errno.ESTALE, 2, 3), (errno.EIO, 3, 4), (errno.EIO, 9, 4), (errno.EACCES, 1, 1), (errno.ENOENT, 1, 1)],
)
def test_storage_that_fails_for_a_moment_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, failures: int, tries: int
) -> None:
    """What is the file's own fault is told at once."""
    path = write(tmp_path, 2)
    write(tmp_path, 1)
    tried = Counter[str]()

    def hash_later(file: Path) -> str:
        if file.parent == path:
            tried[file.name] += 1
            if file.name.startswith("rank-00000") and tried[file.name] <= failures:
                raise OSError(number, os.strerror(number))
        return sha256_file(file)

    monkeypatch.setattr(read, "sha256_file", hash_later)
    monkeypatch.setattr(read, "PAUSES_S", (0.0, 0.0, 0.0))
    found, invalid = newest_valid(tmp_path)
    assert found is not None
    assert tried["rank-00000.safetensors"] == tries
    passed = failures < tries
    assert found.step == (2 if passed else 1)
    assert [os.strerror(number) in reason for _, reason in invalid] == ([] if passed else [True])


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
