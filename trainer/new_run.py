"""Commands that work where a run cannot be resumed as requested: every such error ends with one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema import Recipe
from vitgraft.configs.yaml_text import parse_yaml


def same_run(run: Path, changes: Mapping[str, Any], command: Sequence[str] | None = None) -> str:
    """Return the command that goes on with a run under changed keys.

    Args:
        changes: values by their keys in the recipe.
        command: how training was asked for, without the run directory; ``None``: not known, the run's own recipe.
    """
    return _command(run, run, changes, command)


def new_run(
    run: Path,
    recipe: Recipe,
    changes: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    *,
    weights: bool = True,
) -> str:
    """Return the command that starts a run of its own beside another.

    Args:
        run: the other.
        recipe: of the new one, before ``changes``.
        weights: whether it starts from the other's weights.
    """
    number = 2
    while (folder := run.with_name(f"{run.name}-{number}")).exists():
        number += 1
    start: dict[str, Any] = {}
    if weights:
        start["train.init_from"] = str(run)
        # A recipe names one source of weights.
        if recipe.model.weights is not None:
            start["model.weights"] = None
        if recipe.model.backbone.weights is not None:
            start["model.backbone.weights"] = None
    return _command(run, folder, {**start, **(changes or {})}, command)


def _command(run: Path, folder: Path, changes: Mapping[str, Any], command: Sequence[str] | None) -> str:
    words = [*(command or ("vitgraft", "train", str(run / "config.yaml"))), "--run-dir", str(folder)]
    for key, value in changes.items():
        words += ["--set", f"{key}={_as_yaml(value)}"]
    return shlex.join(words)


def _as_yaml(value: Any) -> str:
    """Return the value as YAML text, quoted only where necessary."""
    if isinstance(value, str):
        try:
            if parse_yaml(value, "value") == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value)
