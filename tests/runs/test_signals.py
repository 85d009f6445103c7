"""Signals that keep coming to a run's command: it stops behind a checkpoint all the same, and leaves with 75."""

from __future__ import annotations

import json
import time
from pathlib import Path

from support import processes_naming, rows, start, tiny_recipe, wait_until, write_recipe


def test_sigterm_again_and_again_is_one_wish_to_stop(semantic_data: Path, tmp_path: Path) -> None:
    """Else a scheduler sees 143, and does not queue the job again."""
    run = tmp_path / "run"
    recipe = tiny_recipe("semantic", semantic_data / "train", train__steps=100_000)
    command = start("train", write_recipe(tmp_path / "recipe.yaml", recipe), "--run-dir", run)
    wait_until(lambda: rows(run) >= 2, process=command)
    deadline = time.monotonic() + 60
    while command.poll() is None and time.monotonic() < deadline:
        command.terminate()
        time.sleep(0.005)
    _, complaint = command.communicate(timeout=10)
    assert command.returncode == 75, complaint
    assert "vitgraft: stopped behind a committed checkpoint" in complaint
    assert "Traceback" not in complaint
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["code"] for event in events if event["event"] == "end"] == [75]
    assert sum(event["event"] == "stop_asked" for event in events) == 1
    assert processes_naming(run) == []
