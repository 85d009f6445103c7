"""A run that is to train longer: the same losses, bit for bit, as if it had been meant to from the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import history, losses, tiny_recipe, train, write_recipe

from vitgraft.launch.status import read_status

SMALL: dict[str, Any] = {"launch__processes": 1, "train__ema": 0.9, "train__checkpoint": {"every_steps": 4}}


def run_of(data: Path, run: Path, *options: str, **settings: Any) -> list[str]:
    tree = tiny_recipe("semantic", data / "train", data / "val", **SMALL, **settings)
    train(write_recipe(run.parent / f"{run.name}.yaml", tree), run, *options)
    return losses(run)


def test_without_decay_it_equals_the_longer_run(semantic_data: Path, tmp_path: Path) -> None:
    flat = {"train__schedule": {"name": "cosine", "warmup": 0.0, "final": 1.0}}
    longer = run_of(semantic_data, tmp_path / "longer", **flat, train__steps=10)
    extended = run_of(semantic_data, tmp_path / "extended", **flat, train__steps=6)
    assert extended == longer[:6]
    stage = "train.extend=" + json.dumps([{"steps": 4}])
    assert run_of(semantic_data, tmp_path / "extended", "--set", stage, **flat, train__steps=6) == longer


def test_with_a_new_schedule_it_equals_the_run_that_had_it_from_the_start(semantic_data: Path, tmp_path: Path) -> None:
    """In epochs, the last batch of which is short."""
    stages = [{"epochs": 1, "schedule": {"name": "cosine", "final": 0.2}, "lr": 5e-4}]
    whole = run_of(semantic_data, tmp_path / "whole", train__steps=None, train__epochs=1, train__extend=stages)
    base = run_of(semantic_data, tmp_path / "added", train__steps=None, train__epochs=1)
    assert base == whole[:6]
    again = run_of(semantic_data, tmp_path / "added", train__steps=None, train__epochs=1, train__extend=stages)
    assert again == whole
    rows = history(tmp_path / "added")
    assert (rows[7]["steps"], rows[12]["step"]) == (12, 12)
    assert [rows[step]["lr"] for step in range(7, 13)] == [
        history(tmp_path / "whole")[step]["lr"] for step in range(7, 13)
    ]
    status = read_status(tmp_path / "added")
    assert (status.state, status.step, status.epochs, status.evaluation_step) == ("finished", 12, 2, 12)
