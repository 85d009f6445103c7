"""A sample with which the loss is not finite: found, named, left out on demand, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import history, succeed, tiny_recipe, train, write_recipe

from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.plan import EpochPlan
from vitgraft.launch.replay import leave_out

BRIGHT = 5
"""The one of twelve pictures that is not black."""
# Black is zero by any deviation; by one as small as this everything else is infinite.
NORMALISATION: dict[str, Any] = {"data__mean": [0.0] * 3, "data__std": [1e-39] * 3}
# Synchronised BatchNorm would carry it to all ranks.
LOCAL: dict[str, Any] = {"model__adapter__norm": "ln", "model__head__norm": "bn"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    chance = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(12):
        picture = np.full((64, 64, 3), 255 * (number == BRIGHT), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / f"{number:02d}.png")
        labels = chance.integers(0, 2, (8, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(labels).save(tmp_path / "labels" / f"{number:02d}.png")
    folders = ["--images", tmp_path / "images", "--labels", tmp_path / "labels"]
    succeed("shards", "pack", "semantic", *folders, "--classes", "x,y", "--out", tmp_path / "data")
    return tmp_path / "data"


def plan(data: Path, seed: int, epoch: int) -> EpochPlan:
    manifest = read_manifest(data)
    return EpochPlan(manifest.fingerprint, manifest.shard_sizes, seed, epoch)


def seed_with_it_last(data: Path) -> int:
    """Two epochs of three steps of four: the bright sample comes up in steps 3 and 6."""

    def late(seed: int, epoch: int) -> bool:
        return BRIGHT in [entry.sample for entry in plan(data, seed, epoch).entries(8, 12)]

    return next(seed for seed in range(1000) if late(seed, 0) and late(seed, 1))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sample_that_breaks_the_loss_is_named_and_left_out(data: Path, tmp_path: Path) -> None:
    """One command: an attempt that fails, one that fails again with the same samples, one without them. And a step
    without any samples at all, as somebody had left them out before."""
    run, seed = tmp_path / "run", seed_with_it_last(data)
    settings: dict[str, Any] = {**NORMALISATION, **LOCAL, "train__seed": seed, "train__steps": 5}
    settings |= {"launch__max_restarts": 3, "train__on_non_finite": "skip", "train__checkpoint": {"every_steps": 100}}
    run.mkdir()
    leave_out(run, {f"1:{position}" for position in range(4)}, step=4, attempt=0)
    train(write_recipe(tmp_path / "recipe.yaml", tiny_recipe("semantic", data, **settings)), run)

    # A rank names its share of the step, and that is all that is named.
    first, second = rows(run / "non_finite.jsonl")
    assert [(row["attempt"], row["step"], row["losses"]) for row in (first, second)] == [
        (1, 3, ["auxiliary", "semantic"]),
        (2, 3, ["auxiliary", "semantic"]),
    ]
    named = [tuple(entry[:4]) for entry in first["entries"]]
    assert first["entries"] == second["entries"]
    assert len(named) == 2
    assert set(named) < set(plan(data, seed, 0).entries(8, 12))
    assert BRIGHT in [sample for _, _, sample, _ in named]
    assert [entry[4] for entry in first["entries"]] == [f"{sample:09d}" for _, _, sample, _ in named]
    left_out = sorted([epoch, position] for epoch, position, _, _ in named)
    assert rows(run / "left_out.jsonl")[1:] == [{"attempt": 2, "step": 3, "entries": left_out}]
    # Its cause, for programs.
    events = rows(run / "events.jsonl")
    assert [row["kind"] for row in events if row["event"] == "restart"] == ["non_finite", "non_finite"]
    # The second attempt was the replay: it is the data, and no passing fault because it is left out from then on.
    (found,) = [row for row in events if row["event"] == "non_finite_verdict"]
    assert (found["attempt"], found["step"], found["verdict"], found["entries"]) == (2, 3, "data", left_out)

    # There was no checkpoint: each attempt made the steps before it again, the same to the last bit.
    losses = {(row["attempt"], row["step"]): row["loss_hex"] for row in rows(run / "metrics.jsonl")}
    assert sorted(losses) == [(1, 1), (1, 2), (2, 1), (2, 2), *((3, step) for step in range(1, 6))]
    for step in (1, 2):
        assert losses[1, step] == losses[2, step] == losses[3, step]
    after = history(run)
    assert [after[step]["loss"] > 0 for step in (3, 4, 5)] == [True, False, True]
    assert (after[4]["loss"], after[4]["grad_norm"]) == (0.0, 0.0)
    skipped = rows(run / "skipped.jsonl")
    assert {(row["reason"], row["attempt"]) for row in skipped} == {("the loss was not finite", 3)}
    assert [(row["step"], row["epoch"], row["position"]) for row in skipped] == [
        *((3, epoch, position) for epoch, position in left_out),
        *((4, 1, position) for position in range(4)),
    ]
