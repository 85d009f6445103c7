"""The supervisor between attempts: what it does while nobody trains."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support_agents import PlayedAgent, obedient
from support_writers import make_run

from vitgraft.configs.errors import InterruptedRun, PreemptedRun, TrainingError
from vitgraft.launch import roster
from vitgraft.launch import supervisor as module
from vitgraft.launch.backends import HereBackend
from vitgraft.launch.hosts import Host
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.supervisor import Supervisor
from vitgraft.launch.ui import Screen

ALL_WELL: dict[int, int] = {0: 0, 1: 0}


class Backend(HereBackend):
    """Two hosts, a and b, that are played."""

    def __init__(self, codes: dict[int, int]) -> None:
        super().__init__("a", 1, 0)
        self.hosts = [Host("a", 1), Host("b", 1)]
        self.agents = {name: PlayedAgent(name, obedient(codes)) for name in "ab"}
        self.connecting: Callable[[str], None] = lambda name: None

    def connect(self, host: Host, *, again: bool) -> Any:
        self.connecting(host.name)
        return self.agents[host.name]


class Supervised:
    def __init__(self, tmp_path: Path, codes: dict[int, int] = ALL_WELL, **settings: Any) -> None:
        self.run, recipe = make_run(tmp_path / "run", **{"launch__restart_delay_s": 0.0, **settings})
        self.handle = open_run(self.run, recipe, "auto")
        self.backend = Backend(codes)
        self.supervisor = Supervisor(self.handle, recipe, self.backend, Screen(), str(tmp_path))

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in found if event["event"] == name]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitgraft.launch.attempt.GRACE_AFTER_FAILURE_S", 0.05)
    monkeypatch.setattr(roster, "PING_S", 0.02)
    monkeypatch.setattr(module, "preflight", lambda *_: ({}, []))


def signal_soon(number: int) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


def test_who_is_there_hears_of_the_supervisor_while_others_are_waited_for(tmp_path: Path) -> None:
    """An agent that hears nothing for half a minute ends."""
    supervised = Supervised(tmp_path)
    heard: list[int] = []

    def connecting(name: str) -> None:
        if name == "b":
            time.sleep(0.3)
            heard.append(supervised.backend.agents["a"].orders().count("ping"))

    supervised.backend.connecting = connecting
    supervised.supervisor.run()
    assert heard[0] >= 3


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, PreemptedRun), (signal.SIGHUP, PreemptedRun), (signal.SIGINT, InterruptedRun)],
)
def test_a_signal_before_anything_trains_ends_the_waiting(
    tmp_path: Path, number: signal.Signals, error: type[Exception]
) -> None:
    supervised = Supervised(tmp_path)
    supervised.backend.connecting = lambda name: time.sleep(60)
    signal_soon(number)
    begun = time.monotonic()
    with pytest.raises(error, match="the same command goes on"):
        supervised.supervisor.run()
    assert time.monotonic() - begun < 30
    assert supervised.events("stop_asked")[0]["signal"] == number.name


def test_a_signal_while_it_backs_off_ends_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"launch__max_restarts": 3, "launch__restart_delay_s": 600.0}
    supervised = Supervised(tmp_path, {0: 0, 1: -9}, **settings)

    def connecting(name: str) -> None:
        if supervised.events("restart"):
            signal_soon(signal.SIGTERM)

    supervised.backend.connecting = connecting
    monkeypatch.setattr(supervised.supervisor, "_pause", _pausing(supervised))
    with pytest.raises(PreemptedRun):
        supervised.supervisor.run()
    assert 1 <= len(supervised.events("restart")) <= 2


def _pausing(supervised: Supervised) -> Callable[[float], None]:
    plain = supervised.supervisor._pause

    def pause(seconds: float) -> None:
        if seconds:
            signal_soon(signal.SIGTERM)
        plain(seconds)

    return pause


def test_another_nodes_wish_to_stop_is_heard_between_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised = Supervised(tmp_path, {0: 0, 1: -9}, launch__max_restarts=3)
    plain = supervised.supervisor._pause

    def pause(seconds: float) -> None:
        supervised.backend.agents["b"].say({"say": "asked", "signal": int(signal.SIGUSR1)})
        plain(seconds)

    monkeypatch.setattr(supervised.supervisor, "_pause", pause)
    with pytest.raises(PreemptedRun):
        supervised.supervisor.run()
    assert supervised.events("stop_asked")[0]["signal"] == "SIGUSR1"


def test_storage_that_fails_between_attempts_is_the_runs_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervised = Supervised(tmp_path, {0: 0, 1: -9}, launch__max_restarts=3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(module.recovery, "decide", full)
    with pytest.raises(TrainingError, match="No space left on device") as failure:
        supervised.supervisor.run()
    assert failure.value.cause == "no_space"
    assert supervised.events("end")[-1]["code"] == 5


def test_everybody_is_told_how_the_run_ended(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    supervised.supervisor.run()
    told = [message for agent in supervised.backend.agents.values() for message in agent.told]
    assert [message["code"] for message in told if message["do"] == "leave"] == [0, 0]
