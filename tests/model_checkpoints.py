"""Committed checkpoints of real (tiny) models, written by the code's own functions without a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitgraft.configs.load import dump_recipe, validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.files import write_safetensors
from vitgraft.trainer.checkpoint.save import store_frozen

CLASSES = ["ant", "bee", "cat"]


def model_of(recipe: Recipe, classes: int = len(CLASSES), seed: int = 0) -> GraftedModel:
    """The recipe's model with random weights, random in norms, grafts and statistics too, in evaluation mode."""
    torch.manual_seed(seed)
    size = (recipe.data.image_size[0], recipe.data.image_size[1])
    model = build_model(recipe.model.without_weights(), num_classes=classes, image_size=size)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.05)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return model.eval()


def save_model(
    run: Path,
    tree: dict[str, Any],
    model: nn.Module,
    *,
    step: int = 3,
    world: int = 2,
    ema: float | None = None,
    classes: list[str] = CLASSES,
) -> Path:
    """Commit ``model`` as a checkpoint of a run with this recipe: masters cut over the ranks, frozen ones as a blob.

    ``ema``: the average is this times the weights; ``None``: there is none.
    """
    recipe = validate_recipe(tree, "recipe")
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_recipe(recipe))
    frozen = store_frozen(run, model)
    folder = commit.temporary_folder(run, step, 1)
    folder.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    buffers = {name: value.numpy() for name, value in model.state_dict().items() if name not in parameters}
    trained = {name: p.detach().numpy() for name, p in parameters.items() if p.requires_grad}
    records = [write_safetensors(folder / layout.BUFFERS, buffers)]
    kinds = {layout.MASTER: 1.0} | ({} if ema is None else {layout.EMA: ema})
    for rank in range(world):
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name, value in trained.items():
            start, stop = layout.even_range(value.size, rank, world)
            if start < stop:
                for kind, factor in kinds.items():
                    arrays[layout.range_key(kind, name, start)] = value.reshape(-1)[start:stop] * np.float32(factor)
        records.append(write_safetensors(folder / layout.shard_name(rank), arrays))
    data = recipe.data
    manifest = layout.Manifest(
        run=run.name,
        attempt=1,
        step=step,
        samples=4 * step,
        data=layout.DataState(fingerprint="f", seed=0, epoch=0, cursor=4 * step),
        world=world,
        zero_stage=2,
        recipe_hash=recipe.identity_hash(),
        classes=classes,
        normalisation=layout.Normalisation(mean=data.mean, std=data.std, image_size=data.image_size),
        parameters={name: list(value.shape) for name, value in trained.items()},
        kinds=list(kinds),
        scalars={},
        groups=[],
        frozen=frozen,
        code_version="0",
        created=0.0,
        files=records,
    )
    return commit.commit(run, manifest)
