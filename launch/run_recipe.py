"""Whether a recipe may go on with a run, and the command that works where it may not.

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
from vitgraft.trainer.checkpoint.commit import COMMITTED, all_step_names
from vitgraft.trainer.checkpoint.layout import POINTER, Manifest
from vitgraft.trainer.checkpoint.read import complete_checkpoints, open_checkpoint
from vitgraft.trainer.new_run import new_run

CONFIG = "config.yaml"


def is_bound(run: Path) -> bool:
    """Whether anything was ever committed in the run."""
    return bool(all_step_names(run)) or any(
        os.path.lexists(path) for path in (run / "checkpoints" / POINTER, run / COMMITTED)
    )


def is_another(run: Path, recipe: Recipe) -> bool:
    """Whether the run was started last with a recipe that computes something else, or nobody can tell."""
    config = run / CONFIG
    if not os.path.lexists(config):
        return False
    try:
        return _read(config).identity() != recipe.identity()
    except ConfigError:
        return True


def check_recipe(run: Path, recipe: Recipe, resume: str, command: Sequence[str] | None) -> str | None:
    """See that the recipe is the one under which the run has committed what it has.

    Args:
        resume: ``auto`` or the path of a checkpoint.
        command: how training was asked for, without the run directory.

    Returns:
        A note, where RUN/config.yaml cannot be read and the checkpoints tell that the recipe is the same.

    Raises:
        ConfigError: it is another one; ends with the command that works.
    """
    config = run / CONFIG
    if not os.path.lexists(config):
        return None
    newest = _manifest(run, resume)
    try:
        old = _read(config)
    except ConfigError as error:
        if newest is None:
            return None
        if recipe.has_hash(newest.recipe_hash):
            return f"WARNING {error}; by its checkpoints the recipe is the same, so it is written again"
        raise ConfigError(
            f"{error}; and its checkpoints were written under another recipe (hash {newest.recipe_hash[:12]}, this one "
            f"{recipe.identity_hash()[:12]}): restore it, or start a new run from its weights: "
            f"{new_run(run, recipe, command=command)}"
        ) from None
    difference = first_difference(old.identity(), recipe.identity())
    if difference is not None:
        key, before, now = difference
        # Another model may fit the weights nowhere.
        weights = not key.startswith("model.")
        how = "from this one's weights" if weights else "of its own"
        raise ConfigError(
            f"{config}: {key} was {reprlib.repr(before)}, now {reprlib.repr(now)}; once a checkpoint is committed a "
            "run keeps its model, data and optimisation: use the old value, --resume never to start afresh, or a new "
            f"run {how}: {new_run(run, recipe, command=command, weights=weights)}"
        )
    return None


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two trees differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)


def _read(config: Path) -> Recipe:
    return validate_recipe(read_tree(config), str(config))


def _manifest(run: Path, resume: str) -> Manifest | None:
    """Of the checkpoint from which the run would go on, as far as its manifest tells."""
    if resume != "auto":
        try:
            return open_checkpoint(Path(resume)).manifest
        except CheckpointError:
            return None  # said better where it is opened
    return next((checkpoint.manifest for checkpoint in reversed(complete_checkpoints(run))), None)
