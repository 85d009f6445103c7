"""A checkpoint for use outside vitgraft: one safetensors file, or an ExportedProgram of the forward pass."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema import Recipe
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.official_names import trunk_tensors
from vitgraft.trainer.checkpoint.files import sync_folder
from vitgraft.trainer.checkpoint.read import Checkpoint, Weights, choose_weights, read_weights
from vitgraft.trainer.checkpoint.save import load_model
from vitgraft.trainer.exported_program import capture

Format = Literal["safetensors", "torch-export"]
Part = Literal["model", "backbone"]
SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2"}
EXTRA_FILE = "vitgraft.json"
"""In an ExportedProgram: the metadata, as JSON."""


def export(
    recipe: Recipe,
    checkpoint: Checkpoint,
    out: Path,
    format: Format,
    *,
    weights: Weights | None = None,
    part: Part = "model",
    overwrite: bool = False,
) -> str:
    """Write ``out``, whole or not at all.

    Args:
        weights: the average (``ema``) or the weights themselves; ``None``: the average where there is one.
        part: the whole model under its own names, or the trunk alone under timm's or the official ones.

    Returns:
        What the file holds, in one line.

    Raises:
        ConfigError: ``out`` exists, has another suffix or cannot be written; no average; a model that cannot be
            captured.
        CheckpointError: damaged, or of another model than the recipe's.
    """
    _check_out(out, format, overwrite)
    weights = choose_weights(checkpoint, weights)
    with checkpoint.reading():
        state = read_weights(checkpoint, ema=weights == "ema")
    facts = _facts(recipe, checkpoint, weights, part)
    if format == "torch-export":
        model = _model(recipe, checkpoint, state)
        program, holds = capture(model.eval(), recipe, part)
        facts["contents"] = holds
        extra = {EXTRA_FILE: json.dumps(facts, indent=1)}
        _write_whole(out, lambda path: torch.export.save(program, path, extra_files=extra))
        return holds
    if part == "backbone":
        trunk = trunk_tensors(_model(recipe, checkpoint, state).backbone)
        state = {name: value.numpy() for name, value in trunk.tensors.items()}
        facts["contents"] = str(trunk)
    else:
        facts["contents"] = f"the whole model, {len(state)} tensors"
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    _write_whole(out, lambda path: save_file(arrays, path, {"format": "pt", **texts}))
    return str(facts["contents"])


def _check_out(out: Path, format: Format, overwrite: bool) -> None:
    if out.suffix != SUFFIXES[format]:
        raise ConfigError(f"--out {out}: a {format} file ends in {SUFFIXES[format]}; name it so")
    if out.is_dir():
        raise ConfigError(f"--out {out}: a folder; name a file")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out}: exists; add --overwrite, or choose another name")


def _model(recipe: Recipe, checkpoint: Checkpoint, state: dict[str, NDArray[np.generic]]) -> GraftedModel:
    size = (recipe.data.image_size[0], recipe.data.image_size[1])
    classes = len(checkpoint.manifest.classes)
    model = build_model(recipe.model.without_weights(), num_classes=classes, image_size=size)
    load_model(model, state, str(checkpoint.path))
    return model


def _facts(recipe: Recipe, checkpoint: Checkpoint, weights: Weights, part: Part) -> dict[str, Any]:
    """Return the metadata of the exported file."""
    manifest = checkpoint.manifest
    return {
        "task": recipe.task,
        "part": part,
        "weights": weights,
        "classes": manifest.classes,
        **manifest.normalisation.model_dump(),
        "model": recipe.model.without_weights().model_dump(mode="json"),
        "run": manifest.run,
        "step": manifest.step,
        "samples": manifest.samples,
        "recipe_hash": manifest.recipe_hash,
        "code_version": manifest.code_version,
    }


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``out`` and rename: no incomplete file is visible, and a failure keeps the previous one."""
    temporary = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, out)
        sync_folder(out.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # the writers pass on a full disk in their own way
        why = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise ConfigError(f"--out {out}: cannot be written: {why}; make room or choose another") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
