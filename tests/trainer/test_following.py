"""The evaluator's work, in this process: what is due and in which order, and that no failure ends it."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support_evaluator import add_checkpoint, inline_result, make_evaluated_run, result_of
from support_writers import Told
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema.recipe import Backlog
from vitgraft.data_shards.pack.digits import pack_digits
from vitgraft.trainer import following
from vitgraft.trainer.checkpoint.commit import ATTEMPT
from vitgraft.trainer.checkpoint.retention import delete, given_up_path, retain
from vitgraft.trainer.evaluator import Pulse
from vitgraft.trainer.following import Follower


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "semantic"
    pack_digits("semantic", "val", folder, samples=5)
    return folder


def follower(run: Path, backlog: Backlog = "all", attempt: int | None = None) -> Follower:
    recipe = load_recipe(str(run / "config.yaml"))
    return Follower(run, attempt, recipe, torch.device("cpu"), backlog, Pulse(Told()))


def drained() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def texts(role: Follower) -> list[str]:
    told = role.pulse.reporter
    assert isinstance(told, Told)
    return told.texts()


def evaluated(run: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run / "results").glob("step-*.json"))


def in_order(role: Follower) -> list[int]:
    """The steps it was at work on, by what it told."""
    told = role.pulse.reporter
    assert isinstance(told, Told)
    beats = [message["outstanding"] for message in told.messages if message["kind"] == "beat"]
    assert beats[1::2] == [None] * (len(beats) // 2)
    return beats[::2]


def test_all_are_evaluated_as_the_trainer_does_it(tmp_path: Path, data: Path) -> None:
    run, recipe = make_evaluated_run(tmp_path / "run", data, [6, 3, 9])
    role = follower(run)
    role.serve(drained())
    assert in_order(role) == [3, 6, 9]
    assert role.pulse.done == 3
    other, _ = make_evaluated_run(tmp_path / "other", data, [3, 6, 9])
    results = [result_of(run, step) for step in (3, 6, 9)]
    assert results == [inline_result(other, recipe, step) for step in (3, 6, 9)]
    assert len({result["id"] for result in results}) == 3
    assert results[0]["pictures"] == ["0000.png", "0001.png"]
    assert [text.split(":")[0] for text in texts(role)] == ["step 3", "step 6", "step 9"]
    assert "mIoU" in texts(role)[0]
    board = EventAccumulator(str(run / "tensorboard" / "evaluator"))
    board.Reload()
    points = {point.step: point.value for point in board.Scalars("evaluation/mIoU")}
    assert points == pytest.approx({result["step"]: result["metrics"]["mIoU"] for result in results})
    assert [image.step for image in board.Images("predictions/00")] == [3, 6, 9]


def test_latest_gives_up_what_was_overtaken(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3, 6, 9])
    role = follower(run, "latest")
    assert role.pending() == [9]
    role.evaluate(9)
    assert role.pending() == []
    add_checkpoint(run, 12)
    add_checkpoint(run, 15)
    role.serve(drained())
    assert in_order(role) == [9, 15]
    assert evaluated(run) == [9, 15]


def test_only_what_is_due(tmp_path: Path, data: Path) -> None:
    settings: dict[str, Any] = {
        "train__steps": 11,
        "train__checkpoint__every_steps": 2,
        "evaluate__every_checkpoints": 2,
    }
    run, _ = make_evaluated_run(tmp_path / "run", data, [2, 4, 6, 8, 10, 11], **settings)
    assert follower(run).pending() == [4, 8, 11]
    # 5 samples and 4 at once: two steps an epoch.
    settings |= {"train__steps": None, "train__epochs": 3}
    run, _ = make_evaluated_run(tmp_path / "epochs", data, [4, 6, 8], **settings)
    assert follower(run).pending() == [4, 6, 8]


def test_an_evaluation_is_done_once_for_each_protocol(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3])
    follower(run).serve(drained())
    before = (run / "results" / "step-00000003.json").read_bytes()
    again = follower(run)
    again.serve(drained())
    assert (again.pulse.done, in_order(again)) == (0, [3])
    assert (run / "results" / "step-00000003.json").read_bytes() == before
    other = tmp_path / "other data"
    pack_digits("semantic", "val", other, samples=2)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"val:\n    path: {data}", f"val:\n    path: {other}"))
    changed = follower(run)
    changed.serve(drained())
    assert changed.pulse.done == 1
    assert result_of(run, 3)["samples"] == 2


def test_a_torn_result_is_written_again(tmp_path: Path, data: Path) -> None:
    run, recipe = make_evaluated_run(tmp_path / "run", data, [3])
    expected = inline_result(run, recipe, 3)
    file = run / "results" / "step-00000003.json"
    file.write_text(file.read_text()[:50])
    (run / "results" / "step-00000003" / "0000.png").write_bytes(b"half")
    follower(run).serve(drained())
    assert result_of(run, 3) == expected
    assert (run / "results" / "step-00000003" / "0000.png").stat().st_size > 100


def test_what_is_evaluated_is_spared_to_the_end(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3, 6])
    deleted: list[list[str]] = []
    real = following.evaluate_into_run

    def evaluate(*arguments: Any) -> Any:
        done = real(*arguments)
        deleted.append(delete(run, [3]))
        return done

    monkeypatch.setattr(following, "evaluate_into_run", evaluate)
    follower(run).evaluate(3)
    assert deleted == [[]]
    assert delete(run, [3]) == ["step-00000003"]


def damage(run: Path) -> None:
    (run / "checkpoints" / "step-00000006" / "rank-00001.safetensors").write_bytes(b"short")


def no_data(run: Path) -> None:
    # Seen only when the data set is opened, at the first evaluation.
    config = (run / "config.yaml").read_text()
    head, tail = config.split("  val:\n")
    (run / "config.yaml").write_text(head + "  val:\n" + tail.replace("path: ", "path: /nowhere", 1))


@pytest.mark.parametrize(
    ("spoil", "steps", "said"),
    [
        (damage, [3, 9], r"WARNING step 6 is not evaluated: .*rank-00001.safetensors: has 5 bytes, the manifest says"),
        (no_data, [], "WARNING step 3 is not evaluated: /nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_said_and_left(
    tmp_path: Path, data: Path, spoil: Callable[[Path], None], steps: list[int], said: str
) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3, 6, 9])
    spoil(run)
    role = follower(run)
    role.serve(drained())
    assert evaluated(run) == steps
    told = [text for text in texts(role) if text.startswith("WARNING")]
    assert len(told) == 3 - len(steps)
    assert re.match(said, told[0]), told
    assert all("\n" not in text for text in told)
    given_up = {path.stem for path in (run / "results").glob("*.given-up")}
    assert given_up == {f"step-{step:08d}" for step in {3, 6, 9} - set(steps)}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no more"), OSError(28, "No space left")]
)
def test_too_little_memory_or_disk_costs_one_evaluation(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3, 6])
    real = following.evaluate_into_run

    def evaluate(evaluator: Any, run: Path, checkpoint: Any, progress: Any) -> Any:
        if checkpoint.step == 3:
            raise error
        return real(evaluator, run, checkpoint, progress)

    monkeypatch.setattr(following, "evaluate_into_run", evaluate)
    role = follower(run)
    role.serve(drained())
    assert evaluated(run) == [6]
    assert given_up_path(run, 3).exists()
    assert texts(role)[0].startswith("WARNING step 3 is not evaluated: ")
    assert ("lower evaluate.batch" in texts(role)[0]) == (not isinstance(error, OSError))
    # A later start tries again.
    monkeypatch.undo()
    follower(run).serve(drained())
    assert evaluated(run) == [3, 6]
    assert not given_up_path(run, 3).exists()


def test_a_defect_is_no_failure_of_the_checkpoint(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies of it, and the launcher must know of which step."""
    run, _ = make_evaluated_run(tmp_path / "run", data, [3])

    def evaluate(*_: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(following, "evaluate_into_run", evaluate)
    role = follower(run)
    with pytest.raises(RuntimeError, match="device-side assert"):
        role.serve(drained())
    assert role.pulse.outstanding == 3
    assert not given_up_path(run, 3).exists()


def test_a_checkpoint_that_vanishes_is_no_trouble(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3, 6])
    role = follower(run)
    assert role.pending() == [3, 6]
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    role.evaluate(3)
    role.serve(drained())
    assert evaluated(run) == [6]
    assert not given_up_path(run, 3).exists()
    assert len(texts(role)) == 1


def test_a_stale_attempt_stops(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3])
    (run / ATTEMPT).write_text("2\n")
    follower(run, attempt=1).serve(threading.Event())
    assert evaluated(run) == []
    follower(run, attempt=2).serve(drained())
    assert evaluated(run) == [3]


def test_by_hand_every_attempt_is_followed(tmp_path: Path, data: Path) -> None:
    """The checkpoints of a later one replace those that it sets aside."""
    run, _ = make_evaluated_run(tmp_path / "run", data, [3])
    role = follower(run)
    role.serve(drained())
    (run / "results" / "step-00000003.json").unlink()
    role.serve(drained())
    assert evaluated(run) == []
    (run / ATTEMPT).write_text("2\n")
    role.serve(drained())
    assert evaluated(run) == [3]


def test_it_follows_until_it_is_asked_to_drain(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3])
    role, drain = follower(run), threading.Event()
    thread = threading.Thread(target=role.serve, args=(drain,))
    thread.start()
    try:
        while evaluated(run) != [3]:
            thread.join(0.02)
        add_checkpoint(run, 6)
        while evaluated(run) != [3, 6]:
            thread.join(0.02)
        assert thread.is_alive()
        add_checkpoint(run, 9)  # before the signal, so it is seen
    finally:
        drain.set()
        thread.join(30)
    assert not thread.is_alive()
    assert evaluated(run) == [3, 6, 9]


def test_the_last_checkpoint_is_waited_for_where_it_shows_late(tmp_path: Path, data: Path) -> None:
    """As on NFS, to a host that has not committed it."""
    run, _ = make_evaluated_run(tmp_path / "run", data, [3], train__steps=6)
    role = follower(run)
    thread = threading.Thread(target=role.serve, args=(drained(), 60.0))
    thread.start()
    try:
        while evaluated(run) != [3]:
            thread.join(0.02)
        thread.join(2 * following.POLL_S)
        assert thread.is_alive()
        add_checkpoint(run, 6)
    finally:
        thread.join(30)
    assert not thread.is_alive()
    assert evaluated(run) == [3, 6]


def test_a_last_checkpoint_that_never_shows_is_given_up(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3], train__steps=6)
    role = follower(run)
    role.serve(drained(), 0.1)
    assert evaluated(run) == [3]
    assert texts(role)[-1] == "WARNING the checkpoint of step 6 does not show within 0.1 s; it is not evaluated"
    assert role.pulse.reporter.messages[-1]["name"] == "evaluator_gave_up"  # type: ignore[attr-defined]
    by_hand = follower(run)
    by_hand.serve(drained())
    assert texts(by_hand) == []


def test_what_waited_for_its_evaluation_goes_at_the_end(tmp_path: Path, data: Path) -> None:
    settings = {"train__checkpoint__keep_last": 1, "train__checkpoint__keep_best": "mIoU"}
    run, recipe = make_evaluated_run(tmp_path / "run", data, [3, 6, 9], **settings, evaluator={"backlog": "all"})
    assert retain(run, recipe) == []
    role = follower(run)
    role.serve(drained())
    role.retain()
    figures = {step: result_of(run, step)["metrics"]["mIoU"] for step in (3, 6, 9)}
    best = max(figures, key=lambda step: (figures[step], step))
    left = {int(path.name[5:]) for path in (run / "checkpoints").iterdir()}
    assert left == {best, 9}


def test_a_step_that_was_given_up_is_left_out(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3, 6])
    role = follower(run)
    role.give_up(3, "it kills")
    role.serve(drained())
    assert evaluated(run) == [6]
    assert given_up_path(run, 3).read_text() == "it kills\n"
    assert json.loads((run / "results" / "step-00000006.json").read_text())["step"] == 6
