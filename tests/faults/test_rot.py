"""Whatever rots in a checkpoint is named, the one before is taken loudly, and without one nothing starts afresh."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_checkpoints import model_of, save_model
from support import tiny_recipe

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.load import validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.run_dir import open_run
from vitgraft.trainer.checkpoint.layout import Manifest
from vitgraft.trainer.checkpoint.read import newest_valid, open_checkpoint, verify

TREE = tiny_recipe("video", "data", model__backbone__frozen=True)
FILES = ["buffers.safetensors", "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints of different weights over one frozen trunk."""
    run = tmp_path_factory.mktemp("pristine") / "run"
    recipe = validate_recipe(TREE, "recipe")
    model = model_of(recipe)
    for step in (3, 6):
        save_model(run, TREE, model, step=step, ema=0.5)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0 + len(name))
    assert newest_valid(run)[1] == []
    return run


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000006"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def assert_previous_is_taken(run: Path, name: str) -> None:
    """By the reader and, in so many words, by whoever starts the run again; then exit 4 when that one goes too."""
    found, invalid = newest_valid(run)
    assert found is not None
    assert found.step == 3
    ((path, reason),) = invalid
    assert path.name == "step-00000006"
    assert name in reason
    handle = open_run(run, recipe_of(run), "auto")
    handle.close()
    assert handle.resume is not None
    assert handle.resume.step == 3
    assert any("WARNING step-00000006 is invalid" in note and name in note for note in handle.notes)
    assert (run / "set-aside-1" / "step-00000006").is_dir()
    shutil.rmtree(run / "set-aside-1")
    flip(run / "checkpoints" / "step-00000003" / "rank-00000.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"no valid checkpoint is left .*--resume never") as caught:
        open_run(run, recipe_of(run), "auto")
    assert caught.value.exit_code == 4


def recipe_of(run: Path) -> Recipe:
    return validate_recipe(TREE, "recipe")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit(run: Path, file: str, where: str) -> None:
    path = newest(run) / file
    size = path.stat().st_size
    flip(path, {"first": 0, "middle": size // 2, "last": size - 1}[where])
    assert_previous_is_taken(run, file)


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file(run: Path, file: str) -> None:
    path = newest(run) / file
    os.truncate(path, path.stat().st_size - 8)
    assert_previous_is_taken(run, file)


@pytest.mark.parametrize("file", FILES)
def test_a_deleted_file(run: Path, file: str) -> None:
    (newest(run) / file).unlink()
    assert_previous_is_taken(run, file)


@pytest.mark.parametrize("file", FILES)
def test_an_unreadable_kind_of_file(run: Path, file: str) -> None:
    (newest(run) / file).unlink()
    (newest(run) / file).mkdir()
    assert_previous_is_taken(run, file)


def test_two_ranks_files_swapped(run: Path) -> None:
    one, two = newest(run) / "rank-00000.safetensors", newest(run) / "rank-00001.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert_previous_is_taken(run, "step-00000006/rank-0000")


@pytest.mark.parametrize("file", FILES[1:])
def test_a_file_of_another_step(run: Path, file: str) -> None:
    """Of the same size: only its hash, or for the manifest its step, tells."""
    why = "the manifest is of step 3" if file == "manifest.json" else "SHA-256 differs"
    other = run / "checkpoints" / "step-00000003" / file
    assert other.read_bytes() != (newest(run) / file).read_bytes()
    shutil.copy(other, newest(run) / file)
    assert_previous_is_taken(run, f"step-00000006/{file}: {why}")


def test_a_damaged_frozen_trunk_takes_all_with_it(run: Path) -> None:
    """Every checkpoint names it, so none is left; nothing starts afresh by itself."""
    (blob,) = (run / "blobs").iterdir()
    flip(blob, -1)
    with pytest.raises(CheckpointError, match=f"no valid checkpoint is left .*{blob.name}.*frozen trunk was damaged"):
        open_run(run, recipe_of(run), "auto")
    blob.unlink()
    with pytest.raises(CheckpointError, match=f"{blob.name}: missing"):
        verify(open_checkpoint(newest(run)))


EDITS: dict[str, Callable[[Any], Any]] = {
    "schema_version": lambda value: value + 1,
    "run": lambda value: value + "x",
    "attempt": lambda value: value + 1,
    "step": lambda value: value + 1,
    "samples": lambda value: value + 1,
    "data": lambda value: {**value, "cursor": value["cursor"] + 1},
    "world": lambda value: value + 1,
    "zero_stage": lambda value: 3 - value,
    "recipe_hash": lambda value: value[::-1],
    "classes": lambda value: value[::-1],
    "normalisation": lambda value: {**value, "mean": [0.0, 0.0, 0.0]},
    "parameters": lambda value: dict(list(value.items())[1:]),
    "kinds": lambda value: value[:1],
    "scalars": lambda value: {**value, "step": 7.0},
    "groups": lambda value: [*value, {"lr": 1.0}],
    "frozen": lambda value: None,
    "ema_ramped": lambda value: not value,
    "code_version": lambda value: value + "1",
    "created": lambda value: value + 1.0,
    "files": lambda value: value[1:],
    "digest": lambda value: value[::-1],
}


def test_every_field_of_the_manifest_has_an_edit() -> None:
    assert EDITS.keys() == Manifest.model_fields.keys()


@pytest.mark.parametrize("field", EDITS)
def test_an_edited_manifest(run: Path, field: str) -> None:
    file = newest(run) / "manifest.json"
    tree = json.loads(file.read_text())
    tree[field] = EDITS[field](tree[field])
    file.write_text(json.dumps(tree, indent=1))
    assert_previous_is_taken(run, "manifest.json")


@pytest.mark.parametrize("left", [{}, {"digest": None}], ids=["none", "null"])
def test_a_manifest_without_its_digest(run: Path, left: dict[str, None]) -> None:
    """Whoever edits the manifest does not get by with taking the digest out."""
    file = newest(run) / "manifest.json"
    tree = json.loads(file.read_text())
    del tree["digest"]
    file.write_text(json.dumps({**tree, **left}))
    assert_previous_is_taken(run, "manifest.json: was edited or damaged")
