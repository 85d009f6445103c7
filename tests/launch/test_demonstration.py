"""What the demo ends with, on terminals of any width and in a pipe."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console
from support_evaluator import make_evaluated_run

from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.demonstration import TASKS, show

FIGURES = {
    "detection": {"box_AP": 0.5614, "box_AP50": 0.834, "mask_AP": 0.449, "mask_AP50": None},
    "semantic": {"mIoU": 0.682, "mAcc": 0.75, "aAcc": 0.9},
    "video": {"top1": 0.925, "top5": 1.0},
}


@pytest.fixture
def rows(tmp_path: Path) -> list[tuple[str, Recipe, Path]]:
    """Runs whose last checkpoints are evaluated, in a folder with a space and a long name."""
    made = []
    for task in TASKS:
        run, _ = make_evaluated_run(tmp_path / "my runs" / ("long-" * 12) / task, tmp_path, [570])
        evaluation = {"metrics": FIGURES[task], "seconds": 9.5, "pictures": ["0000.png"]}
        (run / "results" / "step-00000570.json").write_text(json.dumps(evaluation))
        row = {"step": 1, "attempt": 1, "samples": 80, "images_per_second": 1.0, "checkpoint_stall_s": 0.5}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        made.append((task, load_recipe(f"quickstart/{task}"), run))
    return made


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_figures_fit_and_the_commands_can_be_copied(
    rows: list[tuple[str, Recipe, Path]], width: int, terminal: bool
) -> None:
    stream = io.StringIO()
    show(rows, Console(file=stream, width=width, force_terminal=terminal, color_system=None, highlight=False))
    lines = stream.getvalue().splitlines()
    table = [line for line in lines if line and line[0] in "┏┃┡│├└"]
    assert max(map(len, table)) <= 60
    text = "\n".join(table)
    for task, figures in FIGURES.items():
        assert task in text
        for name, value in figures.items():
            assert f" {name} " in text
            assert (f" {value:.3f} " if value is not None else " no ground truth ") in text
    assert "1:30 min" in text
    commands = [line for line in lines if line.startswith("  ")]
    pictures = [shlex.split(line)[-1] for line in commands if "xdg-open" in line]
    assert pictures == [str(run / "results" / "step-00000570" / "0000.png") for _, _, run in rows]
    assert [shlex.split(line)[-1] for line in commands if "tensorboard --logdir" in line] == [
        str(run / "tensorboard") for _, _, run in rows
    ]
