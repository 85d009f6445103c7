"""Checkpoints that earlier versions wrote, kept under tests/golden, are read and placed by this one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitgraft.configs.load import load_recipe
from vitgraft.models.build import build_model
from vitgraft.trainer.checkpoint.layout import BUFFERS, EMA, MASTER, even_range
from vitgraft.trainer.checkpoint.read import Checkpoint, VectorReader, read_all, read_weights, resolve_checkpoint
from vitgraft.trainer.checkpoint.save import TrainerState, load_model

GOLDEN = sorted((Path(__file__).resolve().parents[1] / "golden").glob("checkpoint-*"))


def test_there_is_one_and_it_is_small() -> None:
    assert GOLDEN
    for run in GOLDEN:
        assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < 100_000


@pytest.mark.parametrize("run", GOLDEN, ids=lambda run: run.name)
def test_every_vector_is_what_was_written(run: Path) -> None:
    """Cut for one rank and for three."""
    from golden.make import digests

    checkpoint = resolve_checkpoint(run)  # hashes are checked
    assert digests(checkpoint) == json.loads((run / "digests.json").read_text())
    reader = VectorReader(checkpoint)
    for name, shape in checkpoint.manifest.parameters.items():
        size = int(np.prod(shape))
        whole = reader.read(MASTER, name, 0, size)
        parts = [reader.read(MASTER, name, *even_range(size, rank, 3)) for rank in range(3)]
        assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("run", GOLDEN, ids=lambda run: run.name)
def test_a_run_goes_on_from_it(run: Path) -> None:
    """The model takes the weights, a trainer's state takes masters, optimizer and average, as after a start."""
    checkpoint = resolve_checkpoint(run)
    recipe, manifest = load_recipe(str(run / "config.yaml")), checkpoint.manifest
    size = (recipe.data.image_size[0], recipe.data.image_size[1])
    model = build_model(recipe.model, num_classes=len(manifest.classes), image_size=size)
    load_model(model, read_weights(checkpoint, ema=False), "golden")
    assert recipe.has_hash(manifest.recipe_hash), "a resume would be refused"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    # ZeRO-0 keeps the parameters where torch has them, so that no engine is needed.
    engine = SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    state = TrainerState(engine, recipe.train.ema)
    for parameter in trained:
        parameter.data.zero_()
    state.restore(checkpoint)
    assert state.ema is not None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = optimizer.state[parameter]
        assert kept["step"] == manifest.step
        places = {MASTER: parameter, EMA: state.ema.of(parameter)}
        places |= {kind: kept[kind] for kind in ("exp_avg", "exp_avg_sq")}
        assert places.keys() == set(manifest.kinds)
        for kind, value in places.items():
            assert (value.detach().numpy() == vector(checkpoint, kind, name)).all(), (kind, name)
    buffers = read_all(checkpoint.path / BUFFERS)
    assert any(name.endswith("running_var") for name in buffers)
    assert manifest.frozen is not None


def vector(checkpoint: Checkpoint, kind: str, name: str) -> np.ndarray:
    shape = checkpoint.manifest.parameters[name]
    return VectorReader(checkpoint).read(kind, name, 0, int(np.prod(shape))).reshape(shape)
