"""The checkpointer under fire: killed, stopped, out of space, too slow; with ranks that only hand over."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support_checkpoints import write
from support_kills import Fork
from support_writers import FakeRank, Keeping, Told, checkpointer, make_ranks, make_run, memfd, poll_until_idle

from vitgraft.configs.errors import CheckpointError, TrainingError
from vitgraft.trainer import checkpointer as role_module
from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.read import VectorReader, newest_valid, open_checkpoint, verify
from vitgraft.trainer.signals import OF_THE_JOB

LARGE = 24 << 20
"""Numbers of a state that takes a while to write and hash."""


def assert_valid(run: Path, step: int, numel: int = 10) -> None:
    """The newest valid checkpoint is of this step, has every value, and nothing half-written lies about."""
    found, invalid = newest_valid(run)
    assert found is not None
    assert (found.step, invalid) == (step, [])
    values = VectorReader(found).read(layout.MASTER, "w", 0, numel)
    assert np.array_equal(values, (np.arange(numel, dtype=np.float32) % 1000) * step)
    names = {layout.MANIFEST, *layout.expected_files(found.manifest.world)}
    assert {path.name for path in found.path.iterdir()} == names
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert (run / "checkpoints" / layout.POINTER).read_text().strip() == found.path.name


@pytest.mark.parametrize("world", [1, 3])
def test_what_all_ranks_hand_over_is_committed_and_answered(tmp_path: Path, world: int) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, world)
    role = checkpointer(run, recipe, paths)
    assert not role.poll()
    for step in (3, 6):
        for rank in ranks:
            rank.hand_over(step)
        poll_until_idle(role)
        assert [rank.answer() for rank in ranks] == [role.lanes[i].answered for i in range(world)]
        assert all(answer is not None and answer.error is None for answer in map(FakeRank.answer, ranks))
        assert_valid(run, step)
    told = [(m["label"], m["done"], m["total"]) for m in role.reporter.messages]  # type: ignore[attr-defined]
    assert told == [("commit", 3, 100), ("commit", 6, 100)]


def test_nothing_is_committed_before_all_ranks_have_handed_over(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 2)
    role = checkpointer(run, recipe, paths)
    ranks[0].hand_over(3)
    for _ in range(50):
        assert role.poll()
        time.sleep(0.002)
    assert newest_valid(run) == (None, [])
    assert ranks[0].answer() is None
    ranks[1].hand_over(3)
    poll_until_idle(role)
    assert_valid(run, 3)


def test_a_successor_writes_only_what_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 2)
    first = checkpointer(run, recipe, paths)
    ranks[0].hand_over(3)
    folder = commit.temporary_folder(run, 3, 1)
    while not (folder / layout.record_name(0)).exists():
        first.poll()
    ranks[1].hand_over(3)
    written: list[str] = []
    real = role_module.write_hashed

    def counted(path: Path, blocks: list[memoryview]) -> layout.FileRecord:
        written.append(path.name)
        return real(path, blocks)

    monkeypatch.setattr(role_module, "write_hashed", counted)
    poll_until_idle(checkpointer(run, recipe, paths))
    assert written == ["rank-00001.safetensors"]
    assert_valid(run, 3)


class Killed(BaseException):
    """Stands for SIGKILL at a system call."""


CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """Arm the k-th file operation of this process, and all after it; ``None``: only count. Returns the operations."""

    def arm(number: int | None) -> list[str]:
        monkeypatch.undo()
        done: list[str] = []

        def wrap(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                # The buffers are opened by path too; only the disk counts.
                if str(arguments[0]).startswith("/proc/"):
                    return real(*arguments, **options)
                if number is not None and len(done) >= number:
                    raise Killed
                done.append(name)
                return real(*arguments, **options)

            return call

        for name in CALLS:
            monkeypatch.setattr(os, name, wrap(name))
        return done

    return arm


def test_killed_at_any_file_operation_a_successor_finishes(
    tmp_path: Path, die_at: Callable[[int | None], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention included: two checkpoints are there, the third is committed, one goes. (The kill of real processes at
    every operation is test_kill_matrix's.)"""
    drain = threading.Event()
    drain.set()

    def save(folder: Path, number: int | None) -> tuple[Path, list[str]]:
        monkeypatch.undo()
        run, recipe = make_run(folder, train__checkpoint={"every_steps": 1, "keep_last": 2})
        write(run, 1)
        write(run, 2)
        ranks, paths = make_ranks(run, 2)
        for rank in ranks:
            rank.hand_over(3)
        role = checkpointer(run, recipe, paths)
        done = die_at(number)
        if number is None:
            poll_until_idle(role)
        else:
            with pytest.raises(Killed):
                poll_until_idle(role)
        monkeypatch.undo()
        if number is not None:
            found, invalid = newest_valid(run)
            assert found is not None
            assert found.step in (2, 3)
            assert invalid == []
            checkpointer(run, recipe, paths).serve(drain)
        assert all(answer is not None and answer.error is None for answer in map(FakeRank.answer, ranks))
        assert_valid(run, 3)
        assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-00000002", "step-00000003"}
        return run, done

    _, operations = save(tmp_path / "whole", None)
    assert {"write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir"} <= set(operations)
    for number in range(len(operations)):
        save(tmp_path / f"killed-{number}", number)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_is_answered_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    run, recipe = make_run(tmp_path)
    write(run, 1)
    ranks, paths = make_ranks(run, 2)
    role = checkpointer(run, recipe, paths)

    def refuse(path: Path, blocks: list[memoryview]) -> layout.FileRecord:
        path.write_bytes(b"half")
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(role_module, "write_hashed", refuse)
    ranks[1].hand_over(2)
    role.poll()
    ranks[0].hand_over(2)
    poll_until_idle(role)
    for rank in ranks:
        answer = rank.answer()
        assert answer is not None
        assert ("no space left on the disk" if code == errno.ENOSPC else os.strerror(code)) in (answer.error or "")
    assert not list((run / "checkpoints").glob("*.tmp"))
    found, _ = newest_valid(run)
    assert found is not None
    assert found.step == 1


def test_a_disk_without_room_is_not_filled_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics and logs go to the same disk."""
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 2, 1000)
    size = sum(part.bytes for part in ranks[1].parts)
    disk = SimpleNamespace(f_bavail=0, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    for step, room in ((1, 10 * size), (2, 2 * size - 1)):
        disk.f_bavail = room
        for rank in ranks:
            rank.hand_over(step)
        poll_until_idle(checkpointer(run, recipe, paths))
        answers = [answer.error or "" for answer in map(FakeRank.answer, ranks) if answer is not None]
        assert ["no space left" in error for error in answers] == [step == 2] * 2
    assert_valid(run, 1, 1000)


def test_what_a_killed_writer_left_is_not_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced, so its room is there."""
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 1, 1000)
    folder = commit.temporary_folder(run, 3, 1)
    folder.mkdir()
    (folder / layout.shard_name(0)).write_bytes(b"x" * 3000)
    room = sum(part.bytes for part in ranks[0].parts) - 3000
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=room, f_frsize=1))
    ranks[0].hand_over(3)
    poll_until_idle(checkpointer(run, recipe, paths))
    answer = ranks[0].answer()
    assert answer is not None
    assert answer.error is None
    assert_valid(run, 3, 1000)


def test_a_beat_says_what_is_outstanding_and_comes_several_times_within_the_silence_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = make_run(tmp_path, train__checkpoint={"writer_silence_s": 2})
    ranks, paths = make_ranks(run, 2)
    role = checkpointer(run, recipe, paths)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        raise Killed

    def beat() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", sleep)
            with pytest.raises(Killed):
                role_module._beat(role)
        assert isinstance(role.reporter, Told)
        return role.reporter.messages[-1]["outstanding"]

    assert beat() is None
    ranks[0].hand_over(3)
    assert role.poll()
    assert beat() == 3
    ranks[1].hand_over(3)
    poll_until_idle(role)
    assert beat() is None
    assert pauses == [0.4] * 3


@pytest.mark.parametrize("follows", [False, True])
def test_the_host_of_rank_0_alone_deletes_and_copies(tmp_path: Path, follows: bool) -> None:
    store = tmp_path / "store"
    settings = {"every_steps": 1, "keep_last": 1, "copy_to": f"file://{store}"}
    run, _ = make_run(tmp_path / "run", train__checkpoint=settings)
    for step in (1, 2):
        write(run, step)
    arguments = ["--run-dir", str(run), "--attempt", "1", "--drain", "--buffers", memfd()[1]]
    fork = Fork(lambda: role_module.main([*arguments, *(["--follow"] if follows else [])]), run)
    assert fork.wait() == 0
    assert len(list((run / "checkpoints").glob("step-*"))) == (2 if follows else 1)
    assert (newest_valid(store)[0] is None) == follows


def test_a_failure_half_answered_is_the_successors_answer_too(tmp_path: Path) -> None:
    """The checkpointer died between telling one rank and telling the other: they must hear the same."""
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 2)
    first = checkpointer(run, recipe, paths)
    ranks[0].hand_over(3)
    ranks[1].hand_over(3)
    assert first.lanes[0].look()
    first.lanes[0].answer("the disk is on fire")
    poll_until_idle(checkpointer(run, recipe, paths))
    answer = ranks[1].answer()
    assert answer is not None
    assert answer.error == "the disk is on fire"
    assert not list((run / "checkpoints").iterdir())


@pytest.mark.parametrize("step", [6, 12], ids=["same length", "other length"])
def test_killed_between_the_two_halves_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Text and number of the answer do not belong together: the successor answers again."""
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 1)
    role = checkpointer(run, recipe, paths)
    ranks[0].hand_over(3)
    poll_until_idle(role)
    ranks[0].hand_over(step)
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) == 16:  # the number, which comes last
            raise Killed
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(Killed):
        poll_until_idle(role)
    monkeypatch.undo()
    assert ranks[0].answer() is None
    poll_until_idle(checkpointer(run, recipe, paths))
    answer = ranks[0].answer()
    assert answer is not None
    assert (answer.sequence, answer.step, answer.error) == (2, step, None)
    assert_valid(run, step)


def test_a_stale_attempt_cannot_commit(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 1)
    (run / commit.ATTEMPT).write_text("2\n")
    ranks[0].hand_over(3)
    poll_until_idle(checkpointer(run, recipe, paths))
    answer = ranks[0].answer()
    assert answer is not None
    assert "attempt 1 is stale, attempt 2 owns the run" in (answer.error or "")
    assert newest_valid(run) == (None, [])
    assert not list((run / "checkpoints").glob("*.tmp"))
    with pytest.raises(CheckpointError, match="attempt 1 is stale"):
        write(run, 4)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    before = (write(run, 3) / layout.MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write(run, 3)
    assert (commit.final_folder(run, 3) / layout.MANIFEST).read_bytes() == before


def test_what_another_attempt_left_is_written_anew(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 1)
    folder = commit.temporary_folder(run, 3, 1)
    folder.mkdir()
    (folder / layout.shard_name(0)).write_bytes(b"x" * ranks[0].parts[0].bytes)
    old = [layout.FileRecord(path=layout.shard_name(0), bytes=ranks[0].parts[0].bytes, sha256="0" * 64)]
    commit.write_record(folder, layout.RankRecord(attempt=0, step=3, world=1, rank=0, files=old))
    ranks[0].hand_over(3)
    poll_until_idle(checkpointer(run, recipe, paths))
    assert_valid(run, 3)


def test_two_hosts_need_nothing_but_the_run_directory(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 3)
    here, there = checkpointer(run, recipe, paths[:1]), checkpointer(run, recipe, paths[1:])
    for rank in ranks:
        rank.hand_over(3)
    while there.poll() | here.poll():
        time.sleep(0.002)
    assert_valid(run, 3)
    assert all(answer is not None and answer.error is None for answer in map(FakeRank.answer, ranks))


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_on_one_host_is_known_on_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 2)
    roles = [checkpointer(run, recipe, [path]) for path in paths]
    real = role_module.write_hashed

    def refuse(path: Path, blocks: list[memoryview]) -> layout.FileRecord:
        if path.name == layout.shard_name(broken):
            raise OSError(errno.EIO, "it smells of smoke")
        return real(path, blocks)

    monkeypatch.setattr(role_module, "write_hashed", refuse)
    for rank in ranks:
        rank.hand_over(3)
    while roles[1 - broken].poll() | roles[broken].poll():
        time.sleep(0.002)
    for rank in ranks:
        answer = rank.answer()
        assert answer is not None
        assert answer.error is not None
    own = ranks[broken].answer()
    assert own is not None
    assert "it smells of smoke" in (own.error or "")
    assert newest_valid(run) == (None, [])


def test_draining_drops_what_not_all_ranks_handed_over(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 2)
    for rank in ranks:
        rank.hand_over(3)
    drain = threading.Event()
    drain.set()
    role = checkpointer(run, recipe, paths)
    role.serve(drain)
    assert_valid(run, 3)
    ranks[1].hand_over(6)
    role = checkpointer(run, recipe, paths)
    role.serve(drain)
    assert isinstance(role.reporter, Told)
    assert role.reporter.texts() == ["checkpoint of step 6 not written: not all ranks handed their part over"]
    assert_valid(run, 3)


@pytest.mark.parametrize(("seconds", "given_up"), [(20, False), (40, True)])
def test_what_another_host_writes_late_is_waited_for(tmp_path: Path, seconds: float, given_up: bool) -> None:
    """But not for ever: one that died writes nothing, and the next attempt waits."""
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 2)
    role = checkpointer(run, recipe, paths[:1])
    role.draining = time.monotonic() - seconds
    other = checkpointer(run, recipe, paths[1:])
    ranks[0].hand_over(3)
    role.poll()
    written = role.lanes[0].written
    assert written is not None
    assert written.result() is None
    role.poll()
    answer = ranks[0].answer()
    if given_up:
        assert answer is not None
        assert answer.error == "not all ranks handed their part over"
        return
    assert answer is None
    ranks[1].hand_over(3)
    deadline = time.monotonic() + 20
    while other.poll() | role.poll():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert_valid(run, 3)


# From here on with real processes.


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Keeping]:
    run, recipe = make_run(tmp_path)
    with Keeping(run, recipe, 2, LARGE, silence=2.0) as keeping:
        keeping.hand_over(1)
        keeping.until(lambda: all(keeping.answers()))
        yield keeping


def being_written(keeping: Keeping, step: int) -> bool:
    return (commit.temporary_folder(keeping.run, step, 1) / layout.shard_name(0)).exists()


def test_killed_in_mid_write_it_is_started_again_and_commits_from_memory(large: Keeping) -> None:
    large.hand_over(2)
    large.until(lambda: being_written(large, 2))
    os.kill(large.pid(), signal.SIGKILL)
    assert large.answers() == [None, None]
    large.until(lambda: all(large.answers()))
    assert [(event["event"], event["reason"]) for event in large.events()] == [
        ("checkpointer_restart", "ended by SIGKILL")
    ]
    assert_valid(large.run, 2, LARGE)


def test_stopped_it_is_replaced_after_the_silence_bound(large: Keeping) -> None:
    large.hand_over(2)
    large.until(lambda: being_written(large, 2))
    stopped, started = large.pid(), time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    large.until(lambda: all(large.answers()))
    assert 1.5 < time.monotonic() - started < 20
    assert large.pid() != stopped
    assert [event["reason"] for event in large.events()] == ["silent for 2 s"]
    assert_valid(large.run, 2, LARGE)


def test_ranks_that_die_after_the_copy_leave_a_checkpoint(large: Keeping) -> None:
    """The launcher, which holds the buffers, asks the checkpointer to finish; killed meanwhile, its successor does."""
    large.hand_over(2)
    large.ranks.clear()
    large.until(lambda: being_written(large, 2))
    os.kill(large.pid(), signal.SIGKILL)
    large.drain()
    assert_valid(large.run, 2, LARGE)
    assert large.keeper.pid is None


@pytest.mark.parametrize("drop_copy", [False, True])
def test_asked_to_finish_before_it_is_up_it_finishes(tmp_path: Path, drop_copy: bool) -> None:
    run, recipe = make_run(tmp_path)
    with Keeping(run, recipe, 2) as keeping:
        keeping.hand_over(1)
        keeping.keeper.drain(drop_copy=drop_copy)
        keeping.drain()
        assert keeping.events() == []
        assert_valid(run, 1)


def test_signals_to_every_process_of_a_job_leave_it_to_the_launcher(tmp_path: Path) -> None:
    """A scheduler's SIGTERM makes the ranks save once more: it must be there for that, from its first moment on."""
    run, recipe = make_run(tmp_path)
    with Keeping(run, recipe, 2) as keeping:
        first = keeping.pid()
        for step in (1, 2):
            for number in OF_THE_JOB:
                os.kill(first, number)
            time.sleep(0.1)
            keeping.hand_over(step)
            keeping.until(lambda: all(keeping.answers()))
        assert (keeping.pid(), keeping.events()) == (first, [])
        assert_valid(run, 2)


def test_one_death_after_the_other_ends_the_run(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path)
    (run / "config.yaml").write_text("nonsense: true")
    with Keeping(run, recipe, 1) as keeping, pytest.raises(TrainingError, match="after 3 restarts without a commit"):
        keeping.until(lambda: False)
    assert len(keeping.events()) == 3
    assert "model: missing" in keeping.keeper.log_path().read_text()


def test_a_slow_writer_holds_the_next_save_up_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One save is outstanding at most, and what the writer reads never changes under it."""
    run, recipe = make_run(tmp_path)
    ranks, paths = make_ranks(run, 1)
    role = checkpointer(run, recipe, paths)
    real = role_module.write_hashed

    def slow(path: Path, blocks: list[memoryview]) -> layout.FileRecord:
        time.sleep(0.3)
        return real(path, blocks)

    monkeypatch.setattr(role_module, "write_hashed", slow)
    stop = threading.Event()
    thread = threading.Thread(target=role.serve, args=(stop,))
    thread.start()
    try:
        started = time.monotonic()
        ranks[0].hand_over(3)
        assert time.monotonic() - started < 0.2
        assert ranks[0].buffer.wait(1).error is None
        assert time.monotonic() - started > 0.3
        ranks[0].hand_over(6)
        ranks[0].buffer.wait(2)
    finally:
        stop.set()
        thread.join()
    for step in (3, 6):
        verify(open_checkpoint(commit.final_folder(run, step)))
    assert_valid(run, 6)
