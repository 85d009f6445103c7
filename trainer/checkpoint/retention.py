"""Retention of checkpoints. The plan is a pure function; checkpoints that are being read are not deleted."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import MAX_SMALL_BYTES, read_json
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.recipe import Backlog
from vitgraft.trainer.checkpoint.commit import TEMPORARY
from vitgraft.trainer.checkpoint.files import remove_tree
from vitgraft.trainer.checkpoint.layout import MANIFEST, step_name
from vitgraft.trainer.checkpoint.read import complete_checkpoints

_DELETED = f".deleted{TEMPORARY}"


@dataclass(frozen=True)
class Policy:
    """Checkpoints to keep: the newest ``keep_last``, every step that ``keep_every`` divides, the best by
    ``keep_best``."""

    keep_last: int
    keep_every: int | None = None
    keep_best: str | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Policy:
        """Return the recipe's policy."""
        checkpoint = recipe.train.checkpoint
        return cls(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_best)


def plan(
    steps: Collection[int], policy: Policy, figures: Mapping[int, Mapping[str, float]], spared: Collection[int] = ()
) -> list[int]:
    """Return the steps whose checkpoints are to be deleted, oldest first.

    Args:
        steps: of all valid checkpoints; an invalid one must not be among them, or it would count as kept.
        figures: what evaluations found, by step. All metrics are better when larger.
        spared: steps that stay whatever the policy says.
    """
    ordered = sorted(steps)
    kept = {*ordered[-policy.keep_last :], *spared}
    if policy.keep_every is not None:
        kept |= {step for step in ordered if step % policy.keep_every == 0}
    if policy.keep_best is not None and (best := best_step(ordered, figures, policy.keep_best)) is not None:
        kept.add(best)
    return [step for step in ordered if step not in kept]


def best_step(steps: Collection[int], figures: Mapping[int, Mapping[str, float]], metric: str) -> int | None:
    """Return the step with the largest metric, the newest of equal ones; ``None`` when none was evaluated."""
    found = {step: figures.get(step, {}).get(metric, math.nan) for step in steps}
    return max((step for step, value in found.items() if value == value), key=lambda s: (found[s], s), default=None)


def evaluation_due(recipe: Recipe, step: int, last_step: int | None) -> bool:
    """Tell whether a checkpoint is to be evaluated; a function of the step alone, so a restart changes no choice.

    Args:
        last_step: of the run, where it is known.
    """
    every = recipe.train.checkpoint.every_steps
    regular = every is not None and step % (every * recipe.evaluate.every_checkpoints) == 0
    return recipe.data.val is not None and (step == last_step or regular)


def awaiting(due: Collection[int], settled: Collection[int], backlog: Backlog) -> list[int]:
    """Return the steps still to be evaluated, in order of evaluation.

    Args:
        due: steps of complete checkpoints that are to be evaluated.
        settled: steps that were evaluated, or will not be.
        backlog: ``latest``: the newest that is due overtakes all before it.
    """
    if backlog == "all":
        return sorted(set(due) - set(settled))
    return [step for step in set(due) - set(settled) if step == max([*due, *settled])]


def spared_for_evaluation(run: Path, recipe: Recipe, steps: Collection[int], evaluated: Collection[int]) -> set[int]:
    """Return the steps whose checkpoints must be kept until they are evaluated."""
    due = [step for step in steps if evaluation_due(recipe, step, None)]
    settled = {*evaluated, *(step for step in due if given_up_path(run, step).exists())}
    # Without an evaluator of its own the trainer evaluates each before it goes on.
    return set(awaiting(due, settled, "all" if recipe.evaluator is None else recipe.evaluator.backlog))


def given_up_path(run: Path, step: int) -> Path:
    """Return RUN/results/step-N.given-up, the reason why a checkpoint that was due was not evaluated."""
    return result_path(run, step).with_suffix(".given-up")


def result_path(run: Path, step: int) -> Path:
    """Return RUN/results/step-N.json."""
    return run / "results" / f"{step_name(step)}.json"


def figures_of(run: Path, steps: Collection[int]) -> dict[int, dict[str, float]]:
    """Return the figures of those steps that were evaluated."""
    found: dict[int, dict[str, float]] = {}
    for step in steps:
        try:
            tree = read_json(result_path(run, step), MAX_SMALL_BYTES, finite=False)
        except DataError:
            continue  # not evaluated, or not by this version: no figure to go by
        metrics = tree.get("metrics") if isinstance(tree, dict) else None
        if isinstance(metrics, dict):
            found[step] = {name: float(value) for name, value in metrics.items() if _is_figure(value)}
    return found


def _is_figure(value: object) -> bool:
    # Null, and -1 in results of earlier versions: there is no ground truth for it.
    return isinstance(value, int | float) and 0 <= value < 1e15


def retain(run: Path, recipe: Recipe, just_committed: int | None = None) -> list[str]:
    """Delete what the recipe does not keep; returns the names of the deleted checkpoints.

    Those that await their evaluation are kept, and those that are being read (:func:`delete`).

    Raises:
        OSError: a checkpoint could not be deleted, the others are; half of one is never taken for a whole.
    """
    steps = [checkpoint.step for checkpoint in complete_checkpoints(run)]
    figures = figures_of(run, steps)
    spared = spared_for_evaluation(run, recipe, steps, figures)
    return delete(run, plan(steps, Policy.of(recipe), figures, spared | {just_committed or 0}))


def delete(run: Path, steps: Collection[int]) -> list[str]:
    """Delete checkpoints, except those being read (under a shared lock on the manifest); return the names.
    What an interrupted deletion has left goes too.

    Raises:
        OSError: one could not be deleted; the others are.
    """
    deleted: list[str] = []
    failure: OSError | None = None
    for half in sorted((run / "checkpoints").glob(f"*{_DELETED}")):
        try:
            remove_tree(half)
        except OSError as error:
            failure = failure or error
    for step in sorted(steps):
        path = run / "checkpoints" / step_name(step)
        try:
            if _delete(path):
                deleted.append(path.name)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return deleted


def _delete(path: Path) -> bool:
    doomed = path.with_name(f"{path.name}{_DELETED}")
    try:
        # Not to write: over NFS and SMB only a file that is open for writing can be locked for one alone.
        with (path / MANIFEST).open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(path, doomed)
    except (FileNotFoundError, BlockingIOError):
        return False
    remove_tree(doomed)
    return True
