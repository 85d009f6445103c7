"""The hosts of a run: who is heard, who is gone, who is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support_agents import PlayedAgent, Wishes, obedient

from vitgraft.configs.errors import PreemptedRun
from vitgraft.launch.backends import HereBackend
from vitgraft.launch.hosts import Host
from vitgraft.launch.links import AgentLink, ask_all
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.roster import Roster
from vitgraft.launch.wire import Wire

ASKED = {"say": "asked", "signal": int(signal.SIGTERM)}


class Backend(HereBackend):
    """Hosts that are played. ``came``: those that wait to take part again."""

    def __init__(self, names: str) -> None:
        super().__init__("a", 1, 0)
        self.hosts = [Host(name, 1) for name in names]
        self.agents = {name: PlayedAgent(name, obedient({})) for name in names}
        self.came: list[Any] = []
        self.since: list[float] = []
        self.while_waiting: Callable[[Callable[[], None]], None] = lambda meanwhile: None

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> Any:
        self.since.append(since)
        self.while_waiting(meanwhile)
        if self.agents[host.name].gone is not None:
            raise NoAnswer("gone")
        return self.agents[host.name]

    def waiting(self) -> list[Any]:
        return self.came


@pytest.fixture
def backend() -> Backend:
    return Backend("abc")


@pytest.fixture
def wishes() -> Wishes:
    return Wishes()


@pytest.fixture
def roster(backend: Backend, tmp_path: Path, wishes: Wishes) -> Roster:
    made = Roster(backend, str(tmp_path), wishes)  # type: ignore[arg-type]
    assert made.connect(backend.hosts, again=False) == {}
    return made


def test_hosts_without_work_are_heard_and_missed(backend: Backend, roster: Roster, wishes: Wishes) -> None:
    waiting = PlayedAgent("d", obedient({}))
    backend.came.append(waiting)
    for agent in (*backend.agents.values(), waiting):
        agent.say({"say": "alive"}, ASKED)
        agent.gone = "its connection closed"
    assert roster.hear_idle({"a"}) == dict.fromkeys("bc", "its connection closed")
    assert wishes.heard == [(host, signal.SIGTERM) for host in "bcd"]
    assert roster.answering() == ["a"]
    # What is known is no news, and whoever has work says his to others.
    assert roster.hear_idle({"a"}) == {}
    assert len(wishes.heard) == 3
    assert len(backend.agents["a"].receive()) == 2


def test_who_is_interrupted_waits_for_no_answer() -> None:
    """A host may take minutes to answer; what has ended a job takes less to kill it."""
    pipes = [os.pipe(), os.pipe()]
    link = AgentLink("b", Wire(pipes[0][0], pipes[1][1]))

    def stop(number: int, frame: object) -> None:
        raise PreemptedRun("stopped")

    old = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        begun = time.monotonic()
        with pytest.raises(PreemptedRun):
            ask_all([link], lambda link: link.ask("facts", "facts", 600.0))
        assert time.monotonic() - begun < 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        link.close()
        for descriptor in (pipes[0][1], pipes[1][0]):
            os.close(descriptor)


def test_quiet_hosts(backend: Backend, roster: Roster) -> None:
    backend.agents["b"].quiet = backend.agents["c"].quiet = 10.0
    backend.agents["c"].lost = "let go"
    assert roster.quiet(3.0) == ["b"]


def test_all_are_told_how_the_run_ended(backend: Backend, roster: Roster) -> None:
    waiting = PlayedAgent("d", obedient({}))
    backend.came.append(waiting)
    roster.dismiss(6)
    for agent in (*backend.agents.values(), waiting):
        assert {"do": "leave", "code": 6} in agent.told
        assert agent.lost == "let go"


def test_hosts_are_waited_for_together(backend: Backend, roster: Roster) -> None:
    backend.agents["b"].gone = backend.agents["c"].gone = "gone"
    backend.since.clear()
    assert roster.connect(backend.hosts, again=True) == {"b": "gone", "c": "gone"}
    assert len(backend.since) == 3
    assert len(set(backend.since)) == 1


@pytest.mark.parametrize("who", ["connected", "waiting"])
def test_a_wish_to_stop_is_heard_while_others_are_waited_for(
    backend: Backend, tmp_path: Path, wishes: Wishes, who: str
) -> None:
    """A scheduler that takes all nodes back may tell another than the first."""
    waiting = PlayedAgent("d", obedient({}))
    backend.came.append(waiting)
    asked = {"connected": backend.agents["a"], "waiting": waiting}[who]

    def while_waiting(meanwhile: Callable[[], None]) -> None:
        meanwhile()
        if len(backend.since) == 2:
            asked.say(ASKED)
            meanwhile()
            raise AssertionError("it was not heard")

    backend.while_waiting = while_waiting
    roster = Roster(backend, str(tmp_path), wishes)  # type: ignore[arg-type]
    with pytest.raises(PreemptedRun):
        roster.connect(backend.hosts, again=False)
    assert wishes.heard == [(asked.host, signal.SIGTERM)]
    # The first one, which answered, is let go with the others.
    roster.dismiss(75)
    assert {"do": "leave", "code": 75} in backend.agents["a"].told
