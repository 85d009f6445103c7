"""evaluate, predict and export on the checkpoints of real runs, and a run that starts from another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support import succeed, tiny_recipe, train, vitgraft, write_recipe

from vitgraft.trainer.checkpoint.read import open_checkpoint, read_weights


def test_evaluate_gives_the_figures_of_training(unbroken: Path, detection_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    succeed("evaluate", unbroken, "--out", out)
    figures, inline = json.loads(out.read_text()), json.loads((unbroken / "results" / "step-00000020.json").read_text())
    # One process here, two there: the same samples, the same weights from the checkpoint's files.
    assert figures["metrics"] == pytest.approx(inline["metrics"], abs=1e-9)
    assert figures["protocol"] == inline["protocol"]
    assert inline["samples"] == 6
    assert inline["unreadable"] == []
    assert sorted(path.name for path in (unbroken / "results" / "step-00000020").iterdir()) == ["0000.png", "0001.png"]
    checkpoint = unbroken / "checkpoints" / "step-00000018"
    succeed("evaluate", checkpoint, "--data", detection_data / "train")


def test_predict_images(unbroken: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)).save(photo)
    succeed("predict", unbroken, photo, "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert (result["height"], result["width"]) == (90, 160)
    for detection in result["detections"]:
        left, top, right, bottom = detection["box"]
        assert 0 <= left <= right <= 160
        assert 0 <= top <= bottom <= 90
        assert detection["mask"]["size"] == [90, 160]
    assert Image.open(tmp_path / "out" / "photo.png").size == (320, 180)


def test_export(unbroken: Path, tmp_path: Path) -> None:
    """Of a real run's newest checkpoint: what is evaluated there, i.e. the average."""
    weights, program = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    done = succeed("export", unbroken, "--format", "safetensors", "--out", weights)
    assert "the whole model" in done.stdout
    checkpoint = open_checkpoint(unbroken / "checkpoints" / "step-00000020")
    expected = read_weights(checkpoint, ema=True)
    exported = load_file(weights)
    assert exported.keys() == expected.keys()
    assert all((exported[name] == expected[name]).all() for name in expected)
    step = unbroken / "checkpoints" / "step-00000018"
    done = succeed("export", step, "--format", "torch-export", "--weights", "raw", "--out", program)
    assert "images (B, 3, 128, 128), sizes (B, 2)" in done.stdout
    assert program.stat().st_size > 100_000
    again = vitgraft("export", unbroken, "--format", "safetensors", "--out", weights)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_init_from(unbroken: Path, detection_data: Path, tmp_path: Path) -> None:
    """A run starts from another's average; resumed, it does not read it again, nor miss it when it is gone."""
    source = tmp_path / "source"
    shutil.copytree(unbroken, source)
    tree = tiny_recipe("detection", detection_data / "train", train__steps=2, train__init_from=str(source))
    recipe, run = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "run"
    done = train(recipe, run)
    assert f"started from the averaged weights of {source}/checkpoints/step-00000020" in done.stderr
    # Two steps away from the average, whereas random weights are far from it.
    average = read_weights(open_checkpoint(unbroken / "checkpoints" / "step-00000020"), ema=True)
    found = read_weights(open_checkpoint(run / "checkpoints" / "step-00000002"))
    name = "backbone.vit.blocks.0.attn.qkv.weight"
    assert 0 < np.abs(found[name] - average[name]).max() < 5e-3
    shutil.rmtree(source)
    done = train(recipe, run)
    assert "started from" not in done.stderr
    other = vitgraft("train", recipe, "--run-dir", tmp_path / "other")
    assert other.returncode == 4
    assert "train.init_from" in other.stderr
    assert not (tmp_path / "other").exists()


def test_video_run_with_a_frozen_trunk(video_data: Path, tmp_path: Path) -> None:
    """AdaptFormer on a frozen trunk: the trunk is stored once, as a blob, and a resumed run goes on with it."""
    tree = tiny_recipe("video", video_data / "train", video_data / "val", model__backbone__frozen=True, train__steps=6)
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    run = tmp_path / "run"
    train(recipe, run)
    manifest = json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert [path.name for path in (run / "blobs").iterdir()] == [manifest["frozen"]]
    trained = list(manifest["parameters"])
    assert not any("attn.qkv" in name and name.startswith("backbone") for name in trained)
    assert any("adaptmlp" in name for name in trained)
    clip = next(path for path in unpack(video_data / "val", tmp_path) if path.suffix == ".mp4")
    succeed("predict", run, clip, "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / f"{clip.stem}.json").read_text())
    assert len(result["classes"]) == 5
    assert sum(c["score"] for c in result["classes"]) <= 1.0001


def unpack(folder: Path, out: Path) -> list[Path]:
    import tarfile

    with tarfile.open(folder / "shard-000000.tar") as tar:
        tar.extractall(out / "clips", filter="data")
    return sorted((out / "clips").iterdir())
