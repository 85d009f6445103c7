"""One command per node: how leader and nodes find and know each other, over real sockets."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitgraft.configs.errors import ConfigError, InterruptedRun, PreemptedRun
from vitgraft.launch import node_backend as module
from vitgraft.launch.hosts import Host
from vitgraft.launch.node_backend import SECRET, NodeBackend, _connect, _give_up, name_of
from vitgraft.launch.nodes import NodePlace
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.wire import Wire


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


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
    monkeypatch.setattr(module, "_HANDSHAKE_S", 1.0)
    backend = NodeBackend(places[0], 2, tmp_path, 0)
    yield backend
    backend.close()


def test_a_node_is_known_by_its_number_and_heard(backend: NodeBackend, places: list[NodePlace], tmp_path: Path) -> None:
    assert [host.name for host in backend.hosts] == ["node-0", "node-1", "node-2"]
    descriptor = _connect(places[2], tmp_path, False)
    assert descriptor is not None
    wire = Wire(descriptor, descriptor)
    link = backend.connect(Host(name_of(2), 2), again=False)
    wire.send({"say": "alive"})
    deadline = time.monotonic() + 10
    while not (said := link.receive()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (link.host, said) == ("node-2", [{"say": "alive"}])
    link.close()
    wire.close()


def test_who_is_there_early_waits_and_who_comes_again_replaces_himself(
    backend: NodeBackend, places: list[NodePlace], tmp_path: Path
) -> None:
    first, second = (_connect(places[1], tmp_path, False) for _ in range(2))
    assert first is not None
    assert second is not None
    deadline = time.monotonic() + 10
    while not backend.waiting() or not is_closed(first):
        assert time.monotonic() < deadline
    assert [link.host for link in backend.waiting()] == ["node-1"]
    backend.connect(Host("node-1", 2), again=False).close()
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
    with pytest.raises(ValueError, match="does not speak our language"):
        module._introduce(places[1], b"another run's")
    assert backend.waiting() == []
    assert _connect(places[1], tmp_path, False) is not None  # while one says nothing
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
        with pytest.raises(ValueError, match="does not know the run's secret"):
            module._introduce(places[1], b"secret")
        thread.join()


def test_the_secret_is_the_owners_alone_and_goes_with_the_leader(
    backend: NodeBackend, places: list[NodePlace], tmp_path: Path
) -> None:
    assert (tmp_path / SECRET).stat().st_mode & 0o777 == 0o600
    before = (tmp_path / SECRET).read_bytes()
    assert len(before) == 32
    backend.close()
    assert not (tmp_path / SECRET).exists()
    again = NodeBackend(places[0], 2, tmp_path, 0)
    assert (tmp_path / SECRET).read_bytes() != before
    again.close()


def test_a_node_that_does_not_come_is_given_up(backend: NodeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.2)
    with pytest.raises(NoAnswer, match="has not connected"):
        backend.connect(Host("node-1", 2), again=False)


def test_a_port_in_use_is_told_at_once(backend: NodeBackend, places: list[NodePlace], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen there: .*; choose another port"):
        NodeBackend(places[0], 2, tmp_path, 0)


def test_a_node_without_a_leader_says_what_it_misses(
    places: list[NodePlace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    with pytest.raises(PreemptedRun, match="--run-dir must lie on storage that all nodes share"):
        _connect(places[1], tmp_path, False)
    (tmp_path / SECRET).write_bytes(b"secret")
    with pytest.raises(PreemptedRun, match="Connection refused"):
        _connect(places[1], tmp_path, False)
    # The run was finished while this node was cut off.
    start = {"time": 1.0, "event": "start", "attempt": 1, "world": 2}
    end = {"time": 2.0, "event": "end", "attempt": 1, "code": 0}
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (start, end)))
    assert _connect(places[1], tmp_path, True) is None
    with pytest.raises(PreemptedRun):
        _connect(places[1], tmp_path, False)


def test_a_signal_while_nobody_leads_ends_a_node() -> None:
    with pytest.raises(InterruptedRun):
        _give_up(2, None)
    with pytest.raises(PreemptedRun):
        _give_up(15, None)
