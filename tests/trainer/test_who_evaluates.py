"""With an evaluator of its own the loop neither evaluates nor waits for a commit in order to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import tiny_recipe

from vitgraft.configs.load import validate_recipe
from vitgraft.trainer.train import TrainLoop


def loop(evaluator: dict[str, Any] | None, called: list[str]) -> TrainLoop:
    """One that has a saver and a recipe, and whose every checkpoint is due."""
    tree = tiny_recipe(
        "semantic", "t", "v", train__checkpoint={"every_steps": 3}, evaluate__every_checkpoints=1, evaluator=evaluator
    )
    made = object.__new__(TrainLoop)
    made.recipe = validate_recipe(tree, "test")
    saver = SimpleNamespace(
        begin=lambda *_: called.append("begin"),
        finish=lambda: called.append("finish") or SimpleNamespace(step=3),
        tidy=lambda: called.append("tidy"),
    )
    assignment = SimpleNamespace(resume=Path("nowhere"))
    made.session = SimpleNamespace(  # type: ignore[assignment]
        saver=saver,
        assignment=assignment,
        first_step=3,
        last_step=20,
        samples_at=lambda step: 4 * step,
        data_state=lambda _: None,
    )
    made._evaluate = lambda _: called.append("evaluate")  # type: ignore[method-assign, assignment]
    made._heart = SimpleNamespace(enter=lambda *_: None)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(("wait", "expected"), [(False, []), (True, ["finish"])])
def test_the_evaluator_holds_nothing_up(wait: bool, expected: list[str]) -> None:
    called: list[str] = []
    loop({}, called)._checkpoint(3, wait=wait, evaluate=True)
    assert called == ["begin", *expected, "tidy"]


def test_without_one_the_ranks_evaluate() -> None:
    called: list[str] = []
    loop(None, called)._checkpoint(3, wait=False, evaluate=True)
    assert called == ["begin", "finish", "evaluate", "tidy"]


def test_a_resume_leaves_the_checkpoint_to_the_evaluator() -> None:
    loop({}, []).catch_up()  # else it would open the checkpoint, which is not there
    with pytest.raises(Exception, match="nowhere"):
        loop(None, []).catch_up()
