"""Check that a recipe may resume a run, and the command that works where it may not.

A run binds its recipe from its first committed checkpoint on: before that there is nothing that another recipe could
spoil, and whoever mends a start that failed goes on in the same directory.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.load import read_tree, validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.train import ExtendConfig, ScheduleConfig, TrainConfig
from vitgraft.trainer.checkpoint.commit import COMMITTED, all_step_names
from vitgraft.trainer.checkpoint.layout import POINTER, Manifest
from vitgraft.trainer.checkpoint.read import complete_checkpoints, open_checkpoint
from vitgraft.trainer.new_run import new_run, same_run

CONFIG = "config.yaml"


def is_bound(run: Path) -> bool:
    """Tell whether the run has ever committed a checkpoint."""
    return bool(all_step_names(run)) or any(
        os.path.lexists(path) for path in (run / "checkpoints" / POINTER, run / COMMITTED)
    )


def is_another(run: Path, recipe: Recipe) -> bool:
    """Tell whether the run's stored recipe has another identity than ``recipe``, or cannot be read."""
    config = run / CONFIG
    if not os.path.lexists(config):
        return False
    try:
        return _read(config).identity() != recipe.identity()
    except ConfigError:
        return True


def check_recipe(run: Path, recipe: Recipe, resume: str, command: Sequence[str] | None) -> str | None:
    """Check that the recipe has the identity of the one that wrote the run's checkpoints.

    Args:
        resume: ``auto`` or the path of a checkpoint.
        command: how training was asked for, without the run directory.

    Returns:
        A note, where RUN/config.yaml cannot be read and the checkpoints tell that the recipe is the same.

    Raises:
        ConfigError: it is another one; ends with the command that works.
    """
    config = run / CONFIG
    newest = _manifest(run, resume)
    if not os.path.lexists(config):
        if newest is not None and recipe.has_hash(newest.recipe_hash):  # else whoever opens the checkpoint says so
            _check_length(run, recipe.train, newest)
        return None
    try:
        old = _read(config)
    except ConfigError as error:
        if newest is None:
            return None
        if recipe.has_hash(newest.recipe_hash):
            _check_length(run, recipe.train, newest)
            return f"WARNING {error}; by its checkpoints the recipe is the same, so it is written again"
        raise ConfigError(
            f"{error}; and its checkpoints were written under another recipe (hash {newest.recipe_hash[:12]}, this one "
            f"{recipe.identity_hash()[:12]}): restore it, or start a new run from its weights: "
            f"{new_run(run, recipe, command=command)}"
        ) from None
    difference = first_difference(old.identity(), recipe.identity())
    if difference is not None:
        key, before, now = difference
        if longer := _longer(run, old, recipe, key, command):
            raise ConfigError(f"{config}: {key} was {before}, now {now}; {longer}")
        # Another model may fit the weights nowhere.
        weights = not key.startswith("model.")
        how = "from this one's weights" if weights else "of its own"
        raise ConfigError(
            f"{config}: {key} was {reprlib.repr(before)}, now {reprlib.repr(now)}; once a checkpoint is committed a "
            "run keeps its model, data and optimisation: use the old value, --resume never to start afresh, or a new "
            f"run {how}: {new_run(run, recipe, command=command, weights=weights)}"
        )
    if newest is not None:
        _check_stages(run, old.train, recipe, newest, command)
    return None


def _longer(run: Path, old: Recipe, new: Recipe, key: str, command: Sequence[str] | None) -> str | None:
    """Return the remedy for a longer ``train.epochs`` or ``train.steps``: a stage, as the schedule keeps its length.

    ``None``: another key, or not longer.
    """
    if key not in ("train.epochs", "train.steps"):
        return None
    unit = key.removeprefix("train.")
    before, now = getattr(old.train, unit), getattr(new.train, unit)
    if before is None or now is None or now <= sum(old.train.stage_lengths()):
        return None
    stages = [_plain(stage) for stage in old.train.extend]
    stage: dict[str, Any] = {unit: now - sum(old.train.stage_lengths())}
    ends_at = [schedule.ends_at for schedule in _schedules(old.train)][-1]
    how = "the rate with which it ended stays" if ends_at else "the rate has ended at 0, so a schedule begins again"
    if not ends_at:
        stage["schedule"] = {"name": "cosine"}
    changes = {key: before, "train.extend": [*stages, stage]}
    return f"its schedule ends there; add a stage ({how}): {same_run(run, changes, command)}"


def _schedules(train: TrainConfig) -> list[ScheduleConfig]:
    return [train.schedule, *(stage.schedule for stage in train.extend if stage.schedule is not None)]


def _plain(stage: ExtendConfig) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude_defaults=True) | (
        {} if stage.schedule is None else {"schedule": stage.schedule.model_dump(mode="json")}
    )


def _check_stages(run: Path, old: TrainConfig, recipe: Recipe, newest: Manifest, command: Sequence[str] | None) -> None:
    """Refuse another rate, or another end, in what the run has already done; what has not begun may change.

    Raises:
        ConfigError: ends with the command that works.
    """
    new = recipe.train
    done, begun = _done(old, newest)
    start = old.stage_lengths()[0]
    for number, stage in enumerate(old.extend):
        if done < start or (done == start and not begun):
            return
        now = new.extend[number] if number < len(new.extend) else None
        alike = now is not None and (now.schedule, now.lr) == (stage.schedule, stage.lr)
        end = start + new.stage_lengths()[number + 1] if now is not None else start
        # While a rate is held, its end may be put off, or brought forward to what is to come.
        soonest = min(end, start + old.stage_lengths()[number + 1])
        held = stage.schedule is None and (done < soonest or (done == soonest and not begun))
        if now != stage and not (alike and held):
            stages = [_plain(stage) for stage in old.extend]
            longer = sum(new.stage_lengths()) - sum(old.stage_lengths())
            if longer > 0:
                stages.append({_unit(old): longer, "schedule": {"name": "cosine"}})
            raise ConfigError(
                f"{run / CONFIG}: train.extend.{number} has begun and was another; keep it as it was, and add a stage "
                f"for a longer run: {same_run(run, {'train.extend': stages}, command)}"
            )
        start = end


def _done(train: TrainConfig, newest: Manifest) -> tuple[int, bool]:
    """Return whole units (steps or epochs) that are done, and whether the next has begun."""
    return (newest.step, False) if train.epochs is None else (newest.data.epoch, newest.data.cursor > 0)


def _check_length(run: Path, train: TrainConfig, newest: Manifest) -> None:
    """Refuse a recipe that ends before what the run has done, whether or not it is known under which it did that.

    Raises:
        ConfigError: says how far it is.
    """
    done, begun = _done(train, newest)
    length = sum(train.stage_lengths())
    if (done, begun) > (length, False):
        raise ConfigError(
            f"{run}: its checkpoint of step {newest.step} lies behind the end of this recipe, {length} {_unit(train)}; "
            "give the recipe with the stages that the run had (train.extend), or --resume never to start afresh"
        )


def _unit(train: TrainConfig) -> str:
    return "steps" if train.epochs is None else "epochs"


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Return the first key in which two trees differ, with both values; in a list of sections, the key in its entry."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    if (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and isinstance((old or [None])[0], dict)
    ):
        old, new = dict(enumerate(old)), dict(enumerate(new))
        return first_difference(old, new, key)
    return None if old == new else (key, old, new)


def _read(config: Path) -> Recipe:
    return validate_recipe(read_tree(config), str(config))


def _manifest(run: Path, resume: str) -> Manifest | None:
    """Return the manifest of the checkpoint that the run would resume from; ``None``: none, or unreadable."""
    if resume != "auto":
        try:
            return open_checkpoint(Path(resume)).manifest
        except CheckpointError:
            return None  # said better where it is opened
    return next((checkpoint.manifest for checkpoint in reversed(complete_checkpoints(run))), None)
