"""A run directory that two commands want, that somebody moves, or that lies where locks are missing: real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support import (
    executable,
    kill_group,
    pids,
    processes_naming,
    start,
    succeed,
    tiny_recipe,
    vitgraft,
    wait_until,
    write_recipe,
)
from support_checkpoints import write
from support_writers import make_run

from vitgraft.trainer.checkpoint.read import open_checkpoint, scan, verify

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("run_directory")]
ENDLESS: dict[str, Any] = {
    "launch__processes": 1,
    "train__steps": 100_000,
    "train__checkpoint": {"every_steps": 5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "train"
    succeed("shards", "pack", "digits", "--task", "semantic", "--split", "train", "--samples", "22", "--out", out)
    return out


def endless(data: Path, folder: Path, **settings: Any) -> Path:
    return write_recipe(folder / "recipe.yaml", tiny_recipe("semantic", data, None, **ENDLESS, **settings))


def steps(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-????????")), default=0)


def test_of_two_starts_at_once_one_owns_the_run(data: Path, tmp_path: Path) -> None:
    recipe, run = endless(data, tmp_path), tmp_path / "run"
    both = [start("train", recipe, "--run-dir", run) for _ in range(2)]
    try:
        wait_until(lambda: any(process.poll() is not None for process in both))
        first, second = sorted(both, key=lambda process: process.poll() is not None)
        said = second.communicate()[1]
        assert second.returncode == 2, said
        assert f"owned by a running attempt (pid {first.pid} on {os.uname().nodename})" in said
        wait_until(lambda: steps(run) >= 5, process=first)
        assert (run / "attempt").read_text() == "1\n"
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    finally:
        for process in both:
            if process.poll() is None:
                kill_group(process)


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_run_that_is_taken_away_ends_at_once_and_leaves_what_lies_there(data: Path, tmp_path: Path, how: str) -> None:
    recipe, run = endless(data, tmp_path, launch__max_restarts=3), tmp_path / "run"
    process = start("train", recipe, "--run-dir", run)
    try:
        wait_until(lambda: steps(run) >= 5, process=process)
        run.rename(tmp_path / "elsewhere")
        if how == "removed":
            shutil.rmtree(tmp_path / "elsewhere")
        if how == "replaced":
            run.mkdir()
            (run / "attempt").write_text("1\n")
            (run / "lock").touch()
        began = time.monotonic()
        said = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            kill_group(process)
    assert process.returncode == 2, said
    assert "the run was removed or moved while it ran" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert time.monotonic() - began < 20
    wait_until(lambda: not processes_naming(run), seconds=15)
    if how == "replaced":
        assert {path.name for path in run.iterdir()} == {"attempt", "lock"}
        assert (run / "attempt").read_text() == "1\n"
    else:
        assert not run.exists()
    if how == "moved":  # it goes on where it is now
        for checkpoint in scan(tmp_path / "elsewhere"):
            verify(open_checkpoint(checkpoint[0]))


def test_logs_may_be_moved_away(data: Path, tmp_path: Path) -> None:
    """Who is started again has a log again."""
    recipe, run = endless(data, tmp_path), tmp_path / "run"
    process = start("train", recipe, "--run-dir", run)
    try:
        wait_until(lambda: steps(run) >= 5, process=process)
        (run / "logs").rename(tmp_path / "logs")
        (killed,) = pids(run, "checkpointer")
        os.kill(killed, signal.SIGKILL)
        done = steps(run)
        wait_until(lambda: steps(run) > done + 5, process=process)
        assert list((run / "logs").glob("checkpointer.*.log"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        if process.poll() is None:
            kill_group(process)


NO_LOCKS = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


def without_locks(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as if no file system had locks."""
    (tmp_path / "sitecustomize.py").write_text(NO_LOCKS)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [executable(), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_without_locks_nothing_is_written_and_everything_is_read(data: Path, tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden" / "checkpoint-1"
    run = tmp_path / "run"
    shutil.copytree(golden, run)
    for words in (["status", run], ["checkpoints", "list", run], ["checkpoints", "verify", run]):
        done = without_locks(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    exported = without_locks(tmp_path, "export", run, "--format", "safetensors", "--out", tmp_path / "all.safetensors")
    assert exported.returncode == 0, exported.stderr
    for words in (
        ["checkpoints", "prune", run],
        ["train", endless(data, tmp_path), "--run-dir", tmp_path / "new"],
    ):
        refused = without_locks(tmp_path, *words)
        assert refused.returncode == 2, refused.stderr
        assert "No locks available" in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_during_prune_leaves_whole_checkpoints(tmp_path: Path, number: signal.Signals) -> None:
    """Whatever the moment; the next prune finishes what this one began."""
    for moment in range(4):
        run, _ = make_run(tmp_path / f"run-{moment}")
        for step in range(1, 41):
            write(run, step)
        process = start("checkpoints", "prune", run, "--keep-last", "2")
        # When it owns the run, then from the first deletion on, a little later each time.
        few = 42 - 4 * moment
        wait_until((run / "lock").exists)
        wait_until(lambda run=run, few=few: len(list(run.glob("checkpoints/step-????????"))) <= few)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 75, 130, -number), said
        assert "Traceback" not in said
        for path, found in scan(run):
            verify(open_checkpoint(path))
            assert not isinstance(found, Exception)
        done = vitgraft("checkpoints", "prune", run, "--keep-last", "2")
        assert done.returncode == 0, done.stderr
        left = {path.name for path in (run / "checkpoints").iterdir()}
        assert left == {"step-00000039", "step-00000040", "latest"}


def test_a_prune_that_may_not_delete_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may delete everything")
    run, _ = make_run(tmp_path / "run")
    for step in (1, 2, 3):
        write(run, step)
    (run / "checkpoints").chmod(0o500)
    try:
        done = vitgraft("checkpoints", "prune", run, "--keep-last", "1")
    finally:
        (run / "checkpoints").chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert "cannot be deleted: Permission denied" in done.stderr
