"""A start that fails before anything is committed, and what a run that has committed something refuses: both are mended
by a command that works."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import history, losses, succeed, tiny_recipe, train, vitgraft, write_recipe

SMALL: dict[str, Any] = {"launch__processes": 1, "train__steps": 4, "train__checkpoint": {"every_steps": 2}}


def advised(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The command with which the last line ends, without the word vitgraft."""
    line = done.stderr.strip().splitlines()[-1]
    words = shlex.split(line[line.rindex("vitgraft train") :])
    assert "Traceback" not in done.stderr
    return words[1:]


def test_a_start_with_the_wrong_weights_does_not_bind(semantic_data: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save_file({"nonsense": torch.zeros(3)}, wrong)
    tree = tiny_recipe("semantic", semantic_data / "train", None, **SMALL)
    recipe, run = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "run"
    failed = vitgraft("train", recipe, "--run-dir", run, "--set", f"model.backbone.weights={wrong}")
    assert failed.returncode != 0
    assert "wrong.safetensors" in failed.stderr
    assert (run / "config.yaml").is_file()
    train(recipe, run)
    assert len(losses(run)) == 4


def test_a_start_whose_loss_is_not_finite_does_not_bind(semantic_data: Path, tmp_path: Path) -> None:
    """The line ends with the command; a rate that works is all that it lacks. What the failed start left is no part of
    the run, entries that are to be left out of its order above all."""
    tree = tiny_recipe("semantic", semantic_data / "train", None, **SMALL, train__clip_grad=0.0)
    recipe, run = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "run"
    failed = vitgraft("train", recipe, "--run-dir", run, "--set", "train.optimizer.lr=1e+30")
    assert failed.returncode == 5, failed.stderr
    words = advised(failed)
    assert words[:4] == ["train", str(run / "config.yaml"), "--run-dir", str(run)]
    assert "train.optimizer.lr=5e+29" in words
    (run / "left_out.jsonl").write_text('{"entries": [[0, 0]]}\n')
    mended = succeed(*words, "--set", "train.optimizer.lr=1e-3")
    assert "the recipe is another than at the last start" in mended.stderr
    assert {path.name for path in (run / "set-aside-1").iterdir()} >= {"metrics.jsonl", "left_out.jsonl"}
    assert not (run / "left_out.jsonl").exists()
    assert [row["attempt"] for row in history(run).values()] == [2] * 4


@pytest.fixture(scope="module")
def bound(semantic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and a run that has committed something."""
    folder = tmp_path_factory.mktemp("bound")
    tree = tiny_recipe("semantic", semantic_data / "train", None, **SMALL)
    recipe, run = write_recipe(folder / "a recipe.yaml", tree), folder / "the run"
    train(recipe, run)
    return recipe, run


def test_another_rate_or_batch_is_refused_with_the_command_that_works(bound: tuple[Path, Path]) -> None:
    recipe, run = bound
    for change, said in (
        ("train.optimizer.lr=5e-4", "train.optimizer.lr was 0.001, now 0.0005"),
        ("train.global_batch=8", "train.global_batch was 4, now 8"),
    ):
        refused = vitgraft("train", recipe, "--run-dir", run, "--processes", "2", "--set", change)
        assert refused.returncode == 2
        assert said in refused.stderr
        words = advised(refused)
        assert words[:6] == ["train", str(recipe), "--processes", "2", "--set", change]
        assert words[6:] == ["--run-dir", f"{run}-2", "--set", f"train.init_from={run}"]
    done = succeed(*words)
    assert "started from the weights of" in done.stderr + done.stdout
    assert len(losses(run.with_name(f"{run.name}-2"))) == 4


def test_another_model_is_refused_with_a_command_that_does_not_need_the_weights(bound: tuple[Path, Path]) -> None:
    recipe, run = bound
    refused = vitgraft("train", recipe, "--run-dir", run, "--set", "model.backbone.embed_dim=64")
    assert refused.returncode == 2
    words = advised(refused)
    assert words[-2] == "--run-dir"
    assert not any("init_from" in word for word in words)


def test_a_loss_that_is_not_finite_after_a_commit_names_a_run_of_its_own(
    bound: tuple[Path, Path], semantic_data: Path, tmp_path: Path
) -> None:
    tree = tiny_recipe("semantic", semantic_data / "train", None, **SMALL, train__clip_grad=0.0)
    tree["train"]["optimizer"]["lr"] = 1e30
    tree["train"]["schedule"] = {"name": "step", "warmup": 0.0, "milestones": []}
    tree["train"]["checkpoint"]["every_steps"] = 1
    recipe, run = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "run"
    failed = vitgraft("train", recipe, "--run-dir", run)
    assert failed.returncode == 5, failed.stderr
    assert list(run.glob("checkpoints/step-*"))
    words = advised(failed)
    assert words[:4] == ["train", str(run / "config.yaml"), "--run-dir", f"{run}-2"]
    assert words[-4:] == ["--set", f"train.init_from={run}", "--set", "train.optimizer.lr=5e+29"]
