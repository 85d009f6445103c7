"""The weights to go on from: straight into the model's own memory, frozen ones and statistics too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import model_of, save_model
from support import tiny_recipe

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.load import validate_recipe
from vitgraft.models.build import GraftedModel
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.checkpoint.save import load_checkpoint


def written(run: Path, **settings: Any) -> tuple[GraftedModel, Checkpoint, GraftedModel]:
    """A model, its checkpoint (with an average that is another), and a model of other weights."""
    tree = tiny_recipe("semantic", "data", **settings)
    model = model_of(validate_recipe(tree, "recipe"))
    checkpoint = open_checkpoint(save_model(run, tree, model, ema=0.5))
    return model, checkpoint, model_of(validate_recipe(tree, "recipe"), seed=1)


@pytest.mark.parametrize("frozen", [False, True])
def test_all_weights_arrive_where_they_were(tmp_path: Path, frozen: bool) -> None:
    model, checkpoint, other = written(tmp_path, model__backbone__frozen=frozen)
    assert (checkpoint.manifest.frozen is not None) == frozen
    memory = [parameter.data_ptr() for parameter in other.parameters()]
    load_checkpoint(other, checkpoint)
    assert [parameter.data_ptr() for parameter in other.parameters()] == memory
    expected = model.state_dict()
    assert other.state_dict().keys() == expected.keys()
    for name, value in other.state_dict().items():
        assert (value == expected[name]).all(), name


def test_weights_of_another_type_are_converted(tmp_path: Path) -> None:
    model, checkpoint, other = written(tmp_path)
    load_checkpoint(other.to(torch.bfloat16), checkpoint)
    for (name, value), wanted in zip(other.named_parameters(), model.parameters(), strict=True):
        assert (value == wanted.to(torch.bfloat16)).all(), name


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    _, checkpoint, _ = written(tmp_path)
    tree = tiny_recipe("semantic", "data", model__head__channels=24)
    with pytest.raises(CheckpointError, match=r"a checkpoint of another model: head\.\S+ has shape"):
        load_checkpoint(model_of(validate_recipe(tree, "recipe")), checkpoint)
    tree = tiny_recipe("semantic", "data", model__backbone__depth=3)
    with pytest.raises(CheckpointError, match=r"a checkpoint of another model: it lacks backbone\."):
        load_checkpoint(model_of(validate_recipe(tree, "recipe")), checkpoint)
