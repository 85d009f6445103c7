"""Who comes in at the leader's port: nodes at once, whatever strangers do there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from vitgraft.launch import admission as module
from vitgraft.launch import handshake
from vitgraft.launch.admission import Admission
from vitgraft.launch.handshake import HandshakeError, introduce

SECRET = b"s" * 32


class Port:
    """A leader's port. ``came``: numbers and descriptors of nodes that were let in; ``notes``: what was shown."""

    def __init__(self) -> None:
        self.came: queue.Queue[tuple[int, int]] = queue.Queue()
        self.notes: list[str] = []
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = ("127.0.0.1", int(listener.getsockname()[1]))
        self.admission = Admission(listener, SECRET, 3, lambda *came: self.came.put(came), self.notes.append)

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port()
    yield port
    port.admission.close()
    while not port.came.empty():
        os.close(port.came.get()[1])


def seconds_to_enter(port: Port) -> float:
    begun = time.monotonic()
    os.close(introduce(port.address, SECRET, 2))
    node, descriptor = port.came.get(timeout=10)
    taken = time.monotonic() - begun
    os.close(descriptor)
    assert node == 2
    return taken


def test_hundreds_that_idle_and_drip_keep_no_node_out(port: Port) -> None:
    """Nor do they cost the leader threads or descriptors without limit."""
    own = psutil.Process()
    before, threads = own.num_fds(), threading.active_count()
    idle = [port.stranger() for _ in range(300)]
    assert seconds_to_enter(port) < 1
    over = threading.Event()

    def drip() -> None:
        while not over.is_set():
            for connection in idle:
                try:
                    connection.send(b"{")
                except OSError:
                    continue
            time.sleep(0.05)

    def flood() -> None:
        while not over.is_set():
            with port.stranger():
                time.sleep(0.002)

    attackers = [threading.Thread(target=attack) for attack in (drip, flood)]
    for thread in attackers:
        thread.start()
    try:
        for _ in range(5):
            assert seconds_to_enter(port) < 1
        # This side of the strangers' connections is in this process too.
        assert own.num_fds() - before - len(idle) <= module.MAX_PENDING + 20
        assert threading.active_count() <= threads + len(attackers)
    finally:
        over.set()
        for thread in attackers:
            thread.join()
        for connection in idle:
            connection.close()
    [line] = port.notes
    assert line.startswith(f"WARNING port {port.address[1]}: closed ")
    assert "the last from 127.0.0.1; only its nodes should reach this port" in line


def test_a_handshake_has_one_deadline_however_slowly_it_is_said(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.5)
    begun = time.monotonic()
    with port.stranger() as connection, contextlib.suppress(OSError):
        connection.makefile().readline()
        while time.monotonic() - begun < 5:
            connection.sendall(b" ")  # fails once the other end is closed
            time.sleep(0.1)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    "words",
    [
        b"[" * 4000 + b"\n",
        b"[" * 5000,
        b"\xff\xfe\n",
        b'{"node": 1e999, "answer": "", "challenge": ""}\n',
        b'{"node": ' + b"9" * 4000 + b"}\n",
        b'{"node": true, "answer": ["a"], "challenge": {}}\n',
        '{"node": 1, "answer": "ä", "challenge": "ö"}\n'.encode(),
        b'{"node": 1, "answer": "\\ud800", "challenge": "\\ud800"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        b"",
    ],
    ids=range(11),
)
def test_what_strangers_say_is_no_trouble(port: Port, words: bytes) -> None:
    with port.stranger() as connection:
        assert json.loads(connection.makefile().readline()).keys() == {"challenge"}
        connection.sendall(words)
        if not words:
            connection.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError) if len(words) > handshake.MAX_LINE else contextlib.nullcontext():
            assert connection.recv(1) == b""
    assert port.came.empty()
    assert seconds_to_enter(port) < 1


def test_a_flood_from_one_address_pushes_out_its_own(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not who came from elsewhere and is a little slow."""
    port.admission._most = 8
    slow = socket.socket()
    slow.bind(("127.0.0.2", 0))
    slow.connect(port.address)
    flood = [port.stranger() for _ in range(40)]
    asked = json.loads(slow.makefile().readline())["challenge"]
    answer = handshake._answer(SECRET, "node", asked)
    slow.sendall(json.dumps({"node": 1, "answer": answer, "challenge": "c"}).encode() + b"\n")
    node, descriptor = port.came.get(timeout=5)
    assert node == 1
    os.close(descriptor)
    for connection in (slow, *flood):
        connection.close()


def test_a_leader_without_descriptors_dismisses_a_stranger_for_a_node(port: Port) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    strangers = [port.stranger() for _ in range(5)]
    for connection in strangers:
        connection.makefile().readline()
    # Made beforehand, as this process is both sides: the leader cannot accept it any more.
    node = socket.socket()
    node.settimeout(10)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    fill = []
    try:
        while True:
            fill.append(os.dup(0))
    except OSError:
        pass
    try:
        node.connect(port.address)
        asked = json.loads(_line(node))["challenge"]
        message = {"node": 2, "answer": handshake._answer(SECRET, "node", asked), "challenge": "c"}
        node.sendall(json.dumps(message).encode() + b"\n")
        number, descriptor = port.came.get(timeout=5)
        assert number == 2
        os.close(descriptor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in fill:
            os.close(descriptor)
        for connection in (node, *strangers):
            connection.close()


def test_a_leader_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    while True:
                        connection.sendall(b"{")
                        time.sleep(0.1)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="does not answer"):
            introduce(listener.getsockname(), SECRET, 1)
        assert time.monotonic() - begun < 2
        thread.join()


@pytest.mark.parametrize(
    "words", [b"SSH-2.0-OpenSSH\n", b"[" * 4000 + b"\n", b'{"challenge": 1}\n', b"\xff\n", b"x" * 5000]
)
def test_who_listens_in_the_leaders_place_is_told_apart(words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(words)
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HandshakeError, match="no leader of"):
            introduce(listener.getsockname(), SECRET, 1)
        thread.join()


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1)
    return line
