"""Default normalisation of images: that of the trunk's weights, where the recipe does not set it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.files import home_path
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.run_recipe import CONFIG, is_bound
from vitgraft.models.pretrained import Normalisation, normalisation_of
from vitgraft.trainer.checkpoint.layout import MANIFEST
from vitgraft.trainer.checkpoint.read import complete_checkpoints, open_checkpoint

_KEYS = ("mean", "std")


def with_normalisation(recipe: Recipe, run: Path, resume: str, note: Callable[[str], None]) -> Recipe:
    """Return the recipe with ``data.mean`` and ``data.std`` of its weights, unless it gives them or the run has others.

    Args:
        resume: as for :func:`vitgraft.launch.run_dir.open_run`.
        note: takes a line where the numbers are not the recipe's, or not the weights'.
    """
    known = _of_checkpoint(recipe) or normalisation_of(recipe.model)
    if known is None:
        return recipe
    theirs, certain = known
    open_keys = [key for key in _KEYS if key not in recipe.data.model_fields_set]
    chosen = {key: getattr(theirs, key) for key in open_keys} if certain else {}
    whose = "the weights were trained"
    if chosen and resume != "never" and is_bound(run):
        with contextlib.suppress(ConfigError):  # whoever checks the recipe against the run says what is wrong with it
            begun = load_recipe(str(run / CONFIG)).data
            chosen, whose = {key: getattr(begun, key) for key in open_keys}, "this run was begun"
    before = {key: getattr(recipe.data, key) for key in _KEYS}
    now = before | chosen
    if now != before:
        note(f"data.mean {now['mean']}, data.std {now['std']}: as {whose}; the recipe gives none")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=chosen)})
    if now != {key: getattr(theirs, key) for key in _KEYS}:
        name = getattr(recipe.model.backbone, "timm", None)
        of = "the weights" if certain else f"timm's weights of {name!r}"
        note(
            f"data.mean {now['mean']}, data.std {now['std']}: but {of} were trained with {theirs.mean}, {theirs.std}; "
            "set both to those unless you mean it"
        )
    return recipe


def _of_checkpoint(recipe: Recipe) -> tuple[Normalisation, bool] | None:
    """Return the normalisation of ``train.init_from``'s checkpoint; ``None``: not set, unreadable or invalid."""
    if recipe.train.init_from is None:
        return None
    path = home_path(recipe.train.init_from)
    try:
        newest = open_checkpoint(path) if (path / MANIFEST).is_file() else complete_checkpoints(path)[-1]
    except (CheckpointError, IndexError):  # checked elsewhere
        return None
    found = newest.manifest.normalisation
    if len(found.mean) != 3 or len(found.std) != 3 or min(found.std) <= 0:
        return None
    return Normalisation(list(found.mean), list(found.std)), True
