"""Real runs whose checkpointer or ranks die: losses and last checkpoint are those of the unbroken run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from support import audited_entries, losses, pids, processes_naming, rows, start, succeed, train, wait_until


def events(run: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


def assert_like(run: Path, unbroken: Path) -> None:
    assert losses(run) == losses(unbroken)
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "buffers.safetensors"):
        last = Path("checkpoints") / "step-00000020" / name
        assert (run / last).read_bytes() == (unbroken / last).read_bytes(), name
    wait_until(lambda: not processes_naming(run), seconds=15)


def test_a_stopped_and_a_killed_checkpointer_change_no_loss(
    detection_recipe: Path, unbroken: Path, tmp_path: Path
) -> None:
    """Stopped until the next save must wait for it, then killed; copies go to a store meanwhile."""
    run, store = tmp_path / "run", tmp_path / "store"
    settings = ("train.checkpoint.writer_silence_s=2", f"train.checkpoint.copy_to=file://{store}")
    process = start("train", detection_recipe, "--run-dir", run, *(f"--set={setting}" for setting in settings))
    wait_until(lambda: rows(run) >= 1, process=process)
    (stopped,) = pids(run, "checkpointer")
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: (again := pids(run, "checkpointer")) and again != [stopped], process=process)
    wait_until(lambda: rows(run) >= 8, process=process)
    os.kill(pids(run, "checkpointer")[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_like(run, unbroken)
    reasons = [event["reason"] for event in events(run, "checkpointer_restart")]
    assert reasons == ["silent for 2 s", "ended by SIGKILL"]
    # What a save takes is accounted for at the step after it, and nowhere else.
    stalls = {row["step"]: row["checkpoint_stall_s"] for row in map(json.loads, (run / "metrics.jsonl").open())}
    assert max(stalls.values()) > 0
    assert all(stall == 0 for step, stall in stalls.items() if step % 3 != 1)
    assert " valid" in succeed("checkpoints", "verify", store / "checkpoints" / "step-00000020").stdout


@pytest.mark.soak
def test_a_rank_killed_after_the_copy_leaves_a_committed_checkpoint(
    detection_recipe: Path, unbroken: Path, tmp_path: Path
) -> None:
    """The checkpointer is stopped, so nothing is written yet: what is committed comes from the shared memory. The next
    start, which writes inline, goes on from it."""
    run = tmp_path / "run"
    process = start("train", detection_recipe, "--run-dir", run, "--set", "train.checkpoint.writer_silence_s=2")
    wait_until(lambda: rows(run) >= 1, process=process)
    os.kill(pids(run, "checkpointer")[0], signal.SIGSTOP)
    wait_until(lambda: rows(run) >= 4, process=process)
    os.kill(pids(run, "rank")[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors
    assert "was ended by SIGKILL" in errors.strip().splitlines()[-1]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"
    wait_until(lambda: not processes_naming(run), seconds=15)
    done = train(detection_recipe, run, "--set", "train.roles=inline")
    assert "attempt 2 from step-00000003" in done.stderr
    assert_like(run, unbroken)


def test_a_failed_save_is_known_at_the_next_steps_and_not_at_the_next_save(
    detection_recipe: Path, tmp_path: Path
) -> None:
    """The run is taken over by another attempt, so the save of step 10 is refused; the next one would be at the end."""
    run = tmp_path / "run"
    process = start("train", detection_recipe, "--run-dir", run, "--set", "train.checkpoint.every_steps=10")
    wait_until(lambda: rows(run) >= 1, process=process)
    (run / "attempt").write_text("7\n")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors
    expected = "checkpoint of step 10 not written: .*attempt 1 is stale, attempt 7 owns the run"
    assert re.search(expected, errors), errors
    assert 10 < rows(run) < 18


def test_kills_at_random_operations_of_real_saves(
    detection_recipe: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the checkpointer, of a rank while it writes, of everything: losses, files and entries are the unbroken
    run's. (Every operation, on a small state: tests/faults/test_kill_matrix.py.)"""
    run, kills, chance = tmp_path / "run", tmp_path / "kills", random.Random(5)
    kills.mkdir()
    monkeypatch.setenv("VITGRAFT_TEST_KILLS", str(kills))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "kill_site"))
    codes = []
    for victims in (("self", "rank"), ("self", "all"), ("self",)):
        for number, victim in enumerate(victims):
            (kills / f"{number}.{victim}.{chance.randrange(60)}").touch()
        process = start("train", detection_recipe, "--run-dir", run)
        _, errors = process.communicate(timeout=200)
        codes.append(process.returncode)
        assert not list(kills.iterdir()), errors
    assert codes == [5, -signal.SIGKILL, 0], errors
    assert [event["attempt"] for event in events(run, "start")] == [1, 2, 3]
    assert [event["reason"] for event in events(run, "checkpointer_restart")] == ["ended by SIGKILL"] * 3
    assert_like(run, unbroken)
    assert audited_entries(run) == audited_entries(unbroken)
