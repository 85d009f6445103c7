"""Exact resume: killed with SIGKILL at random moments, a run's losses are those of an unbroken one, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support import (
    audited_entries,
    history,
    kill_group,
    losses,
    processes_naming,
    rows,
    start,
    succeed,
    train,
    wait_until,
)


def kill_at_random(recipe: Path, run: Path, kills: int, chance: random.Random) -> None:
    """Start, kill the whole group somewhere in the next steps (in mid-step, in mid-commit), and so on; then finish."""
    for _ in range(kills):
        before = rows(run)
        process = start("train", recipe, "--run-dir", run)
        wait_until(lambda before=before: rows(run) >= before + 4, process=process)
        time.sleep(chance.uniform(0, 0.3))
        kill_group(process)
    train(recipe, run)


def test_three_kills_change_nothing(detection_recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "broken"
    kill_at_random(detection_recipe, run, 3, random.Random(5))
    assert losses(run) == losses(unbroken)
    ours, theirs = history(run), history(unbroken)
    for step in theirs:
        for key in ("grad_norm", "lr", "samples", "epoch", "losses"):
            assert ours[step][key] == theirs[step][key], (step, key)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    starts = [event for event in events if event["event"] == "start"]
    assert [event["attempt"] for event in starts] == [1, 2, 3, 4]
    assert any(event["resume"] for event in starts[1:]), "no attempt went on from a checkpoint"
    # All state, not only what the loss shows: weights, optimizer, average, buffers.
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "buffers.safetensors"):
        mine = load_file(run / "checkpoints" / "step-00000020" / name)
        reference = load_file(unbroken / "checkpoints" / "step-00000020" / name)
        assert mine.keys() == reference.keys()
        assert all((mine[key] == reference[key]).all() for key in mine), name
    wait_until(lambda: not processes_naming(run), seconds=15)


EDGES = (5, 6)
"""Of eight steps: before the short last batch of an epoch (2 samples of 4), and on the edge of the epoch; with two
micro-steps each, they are edges of the accumulation too."""


def test_successive_resumes_on_every_kind_of_edge(detection_recipe: Path, tmp_path: Path) -> None:
    """Each resume goes on from a checkpoint that the one before has written, and gives the unbroken run again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = [
        "train.steps=8",
        "train.accumulation=2",
        "train.checkpoint.every_steps=1",
        "train.checkpoint.keep_last=9",
    ]
    settings += ["data.val=null"]
    options = [f"--set={setting}" for setting in settings]
    train(detection_recipe, whole, *options)
    shutil.copytree(whole, run)
    for edge in EDGES:
        train(detection_recipe, run, *options, "--resume", str(run / "checkpoints" / f"step-{edge:08d}"))
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [(event["attempt"], event["resume"]) for event in starts] == [(1, None), (2, 5), (3, 6)]
    assert losses(run) == losses(whole)
    assert [history(run)[step]["attempt"] for step in range(1, 9)] == [1, 1, 1, 1, 1, 2, 3, 3]
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "buffers.safetensors"):
        last = Path("checkpoints") / "step-00000008" / name
        assert (run / last).read_bytes() == (whole / last).read_bytes(), name
    trained = audited_entries(whole)
    assert [len(trained[step]) for step in range(1, 9)] == [4, 4, 4, 4, 4, 2, 4, 4]
    assert audited_entries(run) == trained


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_many_random_kills(detection_recipe: Path, unbroken: Path, tmp_path: Path, seed: int) -> None:
    run = tmp_path / "broken"
    kill_at_random(detection_recipe, run, 4, random.Random(seed))
    assert losses(run) == losses(unbroken)


def test_the_ledger_holds_each_sample_once_an_epoch(unbroken: Path) -> None:
    epochs: dict[int, Counter[int]] = {}
    for path in (unbroken / "ledger").iterdir():
        for line in path.read_text().splitlines():
            for epoch, sample, repetition in json.loads(line)["entries"]:
                assert repetition == 0
                epochs.setdefault(epoch, Counter())[sample] += 1
    # 22 samples at 4 a step are 6 steps an epoch, the last of 2 samples: 20 steps are 3 epochs and 2 steps.
    assert [sum(epochs[epoch].values()) for epoch in sorted(epochs)] == [22, 22, 22, 8]
    assert all(set(epochs[epoch].values()) == {1} for epoch in epochs)


def test_a_finished_run_stays_as_it_is(detection_recipe: Path, unbroken: Path) -> None:
    """Started again, it trains nothing; an evaluation under another protocol is made anew."""
    before = losses(unbroken)
    result = unbroken / "results" / "step-00000020.json"
    evaluation = json.loads(result.read_text())
    result.write_text(json.dumps({**evaluation, "id": "of another protocol", "metrics": {}}))
    train(detection_recipe, unbroken)
    assert losses(unbroken) == before
    again = json.loads(result.read_text())
    assert (again["id"], again["metrics"]) == (evaluation["id"], evaluation["metrics"])


def test_retention_and_listing(unbroken: Path) -> None:
    listed = succeed("checkpoints", "list", unbroken).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["step-00000018", "step-00000020"]
    assert all("complete" in line for line in listed)
    assert succeed("checkpoints", "verify", unbroken).stdout.count(" valid") == 2
