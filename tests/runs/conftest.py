"""Small packed data sets and finished runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import succeed, tiny_recipe, train, write_recipe


def _digits(folder: Path, task: str) -> Path:
    for split, samples in (("train", 22), ("val", 6)):
        out = folder / split
        succeed("shards", "pack", "digits", "--task", task, "--split", split, "--samples", str(samples), "--out", out)
    return folder


@pytest.fixture(scope="session")
def detection_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 + 6 scenes: at a global batch of 4 the last batch of an epoch is short."""
    return _digits(tmp_path_factory.mktemp("detection"), "detection")


@pytest.fixture(scope="session")
def semantic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 + 6 scenes with label maps."""
    return _digits(tmp_path_factory.mktemp("semantic"), "semantic")


@pytest.fixture(scope="session")
def video_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 + 6 clips."""
    return _digits(tmp_path_factory.mktemp("video"), "video")


@pytest.fixture(scope="session")
def detection_recipe(detection_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that has state: SyncBN, EMA, augmentation at random, sampling at random inside the model."""
    transforms = [
        {"name": "scale_jitter", "min": 0.8, "max": 1.25},
        {"name": "random_crop"},
        {"name": "horizontal_flip"},
    ]
    tree = tiny_recipe(
        "detection",
        detection_data / "train",
        detection_data / "val",
        data__transforms=transforms,
        data__workers=1,
        train__ema=0.9,
        train__ledger=True,
        train__layer_decay=0.8,
        train__param_groups=[{"match": r"^head\.", "lr_multiplier": 2.0}],
    )
    return write_recipe(tmp_path_factory.mktemp("recipe") / "detection.yaml", tree)


@pytest.fixture(scope="session")
def unbroken(detection_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(detection_recipe, run)
    return run
