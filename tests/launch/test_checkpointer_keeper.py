"""The launcher's side of the checkpointer: its patience, what it tells, and how it asks for the end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import tiny_recipe

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import validate_recipe
from vitgraft.launch import checkpointer as module
from vitgraft.launch import role_process as role_module
from vitgraft.launch.checkpointer import CheckpointerKeeper
from vitgraft.launch.gang import HostGang, Orders
from vitgraft.launch.role_process import START_S, RoleProcess
from vitgraft.launch.run_dir import RunHandle


class Watched:
    """A keeper whose clock is set by hand and whose processes do nothing."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pid = 1000.0, 0
        for watching in (module, role_module):
            monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(role_module, "end_of", lambda process: process.poll())
        monkeypatch.setattr(role_module, "end_family", lambda process: process.kill())
        monkeypatch.setattr(role_module, "subprocess", SimpleNamespace(DEVNULL=None, Popen=self._popen))
        (run / "logs").mkdir()
        lock = (run / "lock").open("w")
        self.handle = RunHandle(run, 1, None, lock, [])
        self.keeper = CheckpointerKeeper(run, 1, 2.0, lock.fileno(), self.handle.event)
        self.keeper.start(0)

    def _popen(self, *_: object, **__: object) -> Any:
        self.pid += 1
        return SimpleNamespace(pid=self.pid, poll=lambda: None, kill=lambda: None, wait=lambda: None)

    def beat(self, outstanding: int | None = None, pid: int | None = None) -> str | None:
        return self.keeper.heard({"pid": pid or self.pid, "done": 0, "outstanding": outstanding})


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_the_silence_bound_begins_with_the_first_sign_of_life(watched: Watched) -> None:
    watched.now += START_S - 1
    assert watched.keeper.tend()
    assert watched.pid == 1
    watched.beat()
    watched.now += 3
    watched.keeper.tend()
    assert watched.pid == 2, "silent for longer than its bound"
    watched.beat(pid=1)  # the predecessor's, late
    watched.now += START_S - 1
    watched.keeper.tend()
    assert watched.pid == 2
    watched.now += 2
    watched.keeper.tend()
    assert watched.pid == 3, "a start-up is not waited for for ever"


def test_a_write_that_hangs_is_told_of_now_and_then(watched: Watched) -> None:
    told = []
    for second in range(300):
        watched.now = 1000.0 + second
        note = watched.beat(outstanding=7 if second >= 10 else None)
        if note is not None:
            told.append((second, note))
    assert [second for second, _ in told] == [70, 130, 250]
    assert told[0][1].startswith("WARNING checkpoint of step 7 is being written for 60 s")
    assert watched.beat(outstanding=8) is None


@pytest.mark.parametrize(("ranks", "follows"), [([0, 1], False), ([2, 3], True)])
def test_the_checkpointer_is_told_whether_rank_0_is_on_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: list[int], follows: bool
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(RoleProcess, "start", lambda self, pipe, arguments: started.append(arguments))
    orders: dict[str, Any] = {"run": str(tmp_path), "attempt": 1, "world": 4, "ranks": ranks, "tickets": "t"}
    orders |= {"arguments": [], "environment": {}, "silence": 30.0, "evaluator": None}
    gang = HostGang(Orders.model_validate(orders), lambda _: None, None)
    gang.start()
    gang.end()
    assert ["--follow" in arguments for arguments in started] == [follows]


def test_a_silence_bound_that_nobody_can_keep_is_refused() -> None:
    with pytest.raises(ConfigError, match="writer_silence_s"):
        validate_recipe(tiny_recipe("semantic", "t", train__checkpoint={"writer_silence_s": 1}), "test")
