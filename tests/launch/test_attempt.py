"""One attempt, with agents that are played: what they are told, and what becomes of what they say."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support_agents import PlayedAgent, Reply, ends, obedient
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.attempt import Attempt, Plan
from vitgraft.launch.backends import HereBackend
from vitgraft.launch.causes import cause_of
from vitgraft.launch.deadlines import Deadlines
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.ui import Screen


class Played:
    """An attempt over hosts a and b with one rank each."""

    def __init__(self, tmp_path: Path, reply: Reply, other: Reply | None = None, link: bool = False) -> None:
        self.run, recipe = make_run(tmp_path / "run")
        if link:
            (self.run / "checkpoints").rmdir()
            (tmp_path / "large").mkdir()
            (self.run / "checkpoints").symlink_to(tmp_path / "large")
            write(self.run, 3)
        self.handle = open_run(self.run, recipe, "auto")
        self.agents = {"a": PlayedAgent("a", reply), "b": PlayedAgent("b", other or reply)}
        self.asked: int | None = None
        self.steps: list[int] = []
        links: Any = self.agents
        self.attempt = Attempt(
            self.handle,
            recipe,
            Plan({"a": 1, "b": 1}, "cpu", 1),
            links,
            HereBackend("a", 2, 0),
            Screen(),
            Deadlines({"start": 0.5}),
            lambda: self.asked,
            lambda number, host: setattr(self, "asked", number),
            lambda: self.steps.append(self.attempt.step),
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        file = self.run / "events.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row for row in rows if row["event"] == name]

    def orders(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = next(
            message["orders"] for message in self.agents[host].told if message["do"] == "begin"
        )
        return found


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitgraft.launch.attempt.GRACE_AFTER_FAILURE_S", 0.3)
    monkeypatch.setattr("vitgraft.launch.attempt.LOOK_S", 0.05)


def test_ranks_are_numbered_over_the_hosts_and_meet_on_the_first(tmp_path: Path) -> None:
    played = Played(tmp_path, obedient({0: 0, 1: 0}))
    seen = played.attempt.run()
    assert cause_of(seen) is None
    assert [played.orders(host)["ranks"] for host in "ab"] == [[0], [1]]
    assert {played.orders(host)["world"] for host in "ab"} == {2}
    assert {played.orders(host)["environment"]["MASTER_PORT"] for host in "ab"} == {"29000"}
    assert played.agents["a"].orders() == ["port", "begin", "drain", "end", "ping"]


def test_checkpoints_behind_a_link_are_of_the_run_that_links_to_them(tmp_path: Path) -> None:
    """Its frozen trunk lies in the run, not beside the link's target."""
    played = Played(tmp_path, obedient({0: 0, 1: 0}), link=True)
    played.attempt.run()
    arguments = played.orders("b")["arguments"]
    assert arguments[arguments.index("--resume") + 1] == str(played.run / "checkpoints" / "step-00000003")


@pytest.mark.parametrize(("code", "drop"), [(0, False), (5, True)])
def test_only_a_run_that_is_done_waits_for_the_last_copy(tmp_path: Path, code: int, drop: bool) -> None:
    played = Played(tmp_path, obedient({0: 0, 1: code}))
    played.attempt.run()
    drains = [message for message in played.agents["a"].told if message["do"] == "drain"]
    assert drains == [{"do": "drain", "drop_copy": drop, "evaluate": not drop}]


def test_somebody_who_wants_to_stop_waits_for_no_copy(tmp_path: Path) -> None:
    played: Played

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] != "drain":
            return obedient({0: 0, 1: 0})(order)
        if not order["drop_copy"]:
            played.asked = signal.SIGTERM
            return []
        return [{"say": "drained"}]

    played = Played(tmp_path, reply)
    played.attempt.run()
    assert [message["drop_copy"] for message in played.agents["a"].told if message["do"] == "drain"] == [False, True]


@pytest.mark.parametrize(("asked", "limit", "within"), [(None, 0.5, "0"), (signal.SIGTERM, 3600.0, "1")])
def test_roles_on_a_disk_that_hangs_are_not_waited_for_longer_than_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, limit: float, within: str
) -> None:
    """Nor for long once somebody wants to stop."""
    monkeypatch.setattr("vitgraft.launch.attempt.ASKED_DRAIN_S", 0.6)
    played: Played

    def stuck(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] != "drain":
            return obedient({1: -signal.SIGKILL})(order)
        played.asked = asked
        return []

    played = Played(tmp_path, obedient({}), stuck)
    played.attempt.deadlines = Deadlines({"save": limit})
    started = time.monotonic()
    cause = cause_of(played.attempt.run())
    assert 0.5 <= time.monotonic() - started < 10.0
    assert cause is not None
    assert cause.kind == "crash"
    assert played.agents["b"].orders()[-2:] == ["end", "ping"]
    (event,) = played.events("roles_killed")
    assert event["hosts"] == ["b"]
    assert f"not finished within {within} s, its disk may hang" in event["text"]


def test_the_last_copy_of_a_run_that_is_done_may_take_longer_than_a_save(tmp_path: Path) -> None:
    played: Played

    def slow(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] == "drain":
            threading.Timer(0.5, played.agents["b"].say, [{"say": "drained"}]).start()
            return []
        return obedient({0: 0, 1: 0})(order)

    played = Played(tmp_path, obedient({0: 0, 1: 0}), slow)
    played.attempt.deadlines = Deadlines({"save": 0.1})
    assert cause_of(played.attempt.run()) is None
    assert played.events("roles_killed") == []


def test_the_others_are_ended_after_a_moment(tmp_path: Path) -> None:
    played = Played(tmp_path, obedient({1: -signal.SIGKILL}))
    cause = cause_of(played.attempt.run())
    assert cause is not None
    assert (cause.kind, cause.rank, cause.host) == ("crash", 1, "b")
    assert "end_ranks" in played.agents["a"].orders()


def test_a_host_that_falls_silent_is_lost_and_given_no_more_orders(tmp_path: Path) -> None:
    played = Played(tmp_path, obedient({}))
    played.agents["b"].gone = "nothing was heard of it for 16 s"
    cause = cause_of(played.attempt.run())
    assert cause is not None
    assert (cause.kind, cause.host) == ("lost_node", "b")
    assert played.agents["b"].orders() == ["begin"]
    assert "end" in played.agents["a"].orders()


def test_a_host_whose_ranks_are_done_is_not_missed(tmp_path: Path) -> None:
    played: Played

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] == "drain":
            played.agents["b"].gone = "its connection closed"
            return []
        return obedient({0: 0, 1: 0})(order)

    played = Played(tmp_path, obedient({0: 0, 1: 0}), reply)
    seen = played.attempt.run()
    assert cause_of(seen) is None
    assert [(state.name, state.ranks, state.lost_at is None) for state in seen.hosts] == [
        ("a", (0,), True),
        ("b", (1,), False),
    ]
    assert played.attempt.failed_at is None


def test_ranks_that_do_not_get_on_are_ended_and_the_slowest_is_blamed(tmp_path: Path) -> None:
    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        said = obedient({})(order)
        if order["do"] == "begin":
            rank = order["orders"]["ranks"][0]
            state = {"phase": "start" if rank else "first_step", "step": 0, "age": 2000.0, "quiet": 0.0}
            said += [{"say": "alive", "ranks": {str(rank): state}, "memory_kills": 0, "free": 1 << 40}]
        return said

    played = Played(tmp_path, reply)
    cause = cause_of(played.attempt.run())
    assert cause is not None
    assert (cause.kind, cause.rank, cause.host) == ("hang", 1, "b")
    assert "end_ranks" in played.agents["a"].orders()


def test_meanwhile_it_is_known_at_which_step_the_ranks_are(tmp_path: Path) -> None:
    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        said = obedient({})(order)
        if order["do"] == "begin":
            rank = order["orders"]["ranks"][0]
            state = {"phase": "step", "step": 8 - rank, "age": 0.0, "quiet": 0.0}
            said += [{"say": "alive", "ranks": {str(rank): state}, "memory_kills": 0, "free": 1 << 40}]
            said += ends(0, rank)
        return said

    played = Played(tmp_path, reply)
    played.attempt.run()
    assert played.steps[-1] == 8


def test_ranks_that_nobody_has_started_yet_are_not_silent(tmp_path: Path) -> None:
    """DeepSpeed's launcher takes its time on a slow file system: their start has a limit of its own."""
    played = Played(tmp_path, obedient({}))
    played.attempt.deadlines = Deadlines({"start": 0.5}, silence=0.1)
    cause = cause_of(played.attempt.run())
    assert cause is not None
    assert (cause.kind, cause.rank, cause.host) == ("hang", None, None)
    assert "no rank gets on: start" in cause.text


def test_a_rank_of_a_silent_host_is_not_blamed_for_its_host(tmp_path: Path) -> None:
    """The host says nothing for so long that its rank seems to stand still, but not yet for so long that it is lost."""
    played: Played

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        said = obedient({})(order)
        if order["do"] == "begin" and order["orders"]["ranks"] == [1]:
            played.agents["b"].quiet = 10.0
            said += [{"say": "alive", "ranks": {"1": state}, "memory_kills": 0, "free": 1 << 40}]
        return said

    state = {"phase": "start", "step": 0, "age": 10.0, "quiet": 10.0}
    played = Played(tmp_path, reply)
    played.attempt.deadlines = Deadlines({"start": 0.5}, silence=5.0)
    cause = cause_of(played.attempt.run())
    assert cause is not None
    assert (cause.kind, cause.rank, cause.host) == ("hang", None, None)


def test_a_request_to_stop_on_any_host_is_passed_to_all_once(tmp_path: Path) -> None:
    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] == "begin" and order["orders"]["ranks"] == [1]:
            return [{"say": "begun"}, {"say": "asked", "signal": int(signal.SIGUSR1)}]
        if order["do"] == "stop":
            return ends(75, 0, 1)
        return obedient({})(order)

    played = Played(tmp_path, reply)
    cause = cause_of(played.attempt.run())
    assert cause is not None
    assert (cause.kind, cause.exit_code) == ("preemption", 75)
    assert [played.agents[host].orders().count("stop") for host in "ab"] == [1, 1]


def test_a_host_that_cannot_carry_out_its_orders_is_named(tmp_path: Path) -> None:
    def refuse(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] == "begin":
            return [{"say": "refused", "text": "OSError: No space left on device"}]
        return obedient({})(order)

    played = Played(tmp_path, obedient({}), refuse)
    cause = cause_of(played.attempt.run())
    assert cause is not None
    assert cause.host == "b"
    assert "b cannot carry out its orders: OSError: No space left on device" in cause.text


def test_a_port_that_is_taken_is_a_mistake_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(tmp_path, obedient({}))
    monkeypatch.setattr(played.agents["a"], "ask", lambda *_, **__: {"say": "port", "error": "Address already in use"})
    with pytest.raises(ConfigError, match=r"launch.port: 0: Address already in use; choose another"):
        played.attempt.run()
    assert played.agents["b"].orders() == ["end", "ping"]
