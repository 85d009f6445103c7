"""A real run's checkpoint, evaluated by the trainer's two ranks and by the evaluator."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import losses, pids, processes_naming, start, tiny_recipe, train, wait_until, write_recipe
from support_evaluator import result_of

DISTURBANCES = 20


def test_the_evaluator_finds_what_the_ranks_found(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "results")
    command = [sys.executable, "-m", "vitgraft.trainer.evaluator", "--run-dir", str(run)]
    subprocess.run(command, check=True, timeout=120)
    assert result_of(run, 20) == result_of(unbroken, 20)
    pictures = sorted((unbroken / "results" / "step-00000020").iterdir())
    assert pictures
    for picture in pictures:
        assert (run / "results" / "step-00000020" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.soak
def test_killed_and_stopped_again_and_again_it_changes_no_loss(semantic_data: Path, tmp_path: Path) -> None:
    """A run of some minutes whose evaluator is killed or stopped twenty times, and the same run without any."""
    settings = {"train__steps": 600, "train__global_batch": 8, "evaluate__every_checkpoints": 1}
    settings |= {"train__checkpoint": {"every_steps": 20, "keep_last": 2}}
    tree = tiny_recipe("semantic", semantic_data / "train", semantic_data / "val", **settings)
    followed, run = write_recipe(tmp_path / "f.yaml", tree | {"evaluator": {"threads": 1}}), tmp_path / "followed"
    process = start("train", followed, "--run-dir", run)
    for number in range(DISTURBANCES):
        wait_until(lambda: pids(run, "evaluator"), process=process)
        victim = pids(run, "evaluator")[0]
        time.sleep(1 + number % 3)
        if number % 4 == 3:
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda gone=victim: gone not in pids(run, "evaluator"), process=process)
        else:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(1)
            os.kill(victim, signal.SIGCONT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    wait_until(lambda: not processes_naming(run), seconds=15)
    assert result_of(run, 600)["samples"] == 6

    alone = tmp_path / "alone"
    quiet = write_recipe(tmp_path / "q.yaml", tree | {"evaluate": {"every_checkpoints": 1000}})
    train(quiet, alone, timeout=900)
    assert losses(run) == losses(alone)
    last = Path("checkpoints") / "step-00000600"
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "buffers.safetensors"):
        assert (run / last / name).read_bytes() == (alone / last / name).read_bytes(), name
