"""Disks that are full, read-only or slow, and writers that stop: the outcome that docs/checkpoints.md states, in its
time. Real file systems and processes; what only a simulation can bring about is in test_checkpointer.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support_checkpoints import write
from support_kills import Fork, all_ended, until
from support_writers import FakeRank, make_run, memfd

from vitgraft.configs.errors import ConfigError, TrainingError
from vitgraft.configs.load import load_recipe
from vitgraft.launch.run_dir import open_run
from vitgraft.trainer import checkpointer as role
from vitgraft.trainer.checkpoint.commit import is_committed
from vitgraft.trainer.checkpoint.handover import Answer
from vitgraft.trainer.checkpoint.layout import DataState, Normalisation
from vitgraft.trainer.checkpoint.read import newest_valid, read_weights
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState, store_frozen
from vitgraft.trainer.checkpoint.savers import HandoverSaver

WORLD, WITHIN_S = 2, 10.0
NUMBERS = 100_000
"""Of float32, over two ranks: 400 kB a checkpoint."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).umount2(str(folder).encode(), 2)


class Saving:
    """Ranks that hand over, each time to a checkpointer that ends when it is done."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.paths = [memfd()[1] for _ in range(WORLD)]
        self.ranks = [FakeRank(run, path, rank, WORLD, NUMBERS) for rank, path in enumerate(self.paths)]

    def start(self, step: int, *, delay: float = 0.0) -> Fork:
        for rank in self.ranks:
            rank.hand_over(step)
        arguments = ["--run-dir", str(self.run), "--attempt", "1", "--drain", "--buffers", *self.paths]
        return Fork(lambda: role.main(arguments), self.run, delay=delay)

    def answers(self) -> list[Answer | None]:
        return [rank.answer() for rank in self.ranks]

    def errors(self) -> list[str | None]:
        answers = self.answers()
        assert all(answer is not None for answer in answers)
        return [answer.error for answer in answers if answer is not None]


def newest(run: Path) -> int | None:
    found, invalid = newest_valid(run)
    assert invalid == []
    assert not list((run / "checkpoints").glob("*.tmp"))
    return None if found is None else found.step


def save_in_time(saving: Saving, step: int) -> list[str | None]:
    started = time.monotonic()
    fork = saving.start(step)
    with all_ended([fork]):
        assert fork.wait(WITHIN_S) == 0
    assert time.monotonic() - started < WITHIN_S
    return saving.errors()


def test_a_full_disk_costs_the_save_and_nothing_else(small_disk: Path) -> None:
    """Both ways it shows: no room to begin with, and room that others take meanwhile. With room it works again."""
    run, _ = make_run(small_disk / "run", train__checkpoint={"every_steps": 1, "keep_last": 1})
    saving = Saving(run)
    assert save_in_time(saving, 1) == [None, None]
    for error in save_in_time(saving, 2):
        assert (
            error
            == f"no space left on the disk of {run / 'checkpoints'}; free some and start again with the same command"
        )
    assert newest(run) == 1
    disk = os.statvfs(run)
    assert disk.f_bavail * disk.f_frsize > 200_000, "the half that was written is gone"
    filler = run / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 20))
    with pytest.raises(ConfigError, match=r"cannot be written: No space left on device; make room") as caught:
        open_run(run, load_recipe(str(run / "config.yaml")), "auto")
    assert caught.value.exit_code == 2
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    assert save_in_time(saving, 3) == [None, None]
    assert newest(run) == 3


def test_a_frozen_trunk_that_does_not_fit_is_told_as_a_full_disk(small_disk: Path) -> None:
    """So that no restart is tried."""
    trunk = torch.nn.Linear(500, 500).requires_grad_(False)
    with pytest.raises(TrainingError, match="frozen trunk not written: no space left on the disk") as caught:
        store_frozen(small_disk, trunk)
    assert caught.value.cause == "no_space"
    assert list((small_disk / "blobs").iterdir()) == []


def test_a_disk_that_becomes_read_only_costs_the_save_and_nothing_else(small_disk: Path) -> None:
    run, _ = make_run(small_disk / "run")
    write(run, 1)
    saving = Saving(run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert all("Read-only file system" in (error or "") for error in save_in_time(saving, 2))
    assert newest(run) == 1
    with pytest.raises(ConfigError, match="cannot be written: Read-only file system"):
        open_run(run, load_recipe(str(run / "config.yaml")), "auto")


def test_a_slow_disk_only_takes_longer(tmp_path: Path) -> None:
    """Every operation takes 50 ms longer: a rank goes on at once from its copy, and waits for the disk before it makes
    the next one."""
    run, _ = make_run(tmp_path)
    module, (_, path) = torch.nn.Linear(5, 3), memfd()
    optimizer = torch.optim.AdamW(module.parameters())
    engine = SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    facts = RunFacts(run, 1, "h", ["a"], Normalisation(mean=[0], std=[1], image_size=[8, 8]), None)
    saver = HandoverSaver(TrainerState(engine, None), facts, 100, path)
    data = DataState(fingerprint="f", seed=0, epoch=0, cursor=0)
    fork = Fork(lambda: role.main(["--run-dir", str(run), "--attempt", "1", "--buffers", path]), run, delay=0.05)
    with all_ended([fork]):
        saver.begin(1, 1, data)
        assert not is_committed(run, 1, 1), "the first copy waited for the disk"
        with torch.no_grad():
            module.weight.fill_(7.0)
        saver.begin(2, 2, data)
        first, _ = newest_valid(run)
        assert first is not None
        assert first.step == 1, "the second copy did not wait for the first commit"
        assert not (read_weights(first)["weight"] == 7.0).any()
        assert len(fork.operations) > 10
        second = saver.finish()
        assert (second.step, (read_weights(second)["weight"] == 7.0).all()) == (2, True)


def test_a_writer_stopped_and_woken_goes_on(tmp_path: Path) -> None:
    """Before the launcher's patience is over (after it: test_checkpointer.py)."""
    run, _ = make_run(tmp_path)
    saving = Saving(run)
    fork = saving.start(1, delay=0.02)
    with all_ended([fork]):
        until(lambda: len(fork.operations) > 5)
        os.kill(fork.pid, signal.SIGSTOP)
        until(fork.stopped)
        time.sleep(0.3)
        assert saving.answers() == [None, None]
        os.kill(fork.pid, signal.SIGCONT)
        assert fork.wait(WITHIN_S) == 0
    assert newest(run) == 1
