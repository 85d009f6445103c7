"""Images are normalised as the trunk's weights want them, where the recipe does not say how."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.load import dump_recipe, load_recipe
from vitgraft.launch import training
from vitgraft.launch.normalisation import with_normalisation
from vitgraft.launch.ui import Screen
from vitgraft.models.pretrained import normalisation_of

HALF = [0.5, 0.5, 0.5]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def resolved(*changes: str, run: Path = Path("none"), resume: str = "auto") -> tuple[Any, list[str]]:
    notes: list[str] = []
    recipe = with_normalisation(load_recipe("starter/coco", list(changes)), run, resume, notes.append)
    return recipe, notes


def test_timms_weights_bring_their_own_numbers() -> None:
    recipe, notes = resolved("model.backbone.weights=timm")
    assert (recipe.data.mean, recipe.data.std) == (HALF, HALF)
    assert len(notes) == 1
    assert "data.mean [0.5, 0.5, 0.5]" in notes[0]
    assert "as the weights were trained; the recipe gives none" in notes[0]
    hub = "model.backbone.weights=hf:timm/vit_small_patch16_224.augreg_in21k/model.safetensors"
    assert resolved(hub)[0].data.std == HALF


def test_numbers_of_the_recipe_stay_and_are_said_to_differ() -> None:
    recipe, notes = resolved("model.backbone.weights=timm", "data.mean=[0.485, 0.456, 0.406]")
    assert (recipe.data.mean, recipe.data.std) == (IMAGENET[0], HALF)
    assert "data.std [0.5, 0.5, 0.5]: as the weights were trained" in notes[0]
    assert "but the weights were trained with [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]; set both" in notes[1]
    recipe, notes = resolved("model.backbone.weights=timm", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")
    assert (recipe.data.mean, notes) == (HALF, [])


def test_nothing_changes_where_the_weights_say_nothing_or_the_same() -> None:
    plain = load_recipe("starter/coco")
    recipe, notes = resolved()
    assert (recipe.identity_hash(), notes) == (plain.identity_hash(), [])
    name = "model.backbone.timm=vit_base_patch16_224.mae"
    recipe, notes = resolved("model.backbone.weights=timm", name)
    assert (recipe.data.mean, recipe.data.std, notes) == (*IMAGENET, [])
    assert recipe.identity_hash() == load_recipe("starter/coco", ["model.backbone.weights=timm", name]).identity_hash()


def test_of_a_file_beside_a_timm_name_there_is_only_a_note(tmp_path: Path) -> None:
    (tmp_path / "vit_s.pth").write_bytes(b"x" * 100)
    recipe, notes = resolved(f"model.backbone.weights={tmp_path / 'vit_s.pth'}")
    assert (recipe.data.mean, recipe.data.std) == IMAGENET
    assert len(notes) == 1
    assert "but timm's weights of 'vit_small_patch16_224' were trained with [0.5, 0.5, 0.5]" in notes[0]


def test_an_exported_file_brings_its_own_numbers(tmp_path: Path) -> None:
    file = tmp_path / "export.safetensors"
    save_file({"a": torch.ones(1)}, file, {"mean": "[0.1, 0.2, 0.3]", "std": "[0.4, 0.5, 1]", "image_size": "[24, 40]"})
    for key in "model.backbone.weights", "model.weights":
        recipe, notes = resolved(f"{key}={file}")
        assert (recipe.data.mean, recipe.data.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 1.0])
        assert len(notes) == 1
    for wrong in ({"mean": "[0.1]"}, {"std": "[0, 1, 1]"}, {"std": '[1, 1, "x"]'}, {"std": "[1, 1, 1e999]"}):
        save_file({"a": torch.ones(1)}, file, {"mean": "[0.1, 0.2, 0.3]", "std": "[0.4, 0.5, 1]"} | wrong)
        assert resolved(f"model.backbone.weights={file}")[0].data.mean == IMAGENET[0]


def test_a_run_that_begins_with_anothers_weights_takes_its_numbers(tmp_path: Path) -> None:
    for source in write(tmp_path / "run", 3), tmp_path / "run":
        recipe, notes = resolved(f"train.init_from={source}")
        assert (recipe.data.mean, recipe.data.std) == ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
        assert len(notes) == 1
    assert resolved(f"train.init_from={tmp_path / 'none'}")[1] == []


def test_unknown_names_and_tags_are_left_to_the_trunk() -> None:
    for name in "vit_none", "vit_base_patch16_224.none":
        changes = ["model.backbone.weights=timm", f"model.backbone.timm={name}"]
        assert normalisation_of(load_recipe("starter/coco", changes).model) is None


def test_a_run_keeps_what_it_was_begun_with(tmp_path: Path) -> None:
    """One of an earlier version, which took ImageNet's."""
    run, _ = make_run(tmp_path / "run")
    old = load_recipe("starter/coco", ["model.backbone.weights=timm"])
    (run / "config.yaml").write_text(dump_recipe(old))
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    recipe, notes = resolved("model.backbone.weights=timm", run=run)
    assert recipe.identity_hash() == old.identity_hash()
    assert "but the weights were trained with [0.5, 0.5, 0.5]" in notes[0]
    assert resolved("model.backbone.weights=timm", run=run, resume="never")[0].data.mean == HALF
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    assert resolved("model.backbone.weights=timm", run=run)[0].data.mean == HALF


def test_the_run_records_the_numbers_for_all_its_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start(*_: Any) -> None:
        raise Started

    monkeypatch.setattr(training, "check_data", lambda *_: 1)
    monkeypatch.setattr(training, "Supervisor", start)
    recipe = load_recipe("starter/coco", ["model.backbone.weights=timm", "train.global_batch=1"])
    with pytest.raises(Started):
        training.train(recipe, tmp_path / "run", Screen(), training.Where(processes=1))
    recorded = load_recipe(str(tmp_path / "run" / "config.yaml"))
    assert (recorded.data.mean, recorded.data.std) == (HALF, HALF)


def test_a_trunk_built_by_that_name_is_the_one_whose_numbers_they_are() -> None:
    """The tag that timm takes where the recipe names none."""
    import timm

    made = timm.create_model("vit_small_patch16_224", img_size=32, depth=1)
    known = normalisation_of(load_recipe("starter/coco", ["model.backbone.weights=timm"]).model)
    assert known is not None
    assert known[0].mean == list(made.pretrained_cfg["mean"])
