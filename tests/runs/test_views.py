"""A run with the recipe of published video results: mixed clips in training, several views of each in evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import history, succeed, tiny_recipe, train, write_recipe

TRANSFORMS = [
    {"name": "random_resized_crop"},
    {"name": "rand_augment"},
    {"name": "random_erasing"},
    {"name": "mixup", "probability": 0.5},
    {"name": "cutmix", "probability": 0.5},
]


def test_mixed_clips_and_several_views(video_data: Path, tmp_path: Path) -> None:
    tree = tiny_recipe(
        "video",
        video_data / "train",
        video_data / "val",
        data__transforms=TRANSFORMS,
        train__steps=6,
        evaluate__views={"clips": 2, "crops": 3},
    )
    run = tmp_path / "run"
    train(write_recipe(tmp_path / "recipe.yaml", tree), run)
    # 22 clips at 4 a step: the sixth step is short, and one rank runs a filler with soft targets.
    assert len(history(run)) == 6
    inline = json.loads((run / "results" / "step-00000006.json").read_text())
    assert inline["samples"] == 6
    assert inline["protocol"]["metric"] == "top-1 and top-5 accuracy, probabilities averaged over 6 views per video"
    assert inline["protocol"]["clip"] == "4 frames, uniform, 2 clips x 3 crops"
    assert inline["protocol"]["input"] == "resized to cover 64x64, cut to it"
    assert len(inline["pictures"]) == 2
    # One process, and forward passes that end in the middle of a video: the same figures.
    out = tmp_path / "figures.json"
    succeed("evaluate", run, "--out", out)
    assert json.loads(out.read_text())["metrics"] == pytest.approx(inline["metrics"], abs=1e-9)
