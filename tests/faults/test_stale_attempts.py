"""A writer that slept through the start of a newer attempt changes nothing when it wakes; half-written checkpoints,
however many, push no valid one out."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from support_checkpoints import manifest_of, write
from support_kills import Fork, all_ended, until
from support_writers import FakeRank, Told, make_run, memfd

from vitgraft.launch.run_dir import open_run
from vitgraft.trainer import checkpointer as role
from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.files import write_safetensors
from vitgraft.trainer.checkpoint.read import VectorReader, newest_valid
from vitgraft.trainer.checkpoint.retention import retain
from vitgraft.trainer.checkpoint.save import RunFacts
from vitgraft.trainer.checkpoint.savers import InlineSaver

WORLD = 2
NUMBERS = np.arange(10, dtype=np.float32)


def stale_writer(folder: Path, at: int | None, *, late: bool = False, spares: bool = True) -> tuple[Fork, list[str]]:
    """Attempt 1 stops at an operation of its save of step 3; attempt 2 writes that step, or the next, when it wakes.

    Args:
        late: it wakes only when attempt 2 has committed.
        spares: it had not begun to delete, so it deletes nothing.
    """
    run, recipe = make_run(folder, train__checkpoint={"every_steps": 1, "keep_last": 1})
    open_run(run, recipe, "auto").close()
    write(run, 2)
    buffers = [memfd() for _ in range(WORLD)]
    for rank, (_, path) in enumerate(buffers):
        FakeRank(run, path, rank, WORLD).hand_over(3)
    paths = [path for _, path in buffers]
    stale = Fork(
        lambda: role.main(["--run-dir", str(run), "--attempt", "1", "--drain", "--buffers", *paths]),
        run,
        at,
        number=signal.SIGSTOP,
    )
    errors: list[str] = []
    with all_ended([stale]):
        if at is None:
            assert stale.wait() == 0
        else:
            until(stale.stopped)
            # A lock that lies on a shared disk may be lost with its host; here it is not held at all.
            handle = open_run(run, recipe, "auto")
            handle.close()
            assert handle.resume is not None
            step = handle.resume.step + 1
            target = commit.temporary_folder(run, step, handle.attempt)
            target.mkdir()
            records = [write_safetensors(target / layout.BUFFERS, {"steps": np.array(step)})]
            for rank in range(WORLD):
                start, stop = layout.even_range(10, rank, WORLD)
                key = layout.range_key(layout.MASTER, "w", start)
                values = 0.5 + NUMBERS[start:stop]  # not what the stale attempt has
                records.append(write_safetensors(target / layout.shard_name(rank), {key: values}))
            manifest = manifest_of(run, step, records, WORLD, handle.attempt)
            if late:
                commit.commit(run, manifest)
            there = folders(run)
            os.kill(stale.pid, signal.SIGCONT)
            assert stale.wait() == 0
            assert not spares or folders(run) == there
            if not late:
                commit.commit(run, manifest)
            found, invalid = newest_valid(run)
            assert found is not None
            assert (found.step, found.manifest.attempt, invalid) == (step, 2, [])
            assert np.array_equal(VectorReader(found).read(layout.MASTER, "w", 0, 10), 0.5 + NUMBERS)
            assert (run / "checkpoints" / layout.POINTER).read_text() == f"{found.path.name}\n"
            retain(run, recipe, step)
            assert folders(run) == [found.path.name]
    for descriptor, path in buffers:
        buffer = role.HandoverBuffer.attach(path)
        assert buffer is not None
        answer = buffer.answered()
        assert answer is not None
        errors += [answer.error] if answer.error else []
        os.close(descriptor)
    return stale, errors


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("late", [False, True], ids=["before the newer commit", "after it"])
def test_a_writer_that_wakes_in_a_newer_attempt_touches_nothing(tmp_path: Path, late: bool) -> None:
    """Stopped at each operation on the disk; what it is told, where it had not committed, names both attempts. Of a
    deletion that it had begun it may do the rest."""
    whole, errors = stale_writer(tmp_path / "whole", None)
    assert errors == []
    told = max(at for at, operation in enumerate(whole.operations) if operation.endswith("pwrite"))
    assert told < len(whole.operations) - 1, "it deletes after it has answered"
    refused = 0
    # What it did not rename before the newer one's start it finds swept, whenever it wakes.
    first = whole.operations.index("os.rename") - 1 if late else 0
    for at, operation in enumerate(whole.operations[first:], first):
        _, errors = stale_writer(tmp_path / f"stopped-{at}", at, late=late, spares=at <= told)
        assert len(errors) in (0, WORLD), operation
        assert all("attempt 1 is stale, attempt 2 owns the run" in error for error in errors), (operation, errors)
        refused += bool(errors)
    assert 0 < refused < len(whole.operations)


def test_a_first_commit_of_an_earlier_attempt_leaves_no_trace_in_a_run_that_began_again(tmp_path: Path) -> None:
    """Stopped at each operation from the rename of the checkpoint to that of the pointer, while ``--resume never``
    starts: what it wakes to say, that the run has a checkpoint, would keep the next start from starting."""
    whole, _ = first_commit(tmp_path / "whole", None)
    renames = [at for at, operation in enumerate(whole.operations) if operation == "os.rename"]
    for at in range(renames[-3] - 1, renames[-1] + 2):
        _, run = first_commit(tmp_path / f"stopped-{at}", at)
        left = [path.name for path in run.iterdir() if path.name.startswith(commit.COMMITTED)]
        assert left == [], whole.operations[at]
        handle = open_run(run, make_run(run)[1], "auto")
        handle.close()
        assert (handle.resume, handle.notes) == (None, []), whole.operations[at]


def first_commit(folder: Path, at: int | None) -> tuple[Fork, Path]:
    """Attempt 1 stops at an operation of the run's first save, and wakes when attempt 2 has begun at the start."""
    run, recipe = make_run(folder, train__checkpoint={"every_steps": 1})
    open_run(run, recipe, "auto").close()
    descriptor, path = memfd()
    FakeRank(run, path, 0, 1).hand_over(3)
    arguments = ["--run-dir", str(run), "--attempt", "1", "--drain", "--buffers", path]
    stale = Fork(lambda: role.main(arguments), run, at, number=signal.SIGSTOP)
    with all_ended([stale]):
        if at is not None:
            until(stale.stopped)
            open_run(run, recipe, "never").close()
            os.kill(stale.pid, signal.SIGCONT)
        assert stale.wait() == 0
    os.close(descriptor)
    return stale, run


def test_a_rank_of_an_earlier_attempt_deletes_nothing(tmp_path: Path) -> None:
    """Of ``train.roles: inline``, where the ranks carry retention out."""
    run, recipe = make_run(tmp_path, train__roles="inline", train__checkpoint={"every_steps": 1, "keep_last": 1})
    for step in (1, 2):
        write(run, step)
    facts = RunFacts(run, 1, "h", ["a"], layout.Normalisation(mean=[0], std=[1], image_size=[8, 8]), None)
    told = Told()
    saver = InlineSaver(recipe, None, facts, 100, told)  # type: ignore[arg-type]
    saver._checkpoint = newest_valid(run)[0]
    (run / commit.ATTEMPT).write_text("2\n")
    saver.tidy()
    assert len(folders(run)) == 2
    assert "attempt 1 is stale, attempt 2 owns the run" in told.texts()[0]
    (run / commit.ATTEMPT).write_text("1\n")
    saver.tidy()
    assert folders(run) == ["step-00000002"]


@pytest.mark.parametrize("count", range(1, 6))
def test_half_written_checkpoints_push_no_valid_one_out(tmp_path: Path, count: int) -> None:
    """As many as are kept and more: killed before the manifest, cut short, or bare folders, all newer than the valid
    ones; retention, a new start and the next commit."""
    run, recipe = make_run(tmp_path, train__checkpoint={"every_steps": 1, "keep_last": 2})
    open_run(run, recipe, "auto").close()
    for step in (1, 2):
        write(run, step)
    for number in range(count):
        step = 3 + number
        if number % 3 == 0:
            folder = commit.temporary_folder(run, step, 1)
            folder.mkdir()
            (folder / layout.shard_name(0)).write_bytes(b"half")
        elif number % 3 == 1:
            os.truncate(write(run, step) / layout.shard_name(1), 9)
        else:
            (commit.final_folder(run, step)).mkdir()
    assert retain(run, recipe) == []
    found, _ = newest_valid(run)
    assert found is not None
    assert found.step == 2
    handle = open_run(run, recipe, "auto")
    handle.close()
    assert handle.resume is not None
    assert handle.resume.step == 2
    assert sum("WARNING" in note for note in handle.notes) == count - (count + 2) // 3
    write(run, 3, attempt=handle.attempt)
    assert retain(run, recipe, 3) == ["step-00000001"]
    found, invalid = newest_valid(run)
    assert found is not None
    assert (found.step, invalid) == (3, [])
