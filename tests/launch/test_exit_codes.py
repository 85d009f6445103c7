"""Every cause of an end, through every backend: exit code, restarts and what is recorded."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support_agents import PlayedAgent, ends, obedient
from support_writers import make_run

from vitgraft.configs.errors import VitgraftError
from vitgraft.launch.backends import Backend, HereBackend, HostfileBackend, LaunchOrder
from vitgraft.launch.causes import EXIT_CODES
from vitgraft.launch.hosts import Host
from vitgraft.launch.node_backend import NodeBackend
from vitgraft.launch.nodes import NodePlace
from vitgraft.launch.observations import Kind
from vitgraft.launch.recovery import BUDGET_SPENT
from vitgraft.launch.run_dir import RunHandle, open_run
from vitgraft.launch.supervisor import Supervisor
from vitgraft.launch.ui import Screen

LAST = 1
"""The rank that fails."""
Order = dict[str, Any]


def error(code: int, cause: str | None = None) -> list[Order]:
    """A rank's last words, and its end."""
    words = {"kind": "error", "code": code, "text": "last words", "cause": cause, "step": 3}
    return [{"say": "relay", "rank": LAST, "message": words}, *ends(code, LAST)]


def alive(kills: int = 0, quiet: float = 0.0) -> Order:
    state = {"phase": "start", "step": 0, "age": quiet, "quiet": quiet}
    return {"say": "alive", "ranks": {str(LAST): state}, "memory_kills": kills, "free": 1 << 40}


@dataclass(frozen=True)
class Row:
    """How the host of the last rank plays a cause, how often the run starts again for it with one restart to spend,
    and the exit code then; without restarts it is the cause's own."""

    said: list[Order]
    restarts: int
    code: int


LOST = "lost"
TABLE: dict[Kind, Row] = {
    "crash": Row(ends(-signal.SIGSEGV, LAST), 1, BUDGET_SPENT),
    "hang": Row([alive(quiet=2000.0)], 1, BUDGET_SPENT),
    "host_memory": Row([alive(kills=1), *ends(-signal.SIGKILL, LAST)], 1, BUDGET_SPENT),
    "device_memory": Row(error(5, "device_memory"), 1, 5),
    "non_finite": Row(error(5, "non_finite"), 1, 5),
    "lost_node": Row([{"say": LOST}], 1, BUDGET_SPENT),
    "network": Row(error(5, "lost_peers"), 1, BUDGET_SPENT),
    "full_disk": Row(error(5, "no_space"), 0, 5),
    "bad_data": Row(error(3), 0, 3),
    "bad_configuration": Row(error(2), 0, 2),
    "bad_checkpoint": Row(error(4), 0, 4),
    "defect": Row(error(1), 1, 1),
    "preemption": Row([{"say": "asked", "signal": int(signal.SIGUSR1)}], 0, 75),
    "interrupt": Row([{"say": "asked", "signal": int(signal.SIGINT)}], 0, 130),
}


SAVING = {"phase": "save", "step": 3, "age": 4000.0, "quiet": 0.0}
OUTCOMES: dict[str, Row] = {
    "a disk turns read-only": Row(error(5, "read_only"), 0, 5),
    "ranks disagree": Row(error(5), 1, BUDGET_SPENT),
    "three checkpointers died without a commit": Row(
        [{"say": "relay", "rank": -1, "message": {"kind": "error", "code": 5, "text": "the checkpointer was killed"}}],
        1,
        BUDGET_SPENT,
    ),
    "a save waits for a disk that hangs": Row(
        [{"say": "alive", "ranks": {"0": SAVING, "1": SAVING}, "memory_kills": 0, "free": 1 << 40}], 1, BUDGET_SPENT
    ),
}
"""Rows of the table in docs/checkpoints.md that end an attempt with code 5 and are no kind of their own."""


class Played:
    """Replaces what reaches hosts, in each backend."""

    row: Row
    run: Path
    agent: PlayedAgent
    """That of the last rank's host."""

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> Any:
        mine: list[int] = []

        def reply(order: Order) -> list[Order]:
            if order["do"] == "begin":
                mine[:] = order["orders"]["ranks"]
                if LAST in mine:
                    self.agent = agent
                    self._note_entries(order["orders"]["attempt"])
                    if order["orders"]["tickets"] is None:
                        self.fail()
            # Asked to stop, ranks do so behind a checkpoint.
            return ends(75, *mine) if order["do"] == "stop" else obedient({})(order)

        agent = PlayedAgent(host.name, reply)
        return agent

    def fail(self) -> None:
        """What the row says comes to pass."""
        self.agent.say(*(message for message in self.row.said if message["say"] != LOST))
        if {"say": LOST} in self.row.said:
            self.agent.gone = "nothing was heard of it"

    def _note_entries(self, attempt: int) -> None:
        """The same samples each time."""
        if any(message.get("message", {}).get("cause") == "non_finite" for message in self.row.said):
            with (self.run / "non_finite.jsonl").open("a") as stream:
                stream.write(json.dumps({"attempt": attempt, "step": 3, "entries": [[0, 7, 1, 0, "k"]]}) + "\n")


@dataclass
class PlayedLauncher:
    """DeepSpeed's launcher, of which nothing is seen but that it lives, or why not."""

    gone: str | None = None
    over: bool = False

    def ended(self) -> str | None:
        return self.gone

    def end(self) -> None:
        self.over = True


class Here(Played, HereBackend):
    pass


@dataclass
class ByHostfile(Played, HostfileBackend):
    launched: list[PlayedLauncher] = field(default_factory=list)
    gone: str | None = None

    def launch(self, order: LaunchOrder) -> PlayedLauncher:
        self.launched.append(PlayedLauncher(self.gone))
        self.fail()
        return self.launched[-1]


class ByNode(Played, NodeBackend):
    pass


def here(handle: RunHandle) -> Here:
    return Here("a", 2, handle.lock.fileno())


def by_hostfile(handle: RunHandle) -> ByHostfile:
    return ByHostfile([Host("a", 1), Host("b", 1)], {"a": (0,), "b": (0,)}, [])


def by_node(handle: RunHandle) -> ByNode:
    return ByNode(NodePlace(2, 0, "127.0.0.1", 0), 1, handle.path, handle.lock.fileno(), print)


BACKENDS = {here: "a", by_hostfile: "b", by_node: "node-1"}
"""And the host of the last rank."""


def supervise(tmp_path: Path, backend_of: Callable[[RunHandle], Any], row: Row, restarts: int) -> tuple[int, Path, Any]:
    """The exit code, the run and the backend."""
    settings = {"launch__max_restarts": restarts, "launch__restart_delay_s": 0.0}
    run, recipe = make_run(tmp_path / "run", **settings)
    handle = open_run(run, recipe, "auto")
    backend = backend_of(handle)
    backend.row, backend.run = row, run
    supervised: Backend = backend
    try:
        Supervisor(handle, recipe, supervised, Screen(), str(tmp_path)).run()
    except VitgraftError as failure:
        return failure.exit_code, run, backend
    finally:
        handle.close()
    return 0, run, backend


def events(run: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitgraft.launch.attempt.GRACE_AFTER_FAILURE_S", 0.05)
    monkeypatch.setattr("vitgraft.launch.attempt.LOOK_S", 0.02)
    monkeypatch.setattr("vitgraft.launch.supervisor.preflight", lambda *_: ({}, []))


def test_the_table_is_complete() -> None:
    assert TABLE.keys() == EXIT_CODES.keys()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
@pytest.mark.parametrize("kind", TABLE)
def test_cause_to_exit_code(tmp_path: Path, kind: Kind, backend: Callable[[RunHandle], Any]) -> None:
    row, host = TABLE[kind], BACKENDS[backend]
    code, run, _ = supervise(tmp_path / "once", backend, row, 0)
    assert code == EXIT_CODES[kind]
    assert events(run, "restart") == []
    (end,) = events(run, "end")
    assert (end["kind"], end["code"]) == (kind, EXIT_CODES[kind])
    if kind not in ("preemption", "interrupt"):
        assert end["host"] == host

    code, run, used = supervise(tmp_path / "again", backend, row, 1)
    assert code == row.code
    assert [event["kind"] for event in events(run, "restart")] == [kind] * row.restarts
    assert [event["kind"] for event in events(run, "end")] == [kind] * (1 + row.restarts)
    assert len(events(run, "give_up")) == (kind not in ("preemption", "interrupt"))
    if isinstance(used, ByHostfile):
        assert [launcher.over for launcher in used.launched] == [True] * (1 + row.restarts)


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_goes_wrong_with_checkpoints(tmp_path: Path, name: str) -> None:
    row = OUTCOMES[name]
    code, run, _ = supervise(tmp_path / "once", here, row, 0)
    assert (code, len(events(run, "restart"))) == (5, 0)
    code, run, _ = supervise(tmp_path / "again", here, row, 1)
    assert (code, len(events(run, "restart"))) == (row.code, row.restarts)


@pytest.mark.parametrize(("restarts", "expected"), [(0, 5), (1, 2)])
def test_a_stale_run_leaves_the_folder_to_its_owner(tmp_path: Path, restarts: int, expected: int) -> None:
    """Its commit is refused, which fails a rank; no restart takes the run back."""

    class Overtaken(Here):
        def fail(self) -> None:
            (self.run / "attempt").write_text("7\n")
            super().fail()

    row = Row(error(5), 0, expected)
    code, run, _ = supervise(tmp_path, lambda handle: Overtaken("a", 2, handle.lock.fileno()), row, restarts)
    assert code == expected
    assert (run / "attempt").read_text() == "7\n"


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
def test_a_run_that_gets_to_its_end(tmp_path: Path, backend: Callable[[RunHandle], Any]) -> None:
    code, run, _ = supervise(tmp_path, backend, Row(ends(0, 0, LAST), 0, 0), 0)
    assert code == 0
    assert [end["code"] for end in events(run, "end")] == [0]


def test_for_a_launcher_that_ends_no_host_is_blamed(tmp_path: Path) -> None:
    def gone(handle: RunHandle) -> ByHostfile:
        backend = by_hostfile(handle)
        backend.gone = "DeepSpeed's launcher ended with code 0"
        return backend

    code, run, _ = supervise(tmp_path, gone, Row([], 0, 0), 1)
    assert code == BUDGET_SPENT
    for end in events(run, "end"):
        assert (end["kind"], end["code"], end["rank"], end["host"]) == ("crash", 5, None, None)
        assert end["reason"].startswith("DeepSpeed's launcher ended with code 0")
