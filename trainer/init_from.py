"""``train.init_from``: a new run starts from the weights of another run's checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.files import home_path
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.weights import load_weights
from vitgraft.trainer import comm
from vitgraft.trainer.checkpoint.layout import EMA
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint, read_weights, resolve_checkpoint

log = logging.getLogger(__name__)


def start_from(
    source: str, model: GraftedModel, config: ModelConfig, classes: list[str], image_size: tuple[int, int]
) -> str:
    """Load the average of a run's weights where it has one, else its weights, into a new model; collective.

    Trunk, grafts, adapter and neck are loaded as from any other file of weights (matched, resized and reported by
    :func:`vitgraft.models.weights.load_weights`). The head's last layers start fresh when the classes are others, and
    all of it does when the other run's head was of another kind.

    Args:
        source: RUN or CHECKPOINT; of a run the newest valid one.
        classes: of the new run.

    Returns:
        One line on what was loaded and what was not.

    Raises:
        CheckpointError: no valid checkpoint there, or of another model.
    """
    checkpoint = _agree_on(home_path(source))
    where = f"train.init_from: {checkpoint.path}"
    with checkpoint.reading():
        state = {name: torch.from_numpy(np.asarray(value)) for name, value in read_weights(checkpoint).items()}
    parts: dict[str, nn.Module] = {"backbone": model.backbone, "adapter": model.adapter}
    if model.neck is not None:
        parts["neck"] = model.neck
    body = {name: value for name, value in state.items() if not name.startswith("head.")}
    sides = checkpoint.manifest.normalisation.image_size
    canvas = (sides[0], sides[1]) if len(sides) == 2 and min(sides) > 0 else None
    report = load_weights(parts, body, where=where, canvas=canvas)
    kind = "averaged weights" if EMA in checkpoint.manifest.kinds else "weights"
    told = [f"{count} tensors of the {part}" for part, count in report.loaded.items() if count]
    if report.fresh:
        told.append(f"fresh: {', '.join(report.fresh)}")
    told.append(_load_head(model, config, checkpoint, state, classes, image_size, where))
    line = f"started from the {kind} of {checkpoint.path}: {'; '.join(told)}"
    log.info("%s", line)
    return line


def _agree_on(source: Path) -> Checkpoint:
    """Return the checkpoint found and verified by rank 0, on all ranks: the other run may commit while ranks start."""
    found: tuple[str | None, str | None] = (None, None)
    if comm.rank() == 0:
        try:
            found = (str(resolve_checkpoint(source).path), None)
        except CheckpointError as error:
            found = (None, str(error))
    path, problem = comm.from_first(found)
    if path is None:
        raise CheckpointError(f"train.init_from: {problem}")
    return open_checkpoint(Path(path))


def _load_head(
    model: GraftedModel,
    config: ModelConfig,
    checkpoint: Checkpoint,
    state: dict[str, Tensor],
    classes: list[str],
    image_size: tuple[int, int],
    where: str,
) -> str:
    own = model.head.state_dict()
    theirs = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    if not own.keys() & theirs.keys():
        return "fresh: the head, which is of another kind there"
    fresh = set()
    if checkpoint.manifest.classes != classes:
        fresh = _bound_to_classes(model, config, len(classes), image_size)
    wanted = {name: value for name, value in own.items() if name not in fresh}
    for name, value in wanted.items():
        if name not in theirs or theirs[name].shape != value.shape:
            found = f"has shape {tuple(theirs[name].shape)} there" if name in theirs else "is missing there"
            raise CheckpointError(
                f"{where}: head.{name} {found}, expected {tuple(value.shape)}; use the same head options, or "
                "vitgraft export --part backbone and model.backbone.weights for the trunk alone"
            )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(theirs[name])
    told = f"{len(wanted)} tensors of the head"
    if not fresh:
        return told
    names = ", ".join(f"head.{name}" for name in own if name in fresh)
    there = len(checkpoint.manifest.classes)
    return f"{told}; fresh: {names} ({there} classes there, {len(classes)}{' others' * (there == len(classes))} here)"


def _bound_to_classes(model: nn.Module, config: ModelConfig, classes: int, image_size: tuple[int, int]) -> set[str]:
    """Return the names in the head whose shapes depend on the number of classes."""
    free = config.model_copy(update={"head": config.head.model_copy(update={"num_classes": None})}).without_weights()
    with torch.device("meta"):
        other = build_model(free, num_classes=classes + 1, image_size=image_size).head.state_dict()
    own = model.state_dict()
    return {name for name, value in other.items() if own[f"head.{name}"].shape != value.shape}
