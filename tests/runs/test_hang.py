"""A run that stands still though every process lives and beats: how long a step may take finds it, and says so."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
from support import history, pids, processes_naming, rows, start, tiny_recipe, wait_until, write_recipe


def test_a_loader_that_stands_still_is_a_hang_in_that_step(semantic_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"data__workers": 1, "data__prefetch": 1, "train__steps": 100_000, "launch__deadlines": {"step": 3.0}}
    recipe = tiny_recipe("semantic", semantic_data / "train", **settings)
    command = start("train", write_recipe(tmp_path / "recipe.yaml", recipe), "--run-dir", run)
    wait_until(lambda: rows(run) >= 2, process=command)
    rank = psutil.Process(pids(run, "rank")[1])
    loaders = [loader for server in rank.children() for loader in server.children()]
    for loader in loaders:
        loader.send_signal(signal.SIGSTOP)

    _, complaint = command.communicate(timeout=60)
    assert command.returncode == 5, complaint
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    end = next(event for event in events if event["event"] == "end")
    assert (end["kind"], end["code"]) == ("hang", 5)
    step = max(history(run)) + 1
    assert f"no rank gets on: at step {step}, a step for" in end["reason"]
    assert "expected 3 s" in end["reason"]
    assert processes_naming(run) == []
    assert loaders
    assert psutil.wait_procs(loaders, timeout=10)[1] == []
