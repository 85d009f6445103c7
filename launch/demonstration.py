"""``vitgraft demo``: three tasks on the built-in digits, from packing to pictures, ending with one table."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.files import MAX_SMALL_BYTES, read_json
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.data_shards.sources import ensure_digits
from vitgraft.launch import training
from vitgraft.launch.ui import Screen
from vitgraft.trainer.checkpoint.read import resolve_checkpoint
from vitgraft.trainer.figures import in_words
from vitgraft.trainer.monitor_files import audited_history
from vitgraft.trainer.tasks import make_task

TASKS = ("detection", "semantic", "video")


def run(out: Path, tasks: list[str] | None = None) -> None:
    """Run the demo; a finished task is not trained again.

    Raises:
        ConfigError: an unknown task.
        VitgraftError: whatever a run ends with.
    """
    chosen = tasks or list(TASKS)
    unknown = next((task for task in chosen if task not in TASKS), None)
    if unknown is not None:
        raise ConfigError(f"--task {unknown}: no such task; choose from {', '.join(TASKS)}")
    rows = []
    for task in chosen:
        recipe = load_recipe(f"quickstart/{task}")
        with Screen(f"{task}: ") as screen:
            for source in (*recipe.data.train, recipe.data.val):
                if source is not None:
                    ensure_digits(source.path, screen.callback("pack"))
            training.train(recipe, out / task, screen)
        rows.append((task, recipe, out / task))
    show(rows, Console(highlight=False))


def show(rows: list[tuple[str, Recipe, Path]], console: Console) -> None:
    """Print the figures as one table, and below it the commands that open what was made: a line each, however wide the
    terminal is, to be copied.

    Args:
        rows: task, recipe and run directory.

    Raises:
        CheckpointError: a run has no evaluation of its last checkpoint.
    """
    table = Table(title="vitgraft demo", show_lines=True)
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("time", justify="right")
    commands = []
    for task, recipe, run_folder in rows:
        checkpoint = resolve_checkpoint(run_folder)
        result = run_folder / "results" / f"{checkpoint.path.name}.json"
        if not result.is_file():
            raise CheckpointError(f"{result}: missing; evaluate with: vitgraft evaluate {run_folder}")
        evaluation = read_json(result, MAX_SMALL_BYTES, CheckpointError)
        names = [name for name in make_task(recipe.task, []).primary if name in evaluation["metrics"]]
        values = [in_words(evaluation["metrics"][name]) for name in names]
        table.add_row(task, "\n".join(names), "\n".join(values), _minutes(run_folder, evaluation))
        picture = result.with_suffix("").joinpath(*evaluation["pictures"][:1])
        commands += [
            task,
            f"  pictures     xdg-open {shlex.quote(str(picture))}",
            f"  checkpoint   vitgraft checkpoints list {shlex.quote(str(run_folder))}",
            f"  TensorBoard  tensorboard --logdir {shlex.quote(str(run_folder / 'tensorboard'))}",
        ]
    console.print(table)
    for command in commands:
        console.print(command, markup=False, soft_wrap=True)


def _minutes(run_folder: Path, evaluation: dict[str, Any]) -> str:
    """Return the duration of the committed steps and the last evaluation, as text (min:s)."""
    rows = audited_history(run_folder / "metrics.jsonl")
    seconds, before = float(evaluation["seconds"]), 0
    for step in sorted(rows):
        seconds += (rows[step]["samples"] - before) / rows[step]["images_per_second"] + rows[step]["checkpoint_stall_s"]
        before = rows[step]["samples"]
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
