"""The supervisor between attempts: what it does while nobody trains."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support_agents import PlayedAgent, ends, obedient
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.errors import (
    CheckpointError,
    ConfigError,
    InterruptedRun,
    PreemptedRun,
    TrainingError,
    VitgraftError,
)
from vitgraft.launch import roster
from vitgraft.launch import supervisor as module
from vitgraft.launch.backends import HereBackend
from vitgraft.launch.hosts import Host
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.replay import earlier_fault
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.run_state import run_end
from vitgraft.launch.supervisor import Supervisor
from vitgraft.launch.ui import Screen
from vitgraft.trainer.monitor_files import read_rows

ALL_WELL: dict[int, int] = {0: 0, 1: 0}


class Backend(HereBackend):
    """Two hosts, a and b, that are played."""

    def __init__(self, codes: dict[int, int]) -> None:
        super().__init__("a", 1, 0)
        self.hosts = [Host("a", 1), Host("b", 1)]
        self.agents = {name: PlayedAgent(name, obedient(codes)) for name in "ab"}
        self.connecting: Callable[[str], None] = lambda name: None

    def add_spare(self) -> PlayedAgent:
        """A third host, s."""
        self.hosts, self.alone = [*self.hosts, Host("s", 1, spare=True)], False
        self.agents["s"] = PlayedAgent("s", self.agents["b"].reply)
        return self.agents["s"]

    def play(self, *attempts: dict[int, list[dict[str, Any]]]) -> None:
        """What ranks say, and how they end, in one attempt after the other; the others end well."""
        for agent in self.agents.values():
            coming = iter(attempts)
            agent.reply = lambda order, coming=coming: _played(order, coming)  # type: ignore[misc]

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> Any:
        self.connecting(host.name)
        if (gone := self.agents[host.name].gone) is not None:
            raise NoAnswer(gone)
        return self.agents[host.name]


def _played(order: dict[str, Any], coming: Iterator[dict[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    if order["do"] != "begin":
        return obedient({})(order)
    said = next(coming)
    return [message for rank in order["orders"]["ranks"] for message in said.get(rank, ends(0, rank))]


class Supervised:
    def __init__(self, tmp_path: Path, codes: dict[int, int] = ALL_WELL, **settings: Any) -> None:
        self.run, recipe = make_run(tmp_path / "run", **{"launch__restart_delay_s": 0.0, **settings})
        self.handle = open_run(self.run, recipe, "auto")
        self.backend = Backend(codes)
        self.supervisor = Supervisor(self.handle, recipe, self.backend, Screen(), str(tmp_path))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_rows(self.run / "events.jsonl") if event["event"] == name]

    def fails(self) -> VitgraftError:
        """How the run ends; the events tell the same, whoever reads them."""
        with pytest.raises(VitgraftError) as caught:
            self.supervisor.run()
        end = run_end(read_rows(self.run / "events.jsonl"))
        assert end is not None
        assert (end.code, end.over) == (caught.value.exit_code, True)
        told = [message for agent in self.backend.agents.values() for message in agent.told]
        assert {message["code"] for message in told if message["do"] == "leave"} <= {end.code}
        return caught.value


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
    assert supervised.fails().exit_code == 75
    assert 1 <= len(supervised.events("restart")) <= 2
    assert [end["code"] for end in supervised.events("end")][-2:] == [5, 75]


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
    assert supervised.fails().exit_code == 75
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


def test_a_defect_of_the_supervisor_has_its_event_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And agents are let go with its exit code."""
    supervised = Supervised(tmp_path, {0: 0, 1: -9}, launch__max_restarts=3)
    monkeypatch.setattr(module.recovery, "decide", None)
    with pytest.raises(TypeError):
        supervised.supervisor.run()
    end = run_end(read_rows(supervised.run / "events.jsonl"))
    assert end is not None
    assert (end.code, end.over) == (1, True)
    assert "TypeError: 'NoneType' object is not callable; a defect of vitgraft" in str(end.reason)
    assert supervised.backend.agents["a"].told[-1] == {"do": "leave", "code": 1}


def test_everybody_is_told_how_the_run_ended(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    supervised.supervisor.run()
    told = [message for agent in supervised.backend.agents.values() for message in agent.told]
    assert [message["code"] for message in told if message["do"] == "leave"] == [0, 0]


def test_who_was_asked_to_stop_starts_nothing_again(tmp_path: Path) -> None:
    """A rank dies as the run is to stop: the same command goes on later, and no restart is announced."""
    supervised = Supervised(tmp_path, launch__max_restarts=3)
    supervised.backend.play({0: [], 1: [{"say": "asked", "signal": int(signal.SIGTERM)}, *ends(-9, 1)]})
    assert supervised.fails().exit_code == 75
    assert supervised.events("restart") == []
    assert [end["code"] for end in supervised.events("end")] == [5, 75]


def test_hosts_that_go_as_the_run_is_to_stop_are_not_missed(tmp_path: Path) -> None:
    """A scheduler takes its nodes back: the job is to be queued again, and does not fail for want of hosts."""
    supervised = Supervised(tmp_path, launch__max_restarts=3)

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] == "begin":
            return [{"say": "asked", "signal": int(signal.SIGTERM)}]
        for agent in supervised.backend.agents.values():
            agent.gone = "its connection closed"
        return []

    for agent in supervised.backend.agents.values():
        agent.reply = reply
    assert supervised.fails().exit_code == 75
    assert [end["code"] for end in supervised.events("end")] == [5, 75]


@pytest.mark.parametrize("last_host", ["a", "b"])
def test_ctrl_c_twice_on_one_host_ends_at_once(tmp_path: Path, last_host: str) -> None:
    """On a follower as here; but once on each is what a scheduler makes of one."""
    supervised = Supervised(tmp_path)
    agents, asked = supervised.backend.agents, {"say": "asked", "signal": int(signal.SIGINT)}

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] == "begin":
            return [asked]
        if order["do"] == "stop" and last_host == "b":
            return [asked]
        return ends(75, 0, 1) if order["do"] == "stop" else obedient({})(order)

    agents["b"].reply = reply
    if last_host == "a":
        agents["a"].reply = lambda order: [asked] if order["do"] == "begin" else obedient({})(order)
    failure = supervised.fails()
    assert failure.exit_code == 130
    assert ("behind a committed checkpoint" in str(failure)) == (last_host == "a")
    # At once: the attempt does not come to an end of its own.
    assert ("kind" in supervised.events("end")[0]) == (last_host == "a")


def test_a_third_ctrl_c_does_not_disturb_the_end(tmp_path: Path) -> None:
    supervised, ended, orders = Supervised(tmp_path), list[str](), obedient({})

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] in ("begin", "stop"):
            signal.raise_signal(signal.SIGINT)
        if order["do"] == "end":
            # In the middle of ending what runs.
            signal.raise_signal(signal.SIGINT)
            ended.append("ended")
        return orders(order)

    supervised.backend.agents["a"].reply = reply
    assert supervised.fails().exit_code == 130
    assert ended == ["ended"]
    # Nor is anybody left out.
    assert "end" in supervised.backend.agents["b"].orders()


def test_an_unfit_host_is_heard_before_it_is_called_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the slowest host answered, nobody read what the others said."""
    supervised = Supervised(tmp_path)
    supervised.backend.alone = False
    agent = supervised.backend.agents["b"]

    class Unread(PlayedAgent):
        def receive(self) -> list[dict[str, Any]]:
            self.gone = None
            return super().receive()

    agent.__class__ = Unread

    def examine(*_: object) -> tuple[dict[str, str], list[str]]:
        agent.gone = "nothing was heard of it for 20 s"
        return {"b": "versions: another torch"}, []

    monkeypatch.setattr(module, "preflight", examine)
    with pytest.raises(ConfigError, match="b: versions: another torch"):
        supervised.supervisor.run()


def test_a_spare_that_died_meanwhile_is_not_counted_on(tmp_path: Path) -> None:
    settings = {"launch__max_restarts": 3, "launch__host_failures": 1}
    supervised = Supervised(tmp_path, **settings)
    spare = supervised.backend.add_spare()
    supervised.backend.play({0: [], 1: ends(-9, 1)}, {})
    agent, plain = supervised.backend.agents["b"], supervised.backend.agents["b"].reply

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        spare.gone = "nothing was heard of it for 16 s"
        return plain(order)

    agent.reply = reply
    supervised.supervisor.run()
    assert [event["host"] for event in supervised.events("host_lost")] == ["s"]
    assert supervised.events("restart")[0]["hosts"] == {"a": 1}
    assert [end["code"] for end in supervised.events("end")] == [5, 0]


def test_a_spare_that_falls_silent_is_waited_for_before_it_is_counted_on(tmp_path: Path) -> None:
    """It died in the same moment as another, of which that was noticed a little earlier."""
    supervised = Supervised(tmp_path, launch__max_restarts=3, launch__host_failures=1)
    spare = supervised.backend.add_spare()
    supervised.backend.play({0: [], 1: ends(-9, 1)}, {})
    spare.quiet = 10.0
    threading.Timer(1.0, setattr, (spare, "gone", "nothing was heard of it for 16 s")).start()
    supervised.supervisor.run()
    assert supervised.events("restart")[0]["hosts"] == {"a": 1}


def test_a_spare_is_heard_while_others_train(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    spare = supervised.backend.add_spare()
    supervised.backend.play({0: [], 1: []})
    for name in "ab":
        agent, plain = supervised.backend.agents[name], supervised.backend.agents[name].reply
        agent.reply = lambda order, plain=plain: ends(75, 0, 1) if order["do"] == "stop" else plain(order)  # type: ignore[misc]
    spare.say({"say": "asked", "signal": int(signal.SIGUSR1)})
    assert supervised.fails().exit_code == 75
    assert supervised.events("stop_asked")[0]["signal"] == "SIGUSR1"


NOT_FINITE = {"kind": "error", "code": 5, "text": "not finite", "cause": "non_finite", "step": 3}
FAULT = [{"say": "relay", "rank": 1, "message": NOT_FINITE}, *ends(5, 1)]
CRASH = ends(-9, 1)


def name_entries(run: Path, *attempts: int) -> None:
    rows = [{"attempt": attempt, "step": 3, "entries": [[0, 7, 1, 0, "k"]]} for attempt in attempts]
    (run / "non_finite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def verdicts(supervised: Supervised) -> list[tuple[Any, ...]]:
    keys = ("attempt", "step", "verdict", "entries")
    return [tuple(event[key] for key in keys) for event in supervised.events("non_finite_verdict")]


def at_step(step: int) -> dict[str, Any]:
    states = {str(rank): {"phase": "step", "step": step, "age": 0.0, "quiet": 0.0} for rank in (0, 1)}
    return {"say": "alive", "ranks": states, "memory_kills": 0, "free": 1 << 40}


@pytest.mark.parametrize(
    ("attempts", "verdict", "restarts"),
    [
        # It passes its step, and that is known at once, not only at the run's end.
        ([FAULT, [at_step(4), *CRASH], ends(0, 1)], (2, 3, "passing", [[0, 7]]), 2),
        # The run's last step; the replay gets no further.
        ([FAULT, [at_step(3), *ends(0, 1)]], (2, 3, "passing", [[0, 7]]), 1),
        ([FAULT, FAULT], (2, 3, "data", [[0, 7]]), 1),
        ([FAULT, CRASH, FAULT], (3, 3, "data", [[0, 7]]), 2),
    ],
)
def test_what_a_loss_that_was_not_finite_was(
    tmp_path: Path, attempts: list[list[dict[str, Any]]], verdict: tuple[Any, ...], restarts: int
) -> None:
    supervised = Supervised(tmp_path, launch__max_restarts=3)
    name_entries(supervised.run, *(number for number, said in enumerate(attempts, 1) if said is FAULT))
    supervised.backend.play(*({1: said} for said in attempts))
    if verdict[2] == "data":
        assert "again with the same samples: it is the data" in str(supervised.fails())
    else:
        supervised.supervisor.run()
    assert verdicts(supervised) == [verdict]
    assert len(supervised.events("restart")) == restarts


@pytest.mark.parametrize(("said", "verdict"), [(FAULT, "data"), (ends(0, 1), "passing")])
def test_the_replay_of_another_command_tells_too(tmp_path: Path, said: list[dict[str, Any]], verdict: str) -> None:
    first = Supervised(tmp_path, launch__max_restarts=0)
    write(first.run, 2)
    name_entries(first.run, 1)
    first.backend.play({1: FAULT})
    assert first.fails().exit_code == 5
    assert verdicts(first) == []
    first.handle.close()

    again = Supervised(tmp_path, launch__max_restarts=3)
    assert (again.handle.attempt, again.handle.resume.step if again.handle.resume else None) == (2, 2)
    name_entries(again.run, 1, 2)
    again.backend.play({1: said})
    if verdict == "data":
        assert "it is the data" in str(again.fails())
    else:
        again.supervisor.run()
    assert verdicts(again) == [(2, 3, verdict, [[0, 7]])]
    assert again.events("restart") == []


def test_what_is_known_is_not_told_by_another_command(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    name_entries(supervised.run, 1)
    event = {"event": "non_finite_verdict", "attempt": 2, "step": 3, "verdict": "passing", "entries": [[0, 7]]}
    assert earlier_fault(supervised.run, 2) is not None
    assert earlier_fault(supervised.run, 3) is None  # a checkpoint behind it
    (supervised.run / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert earlier_fault(supervised.run, 2) is None
    name_entries(supervised.run, 1, 3)  # and once more
    assert earlier_fault(supervised.run, 2) is not None


def test_a_restart_that_finds_no_checkpoint_is_the_runs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised = Supervised(tmp_path, {0: 0, 1: -9}, launch__max_restarts=3)

    def none_left() -> None:
        raise CheckpointError("no valid checkpoint is left")

    monkeypatch.setattr(supervised.handle, "next_attempt", none_left)
    assert supervised.fails().exit_code == 4
    assert [end["code"] for end in supervised.events("end")] == [5, 4]


def test_hosts_that_do_not_fit_are_in_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised = Supervised(tmp_path)
    supervised.backend.alone = False
    monkeypatch.setattr(module, "preflight", lambda *_: ({"b": "packages: another torch"}, []))
    assert supervised.fails().exit_code == 2
    assert supervised.events("end")[0]["reason"] == "b: packages: another torch"


@pytest.mark.parametrize("gone", ["b", "s"])
def test_a_host_that_dies_while_it_is_examined_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """A spare takes its place, or was not needed."""
    supervised = Supervised(tmp_path)
    supervised.backend.add_spare()

    def examine(*_: object) -> tuple[dict[str, str], list[str]]:
        supervised.backend.agents[gone].gone = "its connection closed"
        return {gone: "its connection closed"}, []

    monkeypatch.setattr(module, "preflight", examine)
    supervised.supervisor.run()
    assert [event["host"] for event in supervised.events("host_absent")] == [gone]
    assert supervised.events("start")[0]["hosts"] == {"a": 1, "s" if gone == "b" else "b": 1}


@pytest.mark.parametrize(("absent", "restarts", "code"), [("s", 0, 0), ("b", 0, 5), ("b", 1, 0)])
def test_who_may_be_missing_where_no_restart_is_allowed(tmp_path: Path, absent: str, restarts: int, code: int) -> None:
    supervised = Supervised(tmp_path, launch__max_restarts=restarts)
    if absent == "s":
        supervised.backend.add_spare()
    supervised.backend.agents[absent].gone = "no route to host"
    if code:
        assert "can carry 1 of 2 ranks only, and with launch.max_restarts: 0" in str(supervised.fails())
        return
    supervised.supervisor.run()
    assert [event["host"] for event in supervised.events("host_absent")] == [absent]
