"""Metrics of an evaluation as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vitgraft.configs.schema import Recipe
from vitgraft.trainer.checkpoint.layout import EMA
from vitgraft.trainer.checkpoint.read import Checkpoint
from vitgraft.trainer.ema import lag
from vitgraft.trainer.evaluate import Evaluation, Evaluator
from vitgraft.trainer.tasks.base import Figures

NO_TRUTH = "no ground truth"


def in_words(value: float | None, digits: int = 3) -> str:
    """Return a metric's value as text."""
    return NO_TRUTH if value is None else f"{value:.{digits}f}"


def headline(evaluator: Evaluator, evaluation: Evaluation, checkpoint: Checkpoint) -> str:
    """Return the primary metrics in one line, also of the raw weights where both were evaluated, and the warning about
    the average."""
    names = [name for name in evaluator.task.primary if name in evaluation.metrics]
    line = f"step {evaluation.step}: {_listed(evaluation.metrics, names)} on {evaluation.samples} samples"
    if evaluation.losses:
        line += f", loss {math.fsum(evaluation.losses.values()):.4g}"
    if evaluation.raw_metrics is not None:
        line += f"; without averaging {_listed(evaluation.raw_metrics, names)}"
    lagging = lag_of(evaluator.recipe, checkpoint) if evaluation.protocol["weights"] == "ema" else None
    return line if lagging is None else f"{line}; {lagging}"


def missing_best(evaluator: Evaluator, evaluation: Evaluation) -> str | None:
    """Return the warning that the metric of ``keep_best`` is missing from an evaluation; ``None``: it is there."""
    best = evaluator.recipe.train.checkpoint.keep_best
    if best is None or evaluation.metrics.get(best) is not None:
        return None
    return f"WARNING step {evaluation.step}: {evaluator.dataset.folder} gives no {best}, by which keep_best chooses"


def lag_of(recipe: Recipe, checkpoint: Checkpoint) -> str | None:
    """Return the warning that a checkpoint's average still weighs the initial weights; ``None``: no warning."""
    if recipe.train.ema is None or EMA not in checkpoint.manifest.kinds:
        return None
    return lag(checkpoint.step, recipe.train.ema, checkpoint.manifest.ema_ramped)


def _listed(figures: Figures, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {in_words(figures.get(name))}" for name in names)
