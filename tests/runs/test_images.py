"""Image classification from arrays to predictions: the digit scans of scikit-learn as CIFAR-style arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import succeed, tiny_recipe, train, vitgraft, write_recipe

from vitgraft.data_shards.pack.digits import scans_of


def enlarged(scans: np.ndarray, down: int, across: int) -> np.ndarray:
    """Scans (..., 8, 8) with values 0..16 as uint8, each place as down x across pixels."""
    return np.kron(np.clip(scans * 16, 0, 255), np.ones((down, across))).astype(np.uint8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed train and val sets of 8x8 scans, enlarged to 32x32."""
    folder = tmp_path_factory.mktemp("digits")
    names = ",".join(map(str, range(10)))
    for split, count in (("train", 600), ("val", 50)):
        scans, labels = scans_of(split)  # type: ignore[arg-type]
        images = enlarged(scans[:count], 4, 4)
        np.savez(folder / f"{split}.npz", images=images, labels=labels[:count])
        arguments = ("--arrays", folder / f"{split}.npz", "--classes", names, "--out", folder / split)
        done = succeed("shards", "pack", "imagefolder", *arguments)
        assert f"labels: {count} samples, {count} images, 0 samples without label" in done.stderr
        assert "faults: none" in done.stderr
    return folder


def test_digits_are_told_apart(digits: Path, tmp_path: Path) -> None:
    """Train, evaluate, draw, predict."""
    tree = tiny_recipe("video", digits / "train", digits / "val")
    tree["model"]["backbone"]["embed_dim"] = 64
    tree["model"]["adapter"] = {"name": "none"}
    tree["model"]["head"] = {"name": "image_classifier"}
    tree["data"]["image_size"] = [32, 32]
    tree["data"].pop("clip")
    schedule = {"name": "cosine", "warmup": 0.1}
    tree["train"] |= {"steps": 240, "global_batch": 24, "schedule": schedule}
    tree["train"]["optimizer"]["lr"] = 3e-3
    tree["train"]["checkpoint"]["every_steps"] = 120
    run = tmp_path / "run"
    train(write_recipe(tmp_path / "recipe.yaml", tree), run)
    result = json.loads((run / "results" / "step-00000240.json").read_text())
    assert result["protocol"]["metric"] == "top-1 and top-5 accuracy, one view per image"
    assert result["samples"] == 50
    assert result["metrics"]["top1"] > 0.3  # by chance 0.1
    assert result["metrics"]["top5"] > result["metrics"]["top1"]
    assert result["pictures"] == ["0000.png", "0001.png"]
    picture = Image.open(run / "results" / "step-00000240" / "0000.png")
    assert picture.width >= 640  # ground truth and prediction beside each other, enlarged to be read
    scans, _ = scans_of("val")
    Image.fromarray(enlarged(scans[0], 6, 8)).save(tmp_path / "photo.png")
    succeed("predict", run, tmp_path / "photo.png", "--out", tmp_path / "out")
    prediction = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert (prediction["height"], prediction["width"]) == (48, 64)
    assert len(prediction["classes"]) == 5
    assert Image.open(tmp_path / "out" / "photo.png").width >= 320
    done = succeed("shards", "inspect", digits / "val", "--draw", "2", "--out", tmp_path / "pictures")
    assert "image: 50 samples" in done.stdout
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_data_of_another_kind_is_refused(digits: Path, tmp_path: Path) -> None:
    tree = tiny_recipe("video", digits / "train")
    done = vitgraft("train", write_recipe(tmp_path / "r.yaml", tree), "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "holds image samples, head video_transformer needs video" in done.stderr
    for arguments in ((), ("--images", digits, "--arrays", digits / "val.npz")):
        done = vitgraft("shards", "pack", "imagefolder", *arguments, "--out", tmp_path / "x")
        assert done.returncode == 2
        assert "give either --images FOLDER or --arrays FILE" in done.stderr
    done = vitgraft("shards", "pack", "imagefolder", "--images", digits, "--labels", digits, "--out", tmp_path / "x")
    assert done.returncode == 2
    assert "--labels belongs to --arrays" in done.stderr
