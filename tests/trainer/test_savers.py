"""What a rank does to save: inline and handed over, the same files; back-pressure, failures, memory."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support_writers import Told, checkpointer, make_run, memfd, poll_until_idle

from vitgraft.configs.errors import CheckpointError, TrainingError
from vitgraft.configs.schema import Recipe
from vitgraft.trainer.checkpoint import commit, layout, savers
from vitgraft.trainer.checkpoint.handover import BUFFER_VARIABLE
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState, state_names
from vitgraft.trainer.checkpoint.savers import HandoverSaver, InlineSaver, make_saver

DATA = layout.DataState(fingerprint="f", seed=0, epoch=0, cursor=3)


def engine_of(optimizer: str) -> Any:
    """What TrainerState looks at of a DeepSpeed engine under ZeRO-0."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    made = (
        torch.optim.AdamW(module.parameters(), lr=0.1)
        if optimizer == "adamw"
        else torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9 if optimizer == "momentum" else 0.0)
    )
    return SimpleNamespace(module=module, optimizer=made, zero_optimization_stage=lambda: 0)


def step(engine: Any) -> None:
    engine.optimizer.zero_grad()
    engine.module(torch.randn(4, 5)).square().mean().backward()
    engine.optimizer.step()


def facts_of(run: Path) -> RunFacts:
    normalisation = layout.Normalisation(mean=[0, 0, 0], std=[1, 1, 1], image_size=[8, 8])
    return RunFacts(run, 1, "h", ["a"], normalisation, None)


class Rank:
    """One rank with a checkpointer in this process that works when told."""

    def __init__(self, folder: Path, optimizer: str = "adamw") -> None:
        self.run, self.recipe = make_run(folder)
        self.engine = engine_of(optimizer)
        self.state = TrainerState(self.engine, ema_decay=0.9)
        _, self.path = memfd()
        self.saver = HandoverSaver(self.state, facts_of(self.run), 100, self.path)
        self.role = checkpointer(self.run, self.recipe, [self.path])


def test_inline_a_checkpoint_that_cannot_be_deleted_is_told_of_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "no", "manifest.json")

    run, recipe = make_run(tmp_path)
    reporter = Told()
    saver = InlineSaver(recipe, TrainerState(engine_of("plain"), None), facts_of(run), 100, reporter)
    saver.begin(3, 12, DATA)
    monkeypatch.setattr(savers, "retain", refuse)
    saver.tidy()
    (text,) = reporter.texts()
    assert text.startswith("WARNING an old checkpoint could not be deleted: ")


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "plain"])
@pytest.mark.parametrize("steps", [0, 2])
def test_both_savers_write_the_same_bytes(tmp_path: Path, optimizer: str, steps: int) -> None:
    """Also before the first step, when the optimizer has made no states."""
    rank = Rank(tmp_path / "separate", optimizer)
    for _ in range(steps):
        step(rank.engine)
    rank.saver.begin(3, 12, DATA)
    poll_until_idle(rank.role)
    ours = rank.saver.finish()
    run, recipe = make_run(tmp_path / "inline")
    inline = InlineSaver(recipe, rank.state, facts_of(run), 100, Told())
    inline.begin(3, 12, DATA)
    theirs = inline.finish()
    for name in layout.expected_files(1):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), name
    different = {"run", "created", "digest"}
    assert ours.manifest.model_dump(exclude=different) == theirs.manifest.model_dump(exclude=different)
    states = {"adamw": ["exp_avg", "exp_avg_sq"], "momentum": ["momentum_buffer"], "plain": []}[optimizer]
    assert ours.manifest.kinds == ["master", *states, "ema"]


def test_the_copy_is_of_the_moment_and_a_second_save_waits(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    step(rank.engine)
    rank.saver.begin(3, 12, DATA)
    before = {name: value.clone() for name, value in rank.engine.module.state_dict().items()}
    step(rank.engine)  # training goes on at once
    second = threading.Thread(target=rank.saver.begin, args=(6, 24, DATA))
    second.start()
    time.sleep(0.2)
    assert second.is_alive(), "the second copy must wait for the first commit"
    deadline = time.monotonic() + 20
    while second.is_alive():
        rank.role.poll()
        assert time.monotonic() < deadline
    poll_until_idle(rank.role)
    from vitgraft.trainer.checkpoint.read import open_checkpoint, read_weights

    first = read_weights(open_checkpoint(commit.final_folder(rank.run, 3)), ema=False)
    assert all((torch.from_numpy(first[name]) == value).all() for name, value in before.items())
    after = read_weights(rank.saver.finish(), ema=False)
    assert (after["0.weight"] != first["0.weight"]).any()


def test_a_failure_is_known_at_the_next_look_and_says_why(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    assert not rank.saver.failed()
    (rank.run / "attempt").write_text("7\n")
    rank.saver.begin(3, 12, DATA)
    assert not rank.saver.failed()
    poll_until_idle(rank.role)
    assert rank.saver.failed()
    expected = r"checkpoint of step 3 not written: .*attempt 1 is stale.*; earlier checkpoints are untouched"
    with pytest.raises(TrainingError, match=expected):
        rank.saver.finish()
    with pytest.raises(TrainingError, match=expected):
        rank.saver.begin(6, 24, DATA)


def test_ranks_that_disagree_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path)
    monkeypatch.setattr(savers.comm, "gather", lambda value: [value, {**value, "step": 4}])
    with pytest.raises(TrainingError, match="rank 0 has step 3, rank 1 has 4; start all ranks alike"):
        rank.saver.begin(3, 12, DATA)
    assert not rank.role.poll(), "nothing was handed over"


def test_neighbours_become_one_copy() -> None:
    """Whatever is joined, every number arrives at its place."""
    source, target = torch.arange(20.0), torch.zeros(24)
    cuts = [(0, 0, 4), (4, 4, 3), (7, 8, 5), (12, 14, 2), (14, 16, 6)]
    pairs = [(target[to : to + n], source[of : of + n]) for of, to, n in cuts]
    joined = savers.join_neighbours([*pairs, (torch.zeros(2), torch.zeros(1).expand(2))])
    assert [place.numel() for place, _ in joined] == [7, 5, 8, 2]
    for place, values in joined:
        place.copy_(values)
    assert all((target[to : to + n] == source[of : of + n]).all() for of, to, n in cuts)
    assert target.count_nonzero() == 19


def test_too_little_memory_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savers, "available_memory", lambda: 100)
    with pytest.raises(
        TrainingError, match=r"separate needs 0\.00 GB of memory on .* 0\.00 GB are available; set it to inline"
    ):
        Rank(tmp_path)


def test_a_buffer_that_is_gone_is_said_at_the_start(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    with pytest.raises(TrainingError, match=r"hand-over buffer .* set train.roles to inline"):
        HandoverSaver(TrainerState(engine_of("adamw"), None), facts_of(run), 9, "/proc/1/fd/12345")


def test_the_role_and_the_launcher_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, separate = make_run(tmp_path / "a")
    _, inline = make_run(tmp_path / "b", train__roles="inline")
    state, told = TrainerState(engine_of("adamw"), None), Told()

    def made(recipe: Recipe) -> type:
        return type(make_saver(recipe, state, facts_of(run), 9, told))

    monkeypatch.delenv(BUFFER_VARIABLE, raising=False)
    assert made(separate) is InlineSaver
    assert "checkpoints are written inline" in told.texts()[0]
    monkeypatch.setenv(BUFFER_VARIABLE, memfd()[1])
    assert made(separate) is HandoverSaver
    assert made(inline) is InlineSaver


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_saved_is_restored(tmp_path: Path, optimizer: str, dtype: torch.dtype) -> None:
    """Read straight to its place, or, where that is no plain memory (a GPU's, another type's), by way of the host."""
    rank = Rank(tmp_path, optimizer)
    for _ in range(2):
        step(rank.engine)
    rank.saver.begin(3, 12, DATA)
    poll_until_idle(rank.role)
    engine = engine_of(optimizer)
    engine.module.to(dtype)
    state = TrainerState(engine, ema_decay=0.9)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    state.restore(rank.saver.finish())
    expected, found = rank.state.tensors(), state.tensors()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == dtype
        assert (value == expected[key]).all(), key


@pytest.mark.parametrize(("wrote", "reads"), [("momentum", "adamw"), ("adamw", "momentum"), ("plain", "momentum")])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path, wrote: str, reads: str) -> None:
    rank = Rank(tmp_path, wrote)
    step(rank.engine)
    rank.saver.begin(3, 12, DATA)
    poll_until_idle(rank.role)
    state = TrainerState(engine_of(reads), ema_decay=0.9)
    with pytest.raises(CheckpointError, match=r"step-00000003: of another optimizer: it holds the states \["):
        state.restore(rank.saver.finish())
    assert not state.engine.optimizer.state


def test_an_optimizer_of_unknown_states_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert state_names(torch.optim.Adam([parameter])) == ["exp_avg", "exp_avg_sq"]
    with pytest.raises(TrainingError, match="optimizer Adagrad: its states are not known"):
        state_names(torch.optim.Adagrad([parameter]))
    state = TrainerState(engine := engine_of("adamw"), None)
    step(engine)
    for values in engine.optimizer.state.values():
        values["max_exp_avg_sq"] = torch.zeros_like(values["exp_avg"])
    with pytest.raises(TrainingError, match=r"keeps the states .*max_exp_avg_sq.*, expected"):
        state.tensors()
