"""What must not depend on how a run is distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import history, rows, start, succeed, tiny_recipe, train, wait_until, write_recipe

from vitgraft.trainer.checkpoint.read import open_checkpoint, read_weights


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
    ("name", "stage"),
    [
        pytest.param("detection", 0, marks=pytest.mark.soak),
        pytest.param("detection", 1, marks=pytest.mark.soak),
        ("detection", 3),
        ("clipped", 0),
        ("clipped", 3),
    ],
)
def test_zero_stages_give_the_same_losses(
    staged: dict[str, tuple[Path, dict[int, dict[str, Any]]]], tmp_path: Path, name: str, stage: int
) -> None:
    recipe, stage_2 = staged[name]
    run = tmp_path / "run"
    train(recipe, run, "--set", f"train.zero_stage={stage}")
    assert len(stage_2) == 20
    assert_same(history(run), stage_2, 1e-5)


def test_world_size_changes_nothing(semantic_data: Path, tmp_path: Path) -> None:
    """A recipe without randomness inside the model; 22 samples at 4 a step, so that short batches occur."""
    settings: dict[str, Any] = {"train__steps": 8, "train__optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}}
    tree = tiny_recipe("semantic", semantic_data / "train", **settings)
    two = run_with(tmp_path, "two", tree)
    one = run_with(tmp_path, "one", tree, "--processes", "1")
    assert_same(one, two, 1e-5)


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 scenes of noise and a square, of which between all and a twentieth of the pixels are labelled."""
    folder, draw = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number in range(22):
        height, width = draw.integers(48, 128, 2)
        image = draw.integers(0, 128, (height, width, 3)).astype(np.uint8)
        label = np.zeros((height, width), np.uint8)
        image[8:40, 8:40] += 100
        label[8:40, 8:40] = 1
        label[:, : int(width * draw.uniform(0.0, 0.95))] = 255
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray(label).save(folder / "labels" / f"{number:02d}.png")
    where = ["--images", folder / "images", "--labels", folder / "labels"]
    succeed("shards", "pack", "semantic", *where, "--classes", "ground,square", "--out", folder / "packed")
    return folder / "packed"


def test_accumulation_changes_nothing_where_targets_alone_decide_what_counts(uneven_data: Path, tmp_path: Path) -> None:
    """Without BatchNorm and randomness inside the model; the sixth step is short, and of its micro-steps some empty."""
    tree = tiny_recipe(
        "semantic",
        uneven_data,
        model__adapter__norm="ln",
        model__head__norm="ln",
        train__steps=7,
        train__optimizer={"name": "sgd", "lr": 0.01, "momentum": 0.9},
    )
    once = run_with(tmp_path, "once", tree)
    for accumulation, processes in ("2", "2"), ("2", "1"), ("4", "1"):
        options = ["--set", f"train.accumulation={accumulation}", "--processes", processes]
        often = run_with(tmp_path, f"often-{accumulation}-{processes}", tree, *options)
        assert_same(often, once, 1e-5)
        for step in once:
            assert often[step]["grad_norm"] == pytest.approx(once[step]["grad_norm"], rel=1e-4), step


WORLDS = [("1", "2", "false"), ("2", "3", "true"), ("3", "0", "false"), ("2", "1", "true")]
"""Ranks, ZeRO stage and offload of the attempts of one run."""
# Above the noise of a gradient that is zero but for the order of its sums, which AdamW would make a whole step of.
ADAMW = {"name": "adamw", "lr": 1e-3, "eps": 1e-4, "weight_decay": 0.05}
SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}


@pytest.mark.parametrize(
    "optimizer", [pytest.param(ADAMW, id="adamw"), pytest.param(SGD, id="sgd", marks=pytest.mark.soak)]
)
def test_a_run_goes_on_at_other_worlds_stages_and_places(
    semantic_data: Path, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    """One run at 1, 2, 3 and 2 ranks under ZeRO 2, 3, 0 and 1, every other time with its states in host memory: the
    entries of every step are those of an unbroken run, and so are the losses. Statistics, average, a frozen trunk and
    groups of several decays and rates move along; short batches occur (22 samples at 6 a step)."""
    rules = [
        {"match": r"^head\.", "lr_multiplier": 2.0, "weight_decay": 0.1},
        {"match": r"^adapter\..*bias$", "lr_multiplier": 0.5, "weight_decay": 0.0},
    ]
    tree = tiny_recipe(
        "semantic",
        semantic_data / "train",
        model__backbone__frozen=True,
        train__steps=12,
        train__global_batch=6,
        train__optimizer=optimizer,
        train__param_groups=rules,
        train__ema=0.9,
        train__ledger=True,
        train__checkpoint={"every_steps": 100, "keep_last": 5},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    train(recipe, tmp_path / "whole")
    run = tmp_path / "moved"
    for number, (processes, stage, offload) in enumerate(WORLDS):
        where = ["--processes", processes, "--set", f"train.zero_stage={stage}"]
        where += ["--set", f"train.offload_optimizer={offload}"]
        if number == len(WORLDS) - 1:
            train(recipe, run, *where)
        else:
            stop_behind(recipe, run, 3 * number + 2, where)
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [event["world"] for event in starts] == [1, 2, 3, 2]
    assert starts[0]["resume"] is None
    assert all(event["resume"] >= 3 * number + 2 for number, event in enumerate(starts[1:]))
    assert_same(history(run), history(tmp_path / "whole"), 1e-5)
    assert entries(run) == entries(tmp_path / "whole")
    manifest = json.loads((run / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert manifest["frozen"] is not None
    assert len({(group["weight_decay"], group["lr"]) for group in manifest["groups"]}) >= 3
    # The average and the statistics, which the losses do not show.
    assert_same_weights(run, tmp_path / "whole", 12)


def stop_behind(recipe: Path, run: Path, step: int, where: list[str]) -> None:
    """Train until ``step`` at least and stop behind a checkpoint, as a scheduler makes a run stop."""
    process = start("train", recipe, "--run-dir", run, *where)
    wait_until(lambda: rows(run) >= step, process=process)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors


def entries(run: Path) -> dict[int, list[list[int]]]:
    """The entries of each step over all ranks and micro-steps, sorted; nothing here was trained twice."""
    found: dict[int, list[list[int]]] = {}
    for path in (run / "ledger").iterdir():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], []).extend(row["entries"])
    return {step: sorted(of) for step, of in sorted(found.items())}


def assert_same_weights(ours: Path, theirs: Path, step: int) -> None:
    for ema in (True, False):
        mine, reference = (
            read_weights(open_checkpoint(run / "checkpoints" / f"step-{step:08d}"), ema=ema) for run in (ours, theirs)
        )
        assert mine.keys() == reference.keys()
        for name, value in reference.items():
            np.testing.assert_allclose(mine[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
