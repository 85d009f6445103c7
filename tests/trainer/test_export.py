"""Exports hold what the model holds, and compute what it computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_checkpoints import CLASSES, model_of, save_model
from safetensors import safe_open
from safetensors.torch import load_file
from support import tiny_recipe

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.weights import load_weights
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.export import EXTRA_FILE, export

IMAGE_HEAD = {"name": "image_classifier"}


def image_tree(**settings: Any) -> dict[str, Any]:
    """An image classifier on a plain trunk: everything in its state dict is timm's but the head."""
    tree = tiny_recipe("semantic", "data", model__head=IMAGE_HEAD, model__adapter=[], data__image_size=[32, 32])
    for key, value in settings.items():
        tree["model"][key] = value
    return tree


def checkpoint_of(folder: Path, tree: dict[str, Any], **options: Any) -> tuple[Recipe, Checkpoint, GraftedModel]:
    recipe = validate_recipe(tree, "recipe")
    model = model_of(recipe)
    return recipe, open_checkpoint(save_model(folder / "run", tree, model, **options)), model


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def test_the_whole_model_under_its_own_names(tmp_path: Path) -> None:
    tree = tiny_recipe("semantic", "data", model__backbone__frozen=True)
    recipe, checkpoint, model = checkpoint_of(tmp_path, tree, ema=0.5)
    export(recipe, checkpoint, tmp_path / "raw.safetensors", "safetensors", weights="raw")
    export(recipe, checkpoint, tmp_path / "ema.safetensors", "safetensors")
    raw, ema, own = load_file(tmp_path / "raw.safetensors"), load_file(tmp_path / "ema.safetensors"), model.state_dict()
    assert raw.keys() == ema.keys() == own.keys()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert 0 < len(trained) < len(own)
    for name, value in own.items():
        assert torch.equal(raw[name], value), name
        assert torch.equal(ema[name], value * 0.5 if name in trained else value), name
    facts = metadata(tmp_path / "ema.safetensors")
    assert json.loads(facts["classes"]) == CLASSES
    assert json.loads(facts["mean"]) == recipe.data.mean
    assert json.loads(facts["image_size"]) == [128, 128]
    assert (facts["step"], facts["weights"], facts["task"]) == ("3", "ema", "semantic")
    assert facts["recipe_hash"] == recipe.identity_hash()
    assert validate_recipe({**tree, "model": json.loads(facts["model"])}, "facts").model == recipe.model


def test_a_plain_trunk_is_timms(tmp_path: Path) -> None:
    """timm loads it strictly and computes what the trunk computes."""
    backbone = {"name": "vit", "timm": "vit_tiny_patch16_224"}
    recipe, checkpoint, model = checkpoint_of(tmp_path, image_tree(backbone=backbone), ema=None)
    out = tmp_path / "trunk.safetensors"
    assert "trunk" in export(recipe, checkpoint, out, "safetensors", part="backbone")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    vit.load_state_dict(load_file(out), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.backbone(images)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(vit.forward_features(images)[:, 1:], ours)


def test_lora_is_merged_into_the_trunk(tmp_path: Path) -> None:
    backbone = {"name": "vit", "timm": "vit_tiny_patch16_224", "frozen": True}
    tree = image_tree(backbone=backbone, adapter=[{"name": "lora", "rank": 2}])
    recipe, checkpoint, model = checkpoint_of(tmp_path, tree)
    out = tmp_path / "trunk.safetensors"
    assert "lora merged into 12 layers" in export(recipe, checkpoint, out, "safetensors", part="backbone")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    vit.load_state_dict(load_file(out), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.backbone(images)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(vit.forward_features(images)[:, 1:], ours, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_said(tmp_path: Path) -> None:
    tree = image_tree(adapter=[{"name": "adaptformer", "bottleneck": 4}])
    recipe, checkpoint, model = checkpoint_of(tmp_path, tree)
    out = tmp_path / "trunk.safetensors"
    line = export(recipe, checkpoint, out, "safetensors", part="backbone")
    grafted = [name for name in load_file(out) if ".adaptmlp." in name]
    assert f"{len(grafted)} tensors of adaptformer, without which it computes something else" in line
    assert metadata(out)["contents"] == line
    # The way back: a trunk with the same graft loads it whole.
    torch.manual_seed(5)
    other = build_model(recipe.model, num_classes=3, image_size=(32, 32))
    load_weights({"backbone": other.backbone}, load_file(out), where="test")
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(other.backbone.state_dict()[name], value), name


EVERY_TRUNK: dict[str, dict[str, Any]] = {
    "beit": {"name": "beit", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    "eva02": {
        "name": "eva02",
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "window_size": 4,
        "global_blocks": [1],
    },
    "eva01": {
        "name": "eva01",
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "window_size": 4,
        "global_blocks": [1],
    },
}


@pytest.mark.parametrize("name", EVERY_TRUNK)
def test_the_trunks_written_here_go_round(tmp_path: Path, name: str) -> None:
    """Exported under official names and read by the loader of official files, every tensor is the same."""
    recipe, checkpoint, model = checkpoint_of(tmp_path, image_tree(backbone=EVERY_TRUNK[name]))
    out = tmp_path / "trunk.safetensors"
    export(recipe, checkpoint, out, "safetensors", part="backbone")
    torch.manual_seed(5)
    other = build_model(recipe.model, num_classes=3, image_size=(32, 32)).backbone
    load_weights(other, load_file(out), where="test", strict=True)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "semantic": ("semantic", {}),
    "semantic, vit_adapter": (
        "semantic",
        {"model__adapter": [{"name": "vit_adapter", "deform_num_heads": 2, "interaction_indexes": [[0, 0], [1, 1]]}]},
    ),
    "video, adaptformer": ("video", {}),
    "video, vpt, clips": (
        "video",
        {
            "model__backbone": {"name": "videomae", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
            "model__adapter": [],
            "model__head": {"name": "classifier"},
        },
    ),
    "semantic, mimdet": (
        "semantic",
        {
            "model__backbone": {"name": "mimdet", "embed_dim": 32, "depth": 2, "num_heads": 2},
            "model__adapter": [{"name": "fpn", "channels": 16}],
        },
    ),
    "image, lora": ("semantic", {"model__adapter": [{"name": "lora", "rank": 2}], "model__head": IMAGE_HEAD}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_computes_what_the_model_computes(tmp_path: Path, name: str) -> None:
    task, settings = PROGRAMS[name]
    recipe, checkpoint, model = checkpoint_of(tmp_path, tiny_recipe(task, "data", **settings))
    out = tmp_path / "model.pt2"
    export(recipe, checkpoint, out, "torch-export")
    extra = {EXTRA_FILE: ""}
    program = torch.export.load(out, extra_files=extra).module()
    facts = json.loads(extra[EXTRA_FILE])
    assert facts["classes"] == CLASSES
    assert facts["std"] == recipe.data.std
    height, width = recipe.data.image_size
    frames = (recipe.data.clip.frames,) if recipe.task == "video" else ()
    for batch in (1, 3):
        images = torch.randn(batch, 3, *frames, height, width)
        with torch.no_grad():
            expected = model(images, torch.tensor([[height, width]] * batch))
        torch.testing.assert_close(program(images=images), expected, rtol=1e-5, atol=1e-5)


def test_a_detectors_program_gives_its_detections(tmp_path: Path) -> None:
    """All of it, suppression and masks included, for several images of several sizes at once."""
    tree = tiny_recipe("detection", "data", data__image_size=[64, 96])
    recipe = validate_recipe(tree, "recipe")
    model = model_of(recipe)
    with torch.no_grad():  # confident enough that there is something to find
        model.head.box_predictor.cls_score.weight.mul_(30)
        model.head.rpn.head.cls_logits.weight.mul_(30)
    checkpoint = open_checkpoint(save_model(tmp_path / "run", tree, model))
    export(recipe, checkpoint, tmp_path / "model.pt2", "torch-export")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.manual_seed(1)
    for sizes in ([[64, 96]], [[64, 96], [40, 96], [64, 33]]):
        images, valid = torch.randn(len(sizes), 3, 64, 96), torch.tensor(sizes)
        with torch.no_grad():
            expected = model(images, valid)
        found = program(images=images, sizes=valid)
        for index, one in enumerate(expected):
            count = len(one["boxes"])
            assert count > 3
            assert (found["scores"][index] > 0).sum() == count
            assert (found["labels"][index, count:] == -1).all()
            for key in ("boxes", "scores", "labels", "masks"):
                torch.testing.assert_close(found[key][index, :count], one[key], rtol=1e-4, atol=1e-4)
    # Elsewhere there is torch and torchvision, and no vitgraft.
    code = (
        "import sys, torch, torchvision; program = torch.export.load(sys.argv[1]).module(); "
        "found = program(images=torch.zeros(2, 3, 64, 96), sizes=torch.tensor([[64, 96]] * 2)); "
        "assert found['boxes'].shape[::2] == (2, 4); "
        "assert not any(name.startswith('vitgraft') for name in sys.modules)"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_trunks_program(tmp_path: Path) -> None:
    recipe, checkpoint, model = checkpoint_of(tmp_path, tiny_recipe("video", "data"))
    export(recipe, checkpoint, tmp_path / "trunk.pt2", "torch-export", part="backbone")
    clip = torch.randn(1, 3, 4, 64, 64)
    found = torch.export.load(tmp_path / "trunk.pt2").module()(images=clip)
    with torch.no_grad():
        expected = model.backbone.forward_features(clip[0].transpose(0, 1))
    torch.testing.assert_close(found[0], expected)


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    recipe, checkpoint, _ = checkpoint_of(tmp_path, image_tree())
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists; add --overwrite"):
        export(recipe, checkpoint, out, "safetensors")
    assert out.read_text() == "mine"
    export(recipe, checkpoint, out, "safetensors", overwrite=True)
    assert "head.head.weight" in load_file(out)
    with pytest.raises(ConfigError, match=r"ends in \.pt2"):
        export(recipe, checkpoint, out, "torch-export", overwrite=True)
    with pytest.raises(ConfigError, match="holds no average"):
        export(recipe, checkpoint, tmp_path / "b.safetensors", "safetensors", weights="ema")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        export(recipe, checkpoint, tmp_path / "file" / "b.safetensors", "safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.safetensors", "run"]
