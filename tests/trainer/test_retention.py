"""Which checkpoints stay: the plan, and what carries it out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_recipe
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import validate_recipe
from vitgraft.configs.schema.recipe import METRICS
from vitgraft.trainer.checkpoint.read import newest_valid, open_checkpoint
from vitgraft.trainer.checkpoint.retention import (
    Policy,
    awaiting,
    best_step,
    delete,
    figures_of,
    given_up_path,
    plan,
    retain,
)
from vitgraft.trainer.tasks import make_task

FIGURES = {3: {"mIoU": 0.5}, 6: {"mIoU": 0.7}, 9: {"mIoU": float("nan")}, 12: {"mAcc": 1.0}}


def remaining(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def result(run: Path, step: int, **metrics: float) -> None:
    (run / "results").mkdir(exist_ok=True)
    (run / "results" / f"step-{step:08d}.json").write_text(json.dumps({"metrics": metrics}))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(1), [15]),
        (Policy(3), [9, 12, 15]),
        (Policy(99), [3, 6, 9, 12, 15]),
        (Policy(1, keep_every=6), [6, 12, 15]),
        (Policy(1, keep_best="mIoU"), [6, 15]),
        (Policy(1, keep_best="top1"), [15]),
        (Policy(2, keep_every=9, keep_best="mIoU"), [6, 9, 12, 15]),
    ],
)
def test_the_plan(policy: Policy, kept: list[int]) -> None:
    steps = [3, 6, 9, 12, 15]
    assert [step for step in steps if step not in plan(steps, policy, FIGURES)] == kept


def test_of_equal_figures_the_newest_counts() -> None:
    assert best_step([1, 2, 3], {1: {"top1": 0.5}, 2: {"top1": 0.5}, 3: {"top1": 0.1}}, "top1") == 2


@given(
    st.sets(st.integers(1, 60), min_size=1),
    st.integers(1, 5),
    st.none() | st.integers(1, 9),
    st.sets(st.integers(1, 60)),
    st.dictionaries(st.integers(1, 60), st.floats(0, 1)),
)
def test_the_plan_never_takes_the_newest_the_best_or_a_spared_one(
    steps: set[int], last: int, every: int | None, spared: set[int], values: dict[int, float]
) -> None:
    figures = {step: {"top1": value} for step, value in values.items()}
    doomed = set(plan(steps, Policy(last, every, "top1"), figures, spared))
    assert doomed < steps
    kept = steps - doomed
    assert set(sorted(steps)[-last:]) <= kept
    assert not doomed & spared
    evaluated = {step: values[step] for step in steps if step in values}
    if evaluated:
        assert max(evaluated.values()) in [values[step] for step in kept if step in values]
    # Nothing stays without a reason, and a second look finds nothing more.
    assert plan(kept, Policy(last, every, "top1"), figures, spared) == []


def test_half_written_ones_count_for_nothing(tmp_path: Path) -> None:
    """However many there are, the valid ones stay."""
    run, recipe = make_run(tmp_path, train__checkpoint={"every_steps": 1, "keep_last": 2})
    for step in range(1, 4):
        write(run, step)
    for step in range(4, 9):
        (write(run, step) / "rank-00001.safetensors").unlink()
    assert retain(run, recipe) == ["step-00000001"]
    assert retain(run, recipe) == []
    found, _ = newest_valid(run)
    assert found is not None
    assert found.step == 3


def test_what_is_read_or_awaits_its_evaluation_stays(tmp_path: Path) -> None:
    checkpoint = {"every_steps": 1, "keep_last": 1, "keep_best": "mIoU"}
    run, recipe = make_run(tmp_path, val="somewhere", train__checkpoint=checkpoint, evaluate__every_checkpoints=2)
    for step in range(1, 7):
        write(run, step)
    result(run, 2, mIoU=0.4)
    result(run, 4, mIoU=0.3)
    with open_checkpoint(run / "checkpoints" / "step-00000003").reading():
        # 2 is the best, 6 the newest; 3 is read.
        assert retain(run, recipe, 6) == ["step-00000001", "step-00000004", "step-00000005"]
    assert remaining(run) == [2, 3, 6]
    write(run, 7)
    # 6 awaits its evaluation: due, and without a result.
    assert retain(run, recipe, 7) == ["step-00000003"]
    result(run, 6, mIoU=0.6)
    assert retain(run, recipe, 7) == ["step-00000002"]
    assert remaining(run) == [6, 7]


@pytest.mark.parametrize(
    ("settled", "everything", "newest"),
    [
        ([], [3, 6, 9], [9]),
        ([3], [6, 9], [9]),
        ([6], [3, 9], [9]),
        ([9], [3, 6], []),
        ([12], [3, 6, 9], []),
        ([3, 6, 9], [], []),
    ],
)
def test_what_awaits_its_evaluation(settled: list[int], everything: list[int], newest: list[int]) -> None:
    assert awaiting([6, 3, 9], settled, "all") == everything
    assert awaiting([6, 3, 9], settled, "latest") == newest
    assert awaiting([], settled, "all") == awaiting([], settled, "latest") == []


@pytest.mark.parametrize("backlog", ["all", "latest"])
def test_a_slow_evaluator_does_not_make_checkpoints_pile_up(tmp_path: Path, backlog: str) -> None:
    """Unless it is to evaluate them all; and what it reads stays, and counts as evaluated when it is."""
    settings: dict[str, Any] = {"train__checkpoint": {"every_steps": 1, "keep_last": 2, "keep_best": "mIoU"}}
    settings |= {"evaluate__every_checkpoints": 1, "evaluator": {"backlog": backlog}}
    run, recipe = make_run(tmp_path, val="somewhere", **settings)
    for step in range(1, 4):
        write(run, step)
    with open_checkpoint(run / "checkpoints" / "step-00000003").reading():
        for step in range(4, 9):
            write(run, step)
            retain(run, recipe, step)
        assert remaining(run) == ([3, 7, 8] if backlog == "latest" else list(range(1, 9)))
        result(run, 3, mIoU=0.5)
    retain(run, recipe, 8)
    assert remaining(run) == ([3, 7, 8] if backlog == "latest" else list(range(1, 9))), "the best"
    result(run, 8, mIoU=0.6)
    given_up_path(run, 2).write_text("it was damaged")
    retain(run, recipe, 8)
    assert remaining(run) == ([7, 8] if backlog == "latest" else [1, 4, 5, 6, 7, 8])


def test_a_lock_for_one_alone_needs_a_file_that_is_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS and SMB have it; and one checkpoint that cannot be deleted does not keep the others."""
    run, _ = make_run(tmp_path)
    for step in (1, 2, 3):
        write(run, step)
    real, damned = fcntl.flock, [-1]

    def flock(stream: IO[bytes], how: int) -> None:
        writable = fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if (how & fcntl.LOCK_EX and not writable) or os.fstat(stream.fileno()).st_ino in damned:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(stream, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert delete(run, [1]) == ["step-00000001"]
    damned.append((run / "checkpoints" / "step-00000002" / "manifest.json").stat().st_ino)
    with pytest.raises(OSError, match="Bad file descriptor"):
        delete(run, [2, 3])
    assert remaining(run) == [2]


def test_damaged_results_are_no_figures(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for step, text in enumerate(
        ["", "[]", '{"metrics": 3}', '{"metrics": {"mIoU": "high"}}', '{"metrics": {"mIoU": 1}}']
    ):
        (tmp_path / "results" / f"step-{step:08d}.json").write_text(text)
    assert figures_of(tmp_path, range(9)) == {3: {}, 4: {"mIoU": 1.0}}


def test_an_unknown_metric_is_refused_with_the_valid_ones() -> None:
    def recipe(task: str, metric: str, val: str | None = "v") -> None:
        validate_recipe(tiny_recipe(task, "t", val, train__checkpoint={"keep_best": metric}), "test")

    recipe("semantic", "mIoU")
    recipe("detection", "mask_AP50")
    with pytest.raises(ConfigError, match=r"keep_best: 'AP' is no metric of detection; use one of box_AP, .*mask_APl"):
        recipe("detection", "AP")
    with pytest.raises(ConfigError, match=r"keep_best needs evaluations: set data\.val"):
        recipe("semantic", "mIoU", None)
    tree = tiny_recipe("detection", "t", "v", train__checkpoint={"keep_best": "mask_AP"}, model__head__masks=False)
    with pytest.raises(ConfigError, match=r"keep_best: model\.head\.masks false gives no mask_AP; use box_AP"):
        validate_recipe(tree, "test")


def test_a_figure_without_ground_truth_keeps_no_checkpoint(tmp_path: Path) -> None:
    """Null, and -1 in results of earlier versions."""
    (tmp_path / "results").mkdir()
    for step, value in enumerate(["0.25", "null", "-1.0"]):
        (tmp_path / "results" / f"step-{step:08d}.json").write_text(f'{{"metrics": {{"box_AP": {value}}}}}')
    figures = figures_of(tmp_path, range(3))
    assert figures == {0: {"box_AP": 0.25}, 1: {}, 2: {}}
    assert best_step(range(3), figures, "box_AP") == 0


@pytest.mark.parametrize("task", METRICS)
def test_the_metrics_of_the_schema_are_those_of_the_tasks(task: str) -> None:
    assert set(make_task(task, ["a"]).primary) <= set(METRICS[task])  # type: ignore[arg-type, index]


@pytest.mark.parametrize("url", ["/a/folder", "https://host/folder"])
def test_a_store_that_cannot_be_written_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"copy_to: .*expected the URL of a store"):
        validate_recipe(tiny_recipe("semantic", "t", train__checkpoint={"copy_to": url}), "test")
