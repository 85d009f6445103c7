"""A new run from another run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import CLASSES, model_of, save_model
from support import tiny_recipe
from timm.layers import resample_abs_pos_embed

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.load import validate_recipe
from vitgraft.configs.schema.identity import differences
from vitgraft.models.build import GraftedModel
from vitgraft.trainer.init_from import start_from


def started(
    source: Path, tree: dict[str, Any], classes: list[str] = CLASSES
) -> tuple[GraftedModel, dict[str, torch.Tensor], str]:
    """A new model of this recipe after the start, its state before, and what was said."""
    recipe = validate_recipe(tree, "recipe")
    model = model_of(recipe, len(classes), seed=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = (recipe.data.image_size[0], recipe.data.image_size[1])
    return model, before, start_from(str(source), model, recipe.model, classes, size)


@pytest.mark.parametrize("task", ["detection", "semantic", "video"])
def test_the_average_of_everything(tmp_path: Path, task: str) -> None:
    """Trunk, grafts, adapter, head and statistics; of a run its newest checkpoint."""
    tree = tiny_recipe(task, "data")
    source = model_of(validate_recipe(tree, "recipe"))
    save_model(tmp_path / "run", tree, model_of(validate_recipe(tree, "recipe"), seed=3), step=2)
    save_model(tmp_path / "run", tree, source, step=5, ema=0.5)
    model, _, line = started(tmp_path / "run", tree)
    assert "averaged weights of" in line
    assert "step-00000005" in line
    assert "fresh" not in line
    parameters = {name for name, _ in source.named_parameters()}
    for name, value in source.state_dict().items():
        wanted = value * 0.5 if name in parameters else value
        assert torch.equal(model.state_dict()[name], wanted), name


FRESH = {
    "detection": {
        "head.box_predictor.cls_score.weight",
        "head.box_predictor.cls_score.bias",
        "head.box_predictor.bbox_pred.weight",
        "head.box_predictor.bbox_pred.bias",
        "head.mask_predictor.mask_fcn_logits.weight",
        "head.mask_predictor.mask_fcn_logits.bias",
    },
    "semantic": {"head.classifier.weight", "head.classifier.bias", "head.auxiliary.2.weight", "head.auxiliary.2.bias"},
    "video": {"head.classifier.weight", "head.classifier.bias"},
}


@pytest.mark.parametrize("task", FRESH)
@pytest.mark.parametrize("classes", [["ant", "bee"], ["x", "y", "z"]], ids=["fewer", "others"])
def test_other_classes_leave_the_last_layers_fresh(tmp_path: Path, task: str, classes: list[str]) -> None:
    tree = tiny_recipe(task, "data")
    source = model_of(validate_recipe(tree, "recipe"))
    checkpoint = save_model(tmp_path / "run", tree, source)
    model, before, line = started(checkpoint, tree, classes)
    assert f"3 classes there, {len(classes)}" in line
    for name, value in model.state_dict().items():
        if name in FRESH[task]:
            assert name in line
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, source.state_dict()[name]), name


def test_another_kind_of_head_starts_fresh(tmp_path: Path) -> None:
    source_tree = tiny_recipe("semantic", "data")
    source = model_of(validate_recipe(source_tree, "recipe"))
    checkpoint = save_model(tmp_path / "run", source_tree, source)
    model, before, line = started(checkpoint, tiny_recipe("detection", "data"))
    assert "of another kind there" in line
    for name, value in model.state_dict().items():
        wanted = before[name] if name.startswith("head.") else source.state_dict()[name]
        assert torch.equal(value, wanted), name


def test_positions_of_an_oblong_canvas_are_known_to_be_so(tmp_path: Path) -> None:
    """2 × 8 places are as many as 4 × 4."""
    tree = tiny_recipe("semantic", "data", data__image_size=[16, 64])
    source = model_of(validate_recipe(tree, "recipe"))
    checkpoint = save_model(tmp_path / "run", tree, source)
    table = source.state_dict()["backbone.vit.pos_embed"]
    for size, grid in ([32, 32], [4, 4]), ([24, 40], [3, 5]), ([16, 64], [2, 8]):
        model, _, _ = started(checkpoint, tiny_recipe("semantic", "data", data__image_size=size))
        expected = resample_abs_pos_embed(table, grid, [2, 8], num_prefix_tokens=0, antialias=False)
        torch.testing.assert_close(model.state_dict()["backbone.vit.pos_embed"], expected)


def test_another_canvas_resizes_positions(tmp_path: Path) -> None:
    tree = tiny_recipe("semantic", "data")
    checkpoint = save_model(tmp_path / "run", tree, model_of(validate_recipe(tree, "recipe")))
    model, _, _ = started(checkpoint, tiny_recipe("semantic", "data", data__image_size=[64, 64]))
    assert model.backbone.state_dict()["vit.pos_embed"].shape[1] == 64


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    tree = tiny_recipe("semantic", "data")
    run = tmp_path / "run"
    checkpoint = save_model(run, tree, model_of(validate_recipe(tree, "recipe")))
    wider = tiny_recipe("semantic", "data", model__backbone__embed_dim=64)
    with pytest.raises(CheckpointError, match=r"train\.init_from: .*name the weights of the same architecture"):
        started(checkpoint, wider)
    other_head = tiny_recipe("semantic", "data", model__head__channels=24)
    with pytest.raises(CheckpointError, match=r"head\.\S+ has shape .*--part backbone"):
        started(checkpoint, other_head)
    with pytest.raises(CheckpointError, match=r"train\.init_from: .*no such run"):
        started(tmp_path / "none", tree)
    shard = checkpoint / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"train\.init_from: .*SHA-256 differs"):
        started(run, tree)


def test_the_recipe() -> None:
    """Part of what a run is; not beside other weights; runs of before the key keep their identity."""
    plain = validate_recipe(tiny_recipe("semantic", "data"), "recipe")
    assert "init_from" not in differences(plain)["train"]
    named = validate_recipe(tiny_recipe("semantic", "data", train__init_from="runs/a"), "recipe")
    assert named.identity_hash() != plain.identity_hash()
    for key in ("model__weights", "model__backbone__weights"):
        with pytest.raises(ConfigError, match=r"init_from names weights for the trunk too; remove model\."):
            validate_recipe(tiny_recipe("semantic", "data", train__init_from="runs/a", **{key: "a.pth"}), "recipe")
