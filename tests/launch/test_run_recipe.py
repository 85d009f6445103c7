"""Which recipe may go on with a run, and what one that may not is told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from support import tiny_recipe
from support_checkpoints import write

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import dump_recipe, validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.run_recipe import check_recipe
from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.manifest import read_manifest
from vitgraft.trainer.new_run import new_run

HOLD: dict[str, Any] = {"name": "step", "warmup": 0.0, "milestones": []}
WORDS = ["vitgraft", "train", "my recipe.yaml", "--set", "train.steps=9"]


def recipe_of(**settings: Any) -> Recipe:
    return validate_recipe(tiny_recipe("semantic", "nowhere", None, **settings), "test")


def run_of(folder: Path, recipe: Recipe, step: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_recipe(recipe))
    if step is not None:
        write(folder, step)
    return folder


def command_in(error: BaseException) -> list[str]:
    text = str(error)
    return shlex.split(text[text.rindex("vitgraft train") :])


def test_before_the_first_commit_any_recipe_goes_on(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", recipe_of())
    (run / "results").mkdir()
    for name in ("metrics.jsonl", "left_out.jsonl"):
        (run / name).write_text("{}\n")
    other = recipe_of(train__seed=3)
    handle = open_run(run, other, "auto")
    handle.close()
    assert handle.notes == [
        f"the recipe is another than at the last start; what that one left is moved to {run / 'set-aside-1'}"
    ]
    assert {path.name for path in (run / "set-aside-1").iterdir()} == {
        "reason.txt",
        "metrics.jsonl",
        "left_out.jsonl",
    }
    assert "seed: 3" in (run / "config.yaml").read_text()
    again = open_run(run, other, "auto")
    again.close()
    assert again.notes == []


@pytest.mark.parametrize("trace", ["a checkpoint", "its name", "the pointer"])
def test_what_was_committed_binds(tmp_path: Path, trace: str) -> None:
    run = run_of(tmp_path / "run", recipe_of(), 3)
    if trace != "a checkpoint":
        (run / "checkpoints" / "step-00000003").rename(tmp_path / "gone")
        (run / ("checkpoints/latest" if trace == "its name" else "committed")).unlink()
    with pytest.raises(ConfigError, match=r"train\.seed was 0, now 3; once a checkpoint is committed") as caught:
        open_run(run, recipe_of(train__seed=3), "auto", WORDS)
    assert command_in(caught.value) == [
        *WORDS,
        *("--run-dir", f"{run}-2", "--set", f"train.init_from={run}"),
    ]
    assert not (run / "attempt").exists()


def test_a_change_inside_a_list_is_named_by_its_key(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", recipe_of(), 3)
    other = tiny_recipe("semantic", "nowhere", None)
    before, other["model"]["adapter"]["channels"] = other["model"]["adapter"]["channels"], 24
    with pytest.raises(ConfigError, match=rf"model\.adapter\.0\.channels was {before}, now 24; once"):
        open_run(run, validate_recipe(other, "test"), "auto")
    other["model"]["adapter"] = [{"name": "adaptformer", "bottleneck": 8}, other["model"]["adapter"]]
    with pytest.raises(ConfigError, match=r"model\.adapter was \[\{.*\}\], now \[\{.*\}\]; once"):
        open_run(run, validate_recipe(other, "test"), "auto")


def test_starting_afresh_forgets_the_order_of_another_recipe(tmp_path: Path) -> None:
    """Entries are left out by their place in an order, which the seed decides."""
    run = run_of(tmp_path / "run", recipe_of(), 3)
    (run / "left_out.jsonl").write_text('{"entries": [[0, 1]]}\n')
    open_run(run, recipe_of(), "never").close()
    assert (run / "left_out.jsonl").exists()
    open_run(run, recipe_of(train__seed=3), "never").close()
    assert not (run / "left_out.jsonl").exists()


@pytest.mark.parametrize("damage", [b"\xff", b"a: [", b"a: 1\na: 2\n", b"[1]\n", b""], ids=repr)
def test_a_damaged_record_of_the_recipe_does_not_keep_a_run_from_going_on(tmp_path: Path, damage: bytes) -> None:
    recipe = recipe_of()
    run = run_of(tmp_path / "run", recipe)
    folder = commit.temporary_folder(run, 3, 1)
    write(run, 3)
    manifest = read_manifest(run / "checkpoints" / "step-00000003" / layout.MANIFEST)
    changed = manifest.model_copy(update={"recipe_hash": recipe.identity_hash(), "digest": None})
    (run / "checkpoints" / "step-00000003" / layout.MANIFEST).write_text(layout.seal(changed).model_dump_json())
    config = run / "config.yaml"
    config.write_bytes(damage + config.read_bytes() if damage == b"\xff" else damage)
    with pytest.raises(ConfigError, match="its checkpoints were written under another recipe") as caught:
        open_run(run, recipe_of(train__seed=3), "auto")
    assert command_in(caught.value)[-1] == f"train.init_from={run}"
    handle = open_run(run, recipe, "auto")
    handle.close()
    assert not folder.exists()
    assert "by its checkpoints the recipe is the same" in handle.notes[0]
    assert handle.resume is not None
    assert config.read_text() == dump_recipe(recipe)


def test_the_command_names_one_source_of_weights_and_a_folder_that_is_free(tmp_path: Path) -> None:
    run = tmp_path / "a run: #1"
    run.mkdir()
    (tmp_path / "a run: #1-2").mkdir()
    words = shlex.split(new_run(run, recipe_of(model__backbone__weights="a.pth")))
    assert words[:5] == ["vitgraft", "train", f"{run}/config.yaml", "--run-dir", f"{run}-3"]
    assert words[5:] == ["--set", f'train.init_from="{run}"', "--set", "model.backbone.weights=null"]


@pytest.mark.parametrize("ends_at", [1.0, 0.0])
def test_a_longer_run_is_told_how_to_add_a_stage(tmp_path: Path, ends_at: float) -> None:
    schedule = {"name": "cosine", "final": ends_at}
    run = run_of(tmp_path / "run", recipe_of(train__steps=6, train__schedule=schedule), 6)
    longer = recipe_of(train__steps=9, train__schedule=schedule)
    with pytest.raises(ConfigError, match=r"train\.steps was 6, now 9; its schedule ends there") as caught:
        open_run(run, longer, "auto", WORDS)
    stage = '{"steps": 3}' if ends_at else '{"steps": 3, "schedule": {"name": "cosine"}}'
    assert command_in(caught.value) == [
        *WORDS,
        *("--run-dir", str(run), "--set", "train.steps=6", "--set", f"train.extend=[{stage}]"),
    ]


BASE: dict[str, Any] = {"train__steps": 6, "train__schedule": HOLD}
DECAY = {"steps": 4, "schedule": {"name": "cosine"}}


@pytest.mark.parametrize(
    ("old", "new", "step", "fits"),
    [
        ([], [{"steps": 3}], 6, True),
        ([{"steps": 3}], [], 6, True),
        ([{"steps": 3}], [], 7, False),
        ([{"steps": 3}], [{"steps": 5}], 8, True),
        ([{"steps": 3}], [{"steps": 2}], 8, True),
        ([{"steps": 3}], [{"steps": 1}], 8, False),
        ([{"steps": 3}], [{"steps": 3}, DECAY], 9, True),
        ([{"steps": 3}, DECAY], [{"steps": 4}, {"steps": 2}], 9, True),
        ([{"steps": 3}, DECAY], [{"steps": 4}, DECAY], 10, False),
        ([DECAY], [{**DECAY, "steps": 5}], 6, True),
        ([DECAY], [{**DECAY, "steps": 5}], 7, False),
        ([DECAY], [{**DECAY, "lr": 0.1}], 7, False),
        ([DECAY], [DECAY, DECAY], 10, True),
    ],
)
def test_stages_that_have_begun_stay_as_they_are(
    tmp_path: Path, old: list[Any], new: list[Any], step: int, fits: bool
) -> None:
    run = run_of(tmp_path / "run", recipe_of(**BASE, train__extend=old), step)
    recipe = recipe_of(**BASE, train__extend=new)
    if fits:
        assert check_recipe(run, recipe, "auto", None) is None
        return
    with pytest.raises(ConfigError, match=r"train\.extend\.\d has begun") as caught:
        check_recipe(run, recipe, "auto", None)
    assert command_in(caught.value)[-1].startswith("train.extend=[{")


def test_a_stage_that_was_lengthened_after_its_begin_is_followed_by_another(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", recipe_of(**BASE, train__extend=[DECAY]), 7)
    with pytest.raises(ConfigError, match=r"extend\.0 has begun") as caught:
        check_recipe(run, recipe_of(**BASE, train__extend=[{**DECAY, "steps": 9}]), "auto", None)
    stages = json.loads(command_in(caught.value)[-1].removeprefix("train.extend="))
    assert [stage["steps"] for stage in stages] == [4, 5]
    assert check_recipe(run, recipe_of(**BASE, train__extend=stages), "auto", None) is None


@pytest.mark.parametrize("config", ["gone", "damaged"])
@pytest.mark.parametrize("step", [6, 7])
def test_without_its_record_a_run_is_not_shortened_without_a_word(tmp_path: Path, config: str, step: int) -> None:
    recipe = recipe_of(**BASE)
    run = run_of(tmp_path / "run", recipe, step)
    path = run / "checkpoints" / layout.step_name(step) / layout.MANIFEST
    changed = read_manifest(path).model_copy(update={"recipe_hash": recipe.identity_hash(), "digest": None})
    path.write_text(layout.seal(changed).model_dump_json())
    if config == "gone":
        (run / "config.yaml").unlink()
    else:
        (run / "config.yaml").write_text("a: [")
    if step == 6:
        open_run(run, recipe, "auto").close()
        return
    with pytest.raises(ConfigError, match="step 7 lies behind the end of this recipe, 6 steps") as caught:
        open_run(run, recipe, "auto")
    assert "\n" not in str(caught.value)
    open_run(run, recipe_of(**BASE, train__extend=[{"steps": 1}]), "auto").close()


@pytest.mark.parametrize(
    ("extend", "problem"),
    [
        ([{}], "exactly one of epochs and steps"),
        ([{"steps": 1, "epochs": 1}], "exactly one of epochs and steps"),
        ([{"epochs": 1}], r"extend\.0: the run is counted in steps"),
        ([{"steps": 1, "lr": 0.1}], "lr is of a schedule"),
        ([DECAY, {"steps": 1}], r"extend\.1: the schedule before it ends with a rate of 0"),
    ],
)
def test_stages_that_make_no_sense_are_refused(extend: list[Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        recipe_of(**BASE, train__extend=extend)


def test_a_stage_that_is_added_keeps_the_identity() -> None:
    assert recipe_of(**BASE).identity_hash() == recipe_of(**BASE, train__extend=[DECAY]).identity_hash()
