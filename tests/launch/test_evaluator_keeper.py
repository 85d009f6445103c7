"""The launcher's side of the evaluator: its patience, its pauses, what it gives up, and that it never fails a run."""

from __future__ import annotations

import signal
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitgraft.configs.errors import ConfigError
from vitgraft.launch import evaluator as module
from vitgraft.launch import role_process
from vitgraft.launch.evaluator import MAX_PAUSE_S, SILENCE_S, EvaluatorKeeper, evaluator_device
from vitgraft.trainer.signals import DRAIN


class Watched:
    """A keeper whose clock is set by hand and whose processes only end when told."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.started: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.asked: list[int] = []
        self.code: int | None = None
        self.broken = False
        self.told: list[tuple[str, dict[str, Any]]] = []
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(role_process, "time", clock)
        monkeypatch.setattr(role_process, "end_of", lambda process: process.poll())
        monkeypatch.setattr(role_process, "end_family", lambda process: process.kill())
        monkeypatch.setattr(role_process, "subprocess", SimpleNamespace(DEVNULL=None, Popen=self._popen))
        (run / "logs").mkdir()
        self.keeper = EvaluatorKeeper(run, 3, "cuda:1", 5, None, self._event)
        self.keeper.start(0)

    def _event(self, name: str, **facts: Any) -> None:
        self.told.append((name, facts))

    def _popen(self, command: list[str], env: dict[str, str], **_: object) -> Any:
        if self.broken:
            raise OSError(12, "Cannot allocate memory")
        self.started.append(command[3:])
        self.environments.append(env)
        self.code = None
        return SimpleNamespace(
            pid=len(self.started),
            poll=lambda: self.code,
            kill=lambda: None,
            wait=lambda: None,
            send_signal=self.asked.append,
        )

    def beat(self, done: int = 0, outstanding: int | None = None, pid: int | None = None) -> None:
        self.keeper.heard({"pid": pid or len(self.started), "done": done, "outstanding": outstanding})

    def die(self, code: int = 1) -> float:
        """End the process; returns after how many seconds a successor was started."""
        before, died = len(self.started), self.now
        self.code = code
        while len(self.started) == before:
            assert self.keeper.tend()
            assert self.now - died < 100, "no successor"
            self.now += 0.25
        return self.now - 0.25 - died

    def names(self) -> list[str]:
        return [name for name, _ in self.told]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_what_it_is_started_with(watched: Watched, tmp_path: Path) -> None:
    assert watched.started == [["--run-dir", str(tmp_path), "--attempt", "3", "--device", "cuda:1"]]
    assert watched.environments[0]["OMP_NUM_THREADS"] == "5"
    assert watched.keeper.log_path().parent == tmp_path / "logs"
    assert watched.keeper.log_path().name.startswith("evaluator.")


def test_the_pauses_grow_until_it_gets_on(watched: Watched) -> None:
    assert [watched.die() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert MAX_PAUSE_S == 60
    watched.beat(done=1)
    assert [watched.die(-signal.SIGKILL) for _ in range(2)] == [1, 2]
    assert watched.names() == ["evaluator_restart"] * 11
    assert watched.told[0][1] == {"reason": "ended with code 1", "restarts": 1, "step": None}
    assert watched.told[-1][1]["reason"] == "ended by SIGKILL"


def test_a_silent_one_is_replaced(watched: Watched) -> None:
    watched.now += SILENCE_S - 1
    assert watched.keeper.tend()
    watched.beat(outstanding=7)
    watched.now += SILENCE_S - 1
    watched.beat(outstanding=7)  # however long an evaluation takes
    watched.now += SILENCE_S - 1
    assert watched.keeper.tend()
    assert (len(watched.started), watched.told) == (1, [])
    watched.now += 2
    watched.keeper.tend()
    watched.now += 1
    watched.keeper.tend()
    assert len(watched.started) == 2
    assert watched.told == [("evaluator_restart", {"reason": "silent for 120 s", "restarts": 1, "step": 7})]


def test_a_step_that_kills_it_three_times_is_left_out(watched: Watched) -> None:
    for deaths in range(1, 5):
        watched.beat(outstanding=6 if deaths == 2 else 3)  # others between do not matter
        watched.die()
        assert watched.started[-1].count("--give-up") == (deaths == 4)
    assert watched.started[-1][-2:] == ["--give-up", "3"]
    (given_up,) = [facts for name, facts in watched.told if name == "evaluation_given_up"]
    assert given_up["step"] == 3
    said = "step 3 is not evaluated: the evaluator ended with code 1 over it, 3 times; its log"
    assert given_up["text"].startswith(said)
    watched.beat(done=2)
    watched.die()
    assert watched.started[-1][-2:] == ["--give-up", "3"], "every successor is told"


def test_the_last_words_of_the_dead_count_and_those_of_its_predecessor_do_not(watched: Watched) -> None:
    watched.code = 1
    watched.keeper.tend()
    watched.beat(outstanding=9)
    watched.now += 1
    watched.keeper.tend()
    watched.beat(outstanding=5, pid=1)
    watched.die()
    assert [facts["step"] for _, facts in watched.told] == [9, None]


def test_it_drains_and_ends(watched: Watched) -> None:
    assert watched.keeper.tend()
    watched.keeper.drain()
    watched.keeper.drain()
    assert watched.asked == [DRAIN]
    assert watched.keeper.tend()
    watched.die(-signal.SIGKILL)
    assert watched.started[-1][-1] == "--drain"
    watched.code = 0
    assert not watched.keeper.tend()
    assert not watched.keeper.tend()
    assert watched.names() == ["evaluator_restart"]


def test_an_end_that_nobody_asked_for_is_a_death(watched: Watched) -> None:
    watched.die(0)
    assert watched.told[0][1]["reason"] == "ended with code 0"


def test_draining_is_given_up_after_three_deaths_in_a_row(watched: Watched) -> None:
    watched.keeper.drain()
    watched.die()
    watched.beat(done=1)
    for _ in range(2):
        watched.die()
    watched.code = 2
    assert not watched.keeper.tend()
    assert watched.names() == ["evaluator_restart"] * 3 + ["evaluator_gave_up"]
    assert "3 times in a row; what is left is not evaluated; its log" in watched.told[-1][1]["text"]
    watched.now += 1000
    assert not watched.keeper.tend()


def test_what_cannot_be_started_is_no_error_of_the_run(watched: Watched) -> None:
    watched.broken, watched.code = True, 1
    for _ in range(200):
        assert watched.keeper.tend()
        watched.now += 1
    assert watched.told[-1][1]["reason"] == "not to be started: [Errno 12] Cannot allocate memory"
    watched.broken = False
    watched.now += 60
    assert watched.keeper.tend()
    assert len(watched.started) == 2
    watched.keeper.end()
    assert not watched.keeper.tend()


@pytest.mark.parametrize(
    ("wanted", "gpus", "used", "device"),
    [
        ("auto", 0, (), "cpu"),
        ("auto", 8, range(8), "cpu"),
        ("auto", 8, range(7), "cuda:7"),
        ("auto", 2, (), "cuda:0"),
        # --include host:2,3 and host:0,3
        ("auto", 4, (2, 3), "cuda:0"),
        ("auto", 4, (0, 3), "cuda:1"),
        ("cpu", 8, range(2), "cpu"),
        ("cuda", 8, range(2), "cuda:2"),
        ("cuda", 8, range(8), "cuda:7"),
    ],
)
def test_the_device(wanted: str, gpus: int, used: Collection[int], device: str) -> None:
    assert evaluator_device(wanted, gpus, used) == device


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluator\.device: cuda, but no GPU .* use auto or cpu"):
        evaluator_device("cuda", 0, ())
