"""One command per node: how leader and nodes find and know each other, over real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support_agents import Wishes
from support_writers import make_run

from vitgraft.configs.errors import ConfigError, DataError, InterruptedRun, PreemptedRun, TrainingError, VitgraftError
from vitgraft.launch import ending, handshake, training
from vitgraft.launch import node_backend as module
from vitgraft.launch.handshake import HandshakeError, introduce
from vitgraft.launch.hosts import Host
from vitgraft.launch.links import AgentLink
from vitgraft.launch.node_backend import SECRET, NodeBackend, _connect, _give_up, follow, name_of
from vitgraft.launch.nodes import NodePlace
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.roster import Roster
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.run_state import RunEnd, run_end
from vitgraft.launch.ui import Screen
from vitgraft.launch.wire import Wire
from vitgraft.trainer.monitor_files import read_rows


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def connected(place: NodePlace, run: Path) -> int:
    descriptor = _connect(place, run, None)
    assert isinstance(descriptor, int)
    return descriptor


def is_closed(descriptor: int) -> bool:
    try:
        return os.read(descriptor, 1) == b""
    except BlockingIOError:
        return False


@pytest.fixture
def places() -> list[NodePlace]:
    port = free_port()
    return [NodePlace(3, rank, "127.0.0.1", port) for rank in range(3)]


@pytest.fixture
def backend(places: list[NodePlace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeBackend]:
    monkeypatch.setattr(module, "REJOIN_S", 0.3)
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 1.0)
    backend = NodeBackend(places[0], 2, tmp_path, 0, print)
    yield backend
    backend.close()


def test_a_node_is_known_by_its_number_and_heard(backend: NodeBackend, places: list[NodePlace], tmp_path: Path) -> None:
    assert [host.name for host in backend.hosts] == ["node-0", "node-1", "node-2"]
    descriptor = connected(places[2], tmp_path)
    wire = Wire(descriptor, descriptor)
    link = backend.connect(Host(name_of(2), 2), again=False, since=time.monotonic(), meanwhile=lambda: None)
    wire.send({"say": "begun"})
    deadline = time.monotonic() + 10
    while not (said := link.receive()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (link.host, said) == ("node-2", [{"say": "begun"}])
    link.close()
    wire.close()


def test_who_is_there_early_waits_and_who_comes_again_replaces_himself(
    backend: NodeBackend, places: list[NodePlace], tmp_path: Path
) -> None:
    first, second = (connected(places[1], tmp_path) for _ in range(2))
    deadline = time.monotonic() + 10
    while not backend.waiting() or not is_closed(first):
        assert time.monotonic() < deadline
    assert [link.host for link in backend.waiting()] == ["node-1"]
    backend.connect(Host("node-1", 2), again=False, since=time.monotonic(), meanwhile=lambda: None).close()
    assert backend.waiting() == []
    for descriptor in (first, second):
        os.close(descriptor)


def test_strangers_are_let_go(backend: NodeBackend, places: list[NodePlace], tmp_path: Path) -> None:
    """Nothing that they say is taken for a node's, and nobody waits for them."""
    for message in (
        {"node": 1, "answer": "0" * 64, "challenge": "x"},
        {"node": "one", "answer": "", "challenge": ""},
        ["a list"],
        {},
    ):
        with socket.create_connection(("127.0.0.1", places[0].port), timeout=10) as connection:
            assert json.loads(connection.makefile().readline()).keys() == {"challenge"}
            connection.sendall((json.dumps(message) + "\n").encode())
            assert connection.recv(1) == b""
    silent = socket.create_connection(("127.0.0.1", places[0].port), timeout=10)
    other = tmp_path / "other"
    other.mkdir()
    (other / SECRET).write_bytes(b"another run's")
    with pytest.raises(HandshakeError, match="no leader of this run"):
        introduce(("127.0.0.1", places[1].port), b"another run's", 1)
    assert backend.waiting() == []
    os.close(connected(places[1], tmp_path))  # while one says nothing
    silent.close()


def test_a_leader_who_does_not_know_the_secret_is_no_leader(places: list[NodePlace]) -> None:
    def pretend(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'{"challenge": "a"}\n')
            connection.recv(4096)
            connection.sendall(b'{"answer": "b"}\n')

    with socket.create_server(("127.0.0.1", places[0].port)) as listener:
        thread = threading.Thread(target=pretend, args=(listener,))
        thread.start()
        with pytest.raises(HandshakeError, match="does not know the run's secret"):
            introduce(("127.0.0.1", places[1].port), b"secret", 1)
        thread.join()


def test_the_secret_is_the_owners_alone_and_goes_with_the_leader(
    backend: NodeBackend, places: list[NodePlace], tmp_path: Path
) -> None:
    assert (tmp_path / SECRET).stat().st_mode & 0o777 == 0o600
    before = (tmp_path / SECRET).read_bytes()
    assert len(before) == 32
    backend.close()
    assert not (tmp_path / SECRET).exists()
    again = NodeBackend(places[0], 2, tmp_path, 0, print)
    assert (tmp_path / SECRET).read_bytes() != before
    again.close()


def test_a_node_that_does_not_come_is_given_up(backend: NodeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.2)
    with pytest.raises(NoAnswer, match="has not connected"):
        backend.connect(Host("node-1", 2), again=False, since=time.monotonic(), meanwhile=lambda: None)


def test_a_port_in_use_is_told_at_once(backend: NodeBackend, places: list[NodePlace], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen there: .*; choose another port"):
        NodeBackend(places[0], 2, tmp_path, 0, print)


def test_nodes_read_that_their_leader_cannot_lead(
    places: list[NodePlace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = make_run(tmp_path / "run", train__global_batch=6)
    monkeypatch.setattr(training, "check_data", lambda *_: 3)
    with (
        socket.create_server(("", places[0].port)),
        pytest.raises(ConfigError, match=r"cannot listen there: .*; choose another port") as error,
    ):
        training.train(recipe, run, Screen(), training.Where(processes=1, place=places[0]))
    end = run_end(read_rows(run / "events.jsonl"))
    assert end is not None
    assert (end.code, end.over, end.reason) == (2, True, str(error.value))


@pytest.mark.parametrize("fault", ["world", "data", "checkpoint", "owned", "signal"])
def test_nodes_read_why_their_leader_did_not_start(
    places: list[NodePlace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Else they would wait, and have a job queued again that cannot start."""
    run, recipe = make_run(tmp_path / "run", train__global_batch=8 if fault == "world" else 6)

    def check(*_: object) -> int:
        if fault == "data":
            raise DataError("data/train: no such folder")
        if fault == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        return 3

    monkeypatch.setattr(training, "check_data", check)
    monkeypatch.setattr("vitgraft.launch.run_dir.LOCK_PATIENCE_S", 0.1)
    if fault == "checkpoint":
        (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        if fault == "owned":
            stack.callback(open_run(run, recipe, "auto").close)
        with pytest.raises(VitgraftError) as error:
            training.train(recipe, run, Screen(), training.Where(processes=1, place=places[0]))
    end = run_end(read_rows(run / "events.jsonl"))
    if fault == "owned":
        # Another leads, and tells how its run ends.
        assert (error.value.exit_code, end) == (2, None)
        return
    assert end is not None
    codes = {"world": 2, "data": 3, "checkpoint": 4, "signal": 75}
    assert (end.code, end.over, end.reason) == (codes[fault], True, str(error.value))
    assert error.value.exit_code == codes[fault]


def test_a_job_whose_leader_is_not_there_is_not_queued_again(
    places: list[NodePlace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of a step start together, and 75 would have them all wait once more."""
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    with pytest.raises(TrainingError, match=r"no leader within 0 s .*; see what the first node says"):
        _connect(replace(places[1], together=True), tmp_path, None)


def test_a_secret_that_finds_no_room(places: list[NodePlace], tmp_path: Path) -> None:
    (tmp_path / SECRET).with_suffix(".tmp").mkdir()
    with pytest.raises(ConfigError, match=r"leader\.secret: cannot be written: .*; make room"):
        NodeBackend(places[0], 2, tmp_path, 0, print)


def test_a_node_without_a_leader_says_what_it_misses(
    places: list[NodePlace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    with pytest.raises(PreemptedRun, match="--run-dir must lie on storage that all nodes share"):
        _connect(places[1], tmp_path, None)
    (tmp_path / SECRET).write_bytes(b"secret")
    with pytest.raises(PreemptedRun, match="Connection refused"):
        _connect(places[1], tmp_path, None)


START = {"time": 1.0, "event": "start", "attempt": 1, "world": 2}
FAILED = {"time": 2.0, "event": "end", "attempt": 1, "code": 5, "kind": "crash"}


def write_events(run: Path, *events: dict[str, Any]) -> None:
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize(
    ("events", "code"),
    [
        *(([START, {**FAILED, "code": code}], code) for code in (0, 75, 130)),
        *(([START, FAILED, {"time": 3.0, "event": "give_up", "code": code}], code) for code in (1, 2, 3, 4, 5, 6)),
        # Not an attempt, but the command.
        *(([{"time": 3.0, "event": "end", "attempt": 1, "code": code}], code) for code in (2, 4, 5)),
    ],
)
def test_a_node_that_is_cut_off_leaves_as_the_run_did(
    places: list[NodePlace],
    tmp_path: Path,
    events: list[dict[str, Any]],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    following: None,
) -> None:
    write_events(tmp_path, *events)
    end = _connect(places[1], tmp_path, None)
    assert isinstance(end, RunEnd)
    assert end.code == code
    # Its command knows it for an earlier one's, and waits for its own leader.
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    with pytest.raises(PreemptedRun, match="no leader within 0 s"):
        follow(places[1], tmp_path, Screen())


def test_a_failure_that_another_attempt_may_follow_is_waited_out(
    places: list[NodePlace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    for events in ([START, FAILED], [START, FAILED, {"event": "restart"}], [START, FAILED, {**START, "attempt": 2}]):
        write_events(tmp_path, *events)
        with pytest.raises(PreemptedRun, match="no leader within 0 s"):
            _connect(places[1], tmp_path, None)


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that follow: signals are heard as before when they are over, and nobody waits for long."""
    monkeypatch.setattr(module, "WAIT_S", 5.0)
    old = {number: signal.getsignal(number) for number in ending.SIGNALS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@contextmanager
def leading(lead: Callable[[], None]) -> Iterator[None]:
    """In a thread, as only the first one hears signals, and a node's command wants to."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lead)
        yield
        done.result(30)


def came(backend: NodeBackend) -> AgentLink:
    deadline = time.monotonic() + 10
    while not backend.waiting():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return backend.waiting()[0]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 75, 130])
def test_a_node_that_waits_to_take_part_again_leaves_as_the_others(
    backend: NodeBackend, places: list[NodePlace], tmp_path: Path, code: int, following: None
) -> None:
    def lead() -> None:
        came(backend)
        Roster(backend, str(tmp_path), Wishes()).dismiss(code)  # type: ignore[arg-type]

    with leading(lead):
        if code == 0:
            follow(places[1], tmp_path, Screen())
        else:
            with pytest.raises(VitgraftError, match=f"the run ended with code {code}; the leader says why") as end:
                follow(places[1], tmp_path, Screen())
            assert end.value.exit_code == code
    # Whoever comes later finds nobody.
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", places[0].port), timeout=10)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, PreemptedRun), (signal.SIGINT, InterruptedRun)])
def test_a_node_that_was_asked_to_stop_waits_for_no_other_leader(
    backend: NodeBackend,
    places: list[NodePlace],
    tmp_path: Path,
    number: signal.Signals,
    error: type[Exception],
    following: None,
) -> None:
    def lead() -> None:
        link = came(backend)
        wishes, deadline = Wishes(), time.monotonic() + 10
        roster = Roster(backend, str(tmp_path), wishes)  # type: ignore[arg-type]
        while not link.receive():  # from then on it passes signals on
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        while not wishes.heard:
            assert time.monotonic() < deadline
            roster.hear_idle(())
        assert wishes.heard == [("node-1", number)]
        backend.close()
        link.close()  # without a word

    with leading(lead), pytest.raises(error, match="the same command goes on"):
        follow(places[1], tmp_path, Screen())


def test_nodes_share_one_time_in_which_they_are_waited_for(
    backend: NodeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 20.0)
    begun = time.monotonic()
    since = begun - 19.7
    for node in ("node-1", "node-2"):
        with pytest.raises(NoAnswer, match="has not connected"):
            backend.connect(Host(node, 2), again=False, since=since, meanwhile=lambda: None)
    assert time.monotonic() - begun < 20


def test_whoever_waits_for_nodes_looks_around_meanwhile(backend: NodeBackend) -> None:
    class Stop(Exception):
        pass

    def meanwhile() -> None:
        raise Stop

    with pytest.raises(Stop):
        backend.connect(Host("node-1", 2), again=False, since=time.monotonic(), meanwhile=meanwhile)


def test_who_came_and_went_is_not_there(backend: NodeBackend, places: list[NodePlace], tmp_path: Path) -> None:
    os.close(connected(places[1], tmp_path))
    link, deadline = came(backend), time.monotonic() + 10
    roster = Roster(backend, str(tmp_path), Wishes())  # type: ignore[arg-type]
    while not link.wire.closed:
        assert time.monotonic() < deadline
        roster.hear_idle(())
    with pytest.raises(NoAnswer, match="has not connected"):
        backend.connect(Host("node-1", 2), again=True, since=time.monotonic(), meanwhile=lambda: None)
    again = connected(places[1], tmp_path)
    backend.connect(Host("node-1", 2), again=True, since=time.monotonic(), meanwhile=lambda: None).close()
    os.close(again)


def test_a_signal_while_nobody_leads_ends_a_node() -> None:
    with pytest.raises(InterruptedRun):
        _give_up(2, None)
    with pytest.raises(PreemptedRun):
        _give_up(15, None)
