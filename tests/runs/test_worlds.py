"""What must not depend on how a run is distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import history, tiny_recipe, train, write_recipe


def run_with(folder: Path, name: str, tree: dict[str, Any], *arguments: str) -> dict[int, dict[str, Any]]:
    run = folder / name
    train(write_recipe(folder / f"{name}.yaml", tree), run, *arguments)
    return history(run)


def assert_same(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for step in theirs:
        assert ours[step]["samples"] == theirs[step]["samples"]
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=tolerance), step


STAGED: dict[str, Any] = {
    "train__layer_decay": 0.8,
    "train__param_groups": [{"match": r"^head\.", "lr_multiplier": 2.0}],
}


@pytest.fixture(scope="module")
def staged(
    detection_data: Path, semantic_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[int, dict[str, Any]]]]:
    """Two recipes of twenty steps with several parameter groups, and their runs under ZeRO-2.

    The stages add up the gradient's norm in different orders, and clipping multiplies the gradient by it; a detector
    whose proposals flip on a last bit parts from there. So the detector runs without clipping, and clipping is tried
    where nothing is selected.
    """
    folder = tmp_path_factory.mktemp("stages")
    sgd = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    trees = {
        "detection": tiny_recipe("detection", detection_data / "train", train__clip_grad=0.0, **STAGED),
        "clipped": tiny_recipe("semantic", semantic_data / "train", train__optimizer=sgd, **STAGED),
    }
    runs = {}
    for name, tree in trees.items():
        recipe = write_recipe(folder / f"{name}.yaml", tree)
        train(recipe, folder / name)
        runs[name] = recipe, history(folder / name)
    return runs


@pytest.mark.parametrize(
    ("name", "stage"), [("detection", 0), ("detection", 1), ("detection", 3), ("clipped", 0), ("clipped", 3)]
)
def test_zero_stages_give_the_same_losses(
    staged: dict[str, tuple[Path, dict[int, dict[str, Any]]]], tmp_path: Path, name: str, stage: int
) -> None:
    recipe, stage_2 = staged[name]
    run = tmp_path / "run"
    train(recipe, run, "--set", f"train.zero_stage={stage}")
    assert len(stage_2) == 20
    assert_same(history(run), stage_2, 1e-4)


def test_world_size_and_accumulation_change_nothing(semantic_data: Path, tmp_path: Path) -> None:
    """A recipe without randomness inside the model; 22 samples at 4 a step, so that short batches occur."""
    settings: dict[str, Any] = {"train__steps": 8, "train__optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}}
    tree = tiny_recipe("semantic", semantic_data / "train", **settings)
    two = run_with(tmp_path, "two", tree)
    one = run_with(tmp_path, "one", tree, "--processes", "1")
    assert_same(one, two, 1e-5)


def test_a_run_goes_on_at_another_world_and_stage(semantic_data: Path, tmp_path: Path) -> None:
    """Checkpoints are named ranges: written by two ranks under ZeRO-2, read by one under ZeRO-0, and so on."""
    tree = tiny_recipe("semantic", semantic_data / "train", train__steps=8, train__ema=0.9)
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    train(recipe, tmp_path / "whole")
    run = tmp_path / "moved"
    changes = [("3", "2", "2"), ("6", "1", "0"), ("8", "2", "3")]
    for position, (stop, processes, stage) in enumerate(changes):
        last = position == len(changes) - 1
        if last:
            train(recipe, run, "--processes", processes, "--set", f"train.zero_stage={stage}")
        else:
            stop_at(recipe, run, int(stop), processes, stage)
    # AdamW turns a gradient that is zero but for the order of sums into a whole step, hence not 1e-5 as above.
    assert_same(history(run), history(tmp_path / "whole"), 1e-4)


def stop_at(recipe: Path, run: Path, step: int, processes: str, stage: str) -> None:
    """Train until the checkpoint of ``step`` and end there."""
    from support import kill_group, start, wait_until

    process = start("train", recipe, "--run-dir", run, "--processes", processes, "--set", f"train.zero_stage={stage}")
    pointer = run / "checkpoints" / "latest"
    wait_until(lambda: pointer.exists() and f"{step:08d}" in pointer.read_text(), process=process)
    kill_group(process)
