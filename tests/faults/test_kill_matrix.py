"""A save is killed by SIGKILL at each of its operations on the disk: of the checkpointer, of one rank, of all
processes, handed over and inline. Real processes, real files, small states; what a new start finds is the old
checkpoint or the new one, byte for byte, and nothing else."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support_checkpoints import manifest_of, write
from support_kills import Fork, all_ended, until
from support_writers import FakeRank, Told, make_run, memfd

from vitgraft.configs.load import load_recipe
from vitgraft.launch.run_dir import open_run
from vitgraft.trainer import checkpointer as role
from vitgraft.trainer import comm
from vitgraft.trainer.checkpoint import layout, retention
from vitgraft.trainer.checkpoint.read import newest_valid
from vitgraft.trainer.checkpoint.save import RunFacts, store_frozen
from vitgraft.trainer.checkpoint.savers import InlineSaver

WORLD = 2
OLD, NEW = 2, 3
KINDS = {"open", "write", "half a write", "fsync", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
FROZEN = SimpleNamespace(
    named_parameters=lambda: [("trunk", torch.nn.Parameter(torch.arange(7.0), requires_grad=False))]
)

# The processes of a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A started run with two checkpoints, both of which go when the next is there."""
    run, recipe = make_run(
        tmp_path_factory.mktemp("prepared") / "run", train__checkpoint={"every_steps": 1, "keep_last": 1}
    )
    open_run(run, recipe, "auto").close()
    for step in (OLD - 1, OLD):
        write(run, step)
    return run


def rank_hands_over(run: Path, path: str, rank: int, given: mmap.mmap, wait: bool) -> int:
    fake = FakeRank(run, path, rank, WORLD)
    fake.hand_over(NEW)
    given[rank] = 1
    while wait and fake.answer() is None:
        time.sleep(0.001)
    return 0


def rank_saves_inline(run: Path, rank: int, peer: Connection, attempt: int = 1) -> int:
    """A rank of ``train.roles: inline``, its frozen trunk included; a pipe stands for the process group."""

    def gather(value: Any) -> list[Any]:
        peer.send(value)
        other = peer.recv()
        return [value, other] if rank == 0 else [other, value]

    comm.rank, comm.world, comm.gather = lambda: rank, lambda: WORLD, gather  # type: ignore[assignment]
    comm.from_first = lambda value: gather(value)[0]  # type: ignore[assignment]
    comm.barrier = lambda: gather(None)  # type: ignore[assignment, return-value]
    frozen = gather(store_frozen(run, FROZEN) if rank == 0 else None)[0]  # type: ignore[arg-type]
    start, stop = layout.even_range(10, rank, WORLD)
    values = torch.from_numpy((np.arange(start, stop, dtype=np.float32) % 1000) * NEW)

    def manifest(facts: RunFacts, step: int, *_: Any) -> layout.Manifest:
        draft = {"parameters": {"w": [10]}, "frozen": facts.frozen}
        return manifest_of(run, step, [], WORLD, facts.attempt).model_copy(update=draft)

    state = SimpleNamespace(
        tensors=lambda: {layout.range_key(layout.MASTER, "w", start): values},
        buffers=lambda: {"steps": torch.tensor(NEW)},
        manifest=manifest,
    )
    facts = RunFacts(run, attempt, "h", ["a"], layout.Normalisation(mean=[0], std=[1], image_size=[8, 8]), frozen)
    saver = InlineSaver(load_recipe(str(run / "config.yaml")), state, facts, 100, Told())  # type: ignore[arg-type]
    saver.begin(NEW, NEW, layout.DataState(fingerprint="f", seed=0, epoch=0, cursor=NEW))
    saver.tidy()
    return 0


def checkpointer_serves(run: Path, paths: list[str]) -> int:
    role.POLL_S = 0.001
    return role.main(["--run-dir", str(run), "--attempt", "1", "--drain", "--buffers", *paths])


@dataclass
class Launcher:
    """Starts the processes of one attempt of a copy of the prepared run; holds the buffers, as the launcher does."""

    run: Path
    forks: list[Fork] = field(default_factory=list)
    given: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, WORLD))
    buffers: list[tuple[int, str]] = field(default_factory=lambda: [memfd() for _ in range(WORLD)])

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.buffers]

    def start(self, job: Callable[[], int], at: int | None = None, **options: Any) -> Fork:
        group = next((fork.pid for fork in self.forks if fork.code is None), None)
        self.forks.append(Fork(job, self.run, at, group=group, **options))
        return self.forks[-1]

    def ranks(self, victim: int | None = None, at: int | None = None, *, wait: bool = True) -> list[Fork]:
        """Ranks that hand over; ``wait``: for the answer."""

        def job(rank: int) -> Callable[[], int]:
            return lambda: rank_hands_over(self.run, self.paths[rank], rank, self.given, wait)

        return [self.start(job(rank), at if rank == victim else None) for rank in range(WORLD)]

    def inline(self, victim: int | None = None, at: int | None = None, *, whole_group: bool = False) -> list[Fork]:
        """Ranks that save inline."""
        ends = Pipe()

        def job(rank: int) -> Callable[[], int]:
            def inner() -> int:
                ends[1 - rank].close()  # so that a peer's death is seen
                until(lambda: self.given[0])
                return rank_saves_inline(self.run, rank, ends[rank])

            return inner

        forks = [
            self.start(job(rank), at if rank == victim else None, whole_group=whole_group) for rank in range(WORLD)
        ]
        for end in ends:
            end.close()
        self.given[0] = 1  # nobody is killed before all are there to be
        return forks

    def checkpointer(self, at: int | None = None, *, whole_group: bool = False, **options: Any) -> Fork:
        """One that finishes what is handed over, and ends."""
        job = lambda: checkpointer_serves(self.run, self.paths)  # noqa: E731
        return self.start(job, at, whole_group=whole_group, **options)


@contextmanager
def launched(prepared: Path, folder: Path) -> Iterator[Launcher]:
    shutil.rmtree(folder, ignore_errors=True)
    launcher = Launcher(Path(shutil.copytree(prepared, folder / "run")))
    try:
        with all_ended(launcher.forks):
            yield launcher
    finally:
        for descriptor, _ in launcher.buffers:
            os.close(descriptor)


# What must hold behind every kill --------------------------------------------------------------------------------


def content(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


Expected = dict[int, dict[str, bytes]]


def whole(prepared: Path, folder: Path, save: Callable[[Launcher], Fork]) -> tuple[Expected, list[str]]:
    """The old and the new checkpoint of a save that nothing disturbs, and its operations."""
    with launched(prepared, folder) as launcher:
        operations = save(launcher).operations
        assert [fork.wait() for fork in launcher.forks] == [0] * len(launcher.forks)
        found, invalid = newest_valid(launcher.run)
        assert found is not None
        assert (found.step, invalid) == (NEW, [])
        assert [path.name for path in (launcher.run / "checkpoints").glob("step-*")] == [layout.step_name(NEW)]
        old = content(prepared / "checkpoints" / layout.step_name(OLD))
        return {OLD: old, NEW: content(found.path)}, operations


def assert_old_or_new(run: Path, expected: Expected) -> int:
    """The newest valid checkpoint is one of the two, byte for byte, and nothing that claims to be one is broken."""
    found, invalid = newest_valid(run)
    assert invalid == []
    assert found is not None, "no checkpoint is left"
    assert content(found.path) == expected[found.step]
    return found.step


def assert_a_new_start_goes_on(run: Path, expected: Expected) -> int:
    """It finds one of the two, sweeps, and saves the next step over whatever lay there; retention works again."""
    step = assert_old_or_new(run, expected)
    recipe = load_recipe(str(run / "config.yaml"))
    handle = open_run(run, recipe, "auto")
    handle.close()
    assert handle.notes == []
    assert handle.resume is not None
    assert handle.resume.step == step
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert content(handle.resume.path) == expected[step]
    following = write(run, step + 1, attempt=handle.attempt)
    retention.retain(run, recipe, step + 1)
    assert (run / "checkpoints" / layout.POINTER).read_text() == following.name + "\n"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {following.name, layout.POINTER}
    found, invalid = newest_valid(run)
    assert found is not None
    assert (found.step, invalid) == (step + 1, [])
    return step


# The matrix ------------------------------------------------------------------------------------------------------


def handed_over(launcher: Launcher, at: int | None = None, *, wait: bool = True, whole_group: bool = False) -> Fork:
    launcher.ranks(wait=wait)
    until(lambda: all(launcher.given[:]))
    fork = launcher.checkpointer(at, whole_group=whole_group)
    fork.wait()
    return fork


def test_the_checkpointer_killed_at_every_operation(prepared: Path, tmp_path: Path) -> None:
    """A new start finds the old or the new one; a successor, itself killed again, commits the new one from memory."""
    expected, operations = whole(prepared, tmp_path / "whole", handed_over)
    assert set(operations) >= KINDS
    chance, seen = random.Random(5), set()
    for at in range(len(operations)):
        with launched(prepared, tmp_path / "killed") as launcher:
            assert handed_over(launcher, at).code == -signal.SIGKILL, at
            seen.add(assert_old_or_new(launcher.run, expected))
            copy = Path(shutil.copytree(launcher.run, tmp_path / "killed" / "copy" / "run"))
            assert_a_new_start_goes_on(copy, expected)
            launcher.checkpointer(chance.randrange(len(operations))).wait()
            assert_old_or_new(launcher.run, expected)
            assert launcher.checkpointer().wait() == 0
            assert [rank.wait() for rank in launcher.forks[:WORLD]] == [0] * WORLD
            assert assert_a_new_start_goes_on(launcher.run, expected) == NEW
    assert seen == {OLD, NEW}


def test_all_processes_killed_at_every_operation(prepared: Path, tmp_path: Path) -> None:
    expected, operations = whole(prepared, tmp_path / "whole", handed_over)
    seen = set()
    for at in range(len(operations)):
        with launched(prepared, tmp_path / "killed") as launcher:
            handed_over(launcher, at, whole_group=True)
            codes = [fork.wait() for fork in launcher.forks]
            assert codes[-1] == -signal.SIGKILL
            # Late in the save a rank has its answer and has ended by itself.
            assert set(codes) <= {0, -signal.SIGKILL}
            seen.add(assert_a_new_start_goes_on(launcher.run, expected))
    assert seen == {OLD, NEW}


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_rank_killed_at_every_operation_of_the_hand_over(prepared: Path, tmp_path: Path, victim: int) -> None:
    """What all ranks handed over is committed by the checkpointer that outlives them; less is dropped."""
    expected, _ = whole(prepared, tmp_path / "whole", handed_over)
    with launched(prepared, tmp_path / "counted") as launcher:
        forks = launcher.ranks(wait=False)
        assert [fork.wait() for fork in forks] == [0] * WORLD
        operations = forks[victim].operations
    assert "half a pwrite" in operations
    for at in range(len(operations) + 1):
        with launched(prepared, tmp_path / "killed") as launcher:
            forks = launcher.ranks(victim, at)
            if at < len(operations):
                assert forks[victim].wait() == -signal.SIGKILL
            given = WORLD - (at < len(operations))
            until(lambda launcher=launcher, given=given: sum(launcher.given[:]) == given)
            for fork in forks:
                fork.kill()
            assert launcher.checkpointer().wait() == 0, operations[at]
            assert assert_a_new_start_goes_on(launcher.run, expected) == (OLD if at < len(operations) else NEW)


def inline(launcher: Launcher) -> Fork:
    forks = launcher.inline()
    assert [fork.wait() for fork in forks] == [0] * WORLD
    return forks[0]


@pytest.mark.parametrize("who", ["rank 0", "rank 1", "all"])
def test_inline_killed_at_every_operation(prepared: Path, tmp_path: Path, who: str) -> None:
    """The frozen trunk's blob is written too, by rank 0, before the first save."""
    expected, operations = whole(prepared, tmp_path / "whole", inline)
    victim = 1 if who == "rank 1" else 0
    if victim == 0:
        assert set(operations) >= KINDS
    else:
        with launched(prepared, tmp_path / "counted") as launcher:
            inline(launcher)
            operations = launcher.forks[1].operations
    seen = set()
    for at in range(len(operations)):
        with launched(prepared, tmp_path / "killed") as launcher:
            forks = launcher.inline(victim, at, whole_group=who == "all")
            assert forks[victim].wait() == -signal.SIGKILL
            if who == "all":
                assert forks[1].wait() in (0, -signal.SIGKILL)
            else:  # it has lost the other rank, or had nothing more to do with it
                assert forks[1 - victim].wait() in (0, 99)
            seen.add(assert_a_new_start_goes_on(launcher.run, expected))
    assert seen == ({OLD} if victim else {OLD, NEW})


def start_of_a_run(folder: Path, at: int | None = None) -> list[Fork]:
    """Both ranks of an inline start, rank 0 the launcher too; with a checkpoint there is nothing left to do."""
    ends, forks = Pipe(), list[Fork]()

    def first() -> int:
        ends[1].close()
        handle = open_run(folder, load_recipe(str(folder.parent / "recipe.yaml")), "auto")
        ends[0].send(None if handle.resume is not None else handle.attempt)
        return 0 if handle.resume is not None else rank_saves_inline(folder, 0, ends[0], handle.attempt)

    def second() -> int:
        ends[0].close()
        attempt = ends[1].recv()
        return 0 if attempt is None else rank_saves_inline(folder, 1, ends[1], attempt)

    for job, armed in ((first, at), (second, None)):
        forks.append(Fork(job, folder, armed))
    for end in ends:
        end.close()
    with all_ended(forks):
        for fork in forks:
            fork.wait()
    return forks


def test_a_first_start_killed_at_every_operation_leaves_nothing_that_stops_the_next(tmp_path: Path) -> None:
    """No checkpoint is there yet: recipe, attempt, blob and first save; the next start begins or goes on."""
    run, _ = make_run(tmp_path / "whole")
    (run / "config.yaml").rename(tmp_path / "recipe.yaml")
    forks = start_of_a_run(run)
    assert [fork.code for fork in forks] == [0, 0]
    found, _ = newest_valid(run)
    assert found is not None
    kinds, seen = Counter(forks[0].operations), set()
    assert kinds["os.mkdir"] >= 2
    for at in range(len(forks[0].operations)):
        copy = tmp_path / "killed"
        shutil.rmtree(copy, ignore_errors=True)
        assert start_of_a_run(copy, at)[0].code == -signal.SIGKILL
        before, invalid = newest_valid(copy)
        assert invalid == []
        seen.add(before is not None)
        assert [fork.code for fork in start_of_a_run(copy)] == [0, 0]
        after, invalid = newest_valid(copy)
        assert after is not None
        assert invalid == []
        assert {name: data for name, data in content(after.path).items() if name != layout.MANIFEST} == {
            name: data for name, data in content(found.path).items() if name != layout.MANIFEST
        }
        assert not list((copy / "checkpoints").glob("*.tmp"))
        assert not list((copy / "blobs").glob("*.tmp"))
    assert seen == {False, True}


def test_the_count_counts(tmp_path: Path) -> None:
    """The instrument itself: a write that is killed in the middle is half there."""
    path = tmp_path / "file"

    def job() -> int:
        path.write_text("abcdefgh")
        return 0

    fork = Fork(job, tmp_path)
    assert fork.wait() == 0
    assert fork.operations == ["open", "write", "half a write"]
    sizes = []
    for at in range(3):
        path.unlink(missing_ok=True)
        assert Fork(job, tmp_path, at).wait() == -signal.SIGKILL
        sizes.append(path.stat().st_size if path.exists() else None)
    assert sizes == [None, 0, 4]
