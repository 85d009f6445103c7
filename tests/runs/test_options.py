"""Options that change memory or speed, not the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import history, tiny_recipe, train, write_recipe


@pytest.fixture(scope="module")
def tree(semantic_data: Path) -> dict[str, Any]:
    """One process, BatchNorm, three parameter groups; the last batch of the epoch is short."""
    rules = [{"match": "norm", "weight_decay": 0.0}, {"match": r"^head\.", "lr_multiplier": 3.0}]
    return tiny_recipe("semantic", semantic_data / "train", train__steps=7, train__param_groups=rules)


@pytest.fixture(scope="module")
def plain(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses_of(tree, tmp_path_factory.mktemp("plain"))


def losses_of(tree: dict[str, Any], folder: Path, *arguments: str) -> list[float]:
    run = folder / "run"
    train(write_recipe(folder / "recipe.yaml", tree), run, "--processes", "1", *arguments)
    rows = history(run)
    assert all(row["memory"] > 0 and row["images_per_second"] > 0 for row in rows.values())
    return [rows[step]["loss"] for step in sorted(rows)]


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_recomputing_activations_changes_nothing(
    tree: dict[str, Any], plain: list[float], tmp_path: Path, policy: str
) -> None:
    losses = losses_of(tree, tmp_path, "--set", f"train.activation_checkpointing={policy}")
    assert losses == pytest.approx(plain, rel=1e-5)


def test_bf16_under_zero_3_with_recomputation(tree: dict[str, Any], plain: list[float], tmp_path: Path) -> None:
    options = ("train.precision=bf16", "train.zero_stage=3", "train.activation_checkpointing=full")
    losses = losses_of(tree, tmp_path, *(word for option in options for word in ("--set", option)))
    assert losses == pytest.approx(plain, rel=0.05)
    assert losses != plain


def test_a_dictionary_for_deepspeed_is_laid_over_ours(tree: dict[str, Any], plain: list[float], tmp_path: Path) -> None:
    losses = losses_of(tree, tmp_path, "--set", "train.deepspeed={zero_optimization: {reduce_bucket_size: 4096}}")
    assert losses == pytest.approx(plain, rel=1e-5)
