"""Messages that nobody of us would send, to everything that hears others: the leader's port, the leader's and the
agents' ends of their connections, what ranks and roles say to their agent. Nothing raises, hangs, or fills memory."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitgraft.launch import wire as wire_module
from vitgraft.launch.admission import Admission
from vitgraft.launch.gang import HostGang, Orders
from vitgraft.launch.handshake import introduce
from vitgraft.launch.links import AGENT, AgentLink
from vitgraft.launch.messages import of_agents, of_roles
from vitgraft.launch.wire import Wire

SEED = int(os.environ.get("SOAK_SEED", "1"))
SECONDS = float(os.environ.get("SOAK_SECONDS", "180"))
MORE_MEMORY = 400 << 20
"""Bytes that hearing may add: a line of the largest size is held a few times, once as Python's objects."""

STATE = {"phase": "step", "step": 3, "age": 0.5, "longest": {"step": 1.0}, "own": [[0.1, 0.2]]}
ERROR = {"kind": "error", "code": 5, "text": "no", "cause": None, "step": None}
SAID: list[dict[str, Any]] = [
    {"say": "alive", "ranks": {"0": {**STATE, "quiet": 0.1}}, "memory_kills": 0, "free": 1 << 40},
    {"say": "relay", "rank": 0, "message": ERROR},
    {"say": "end", "rank": 0, "code": 0, "by_us": False},
    {"say": "event", "name": "straggler", "facts": {"rank": 1}},
    {"say": "asked", "signal": 15},
    {"say": "refused", "text": "no"},
    {"say": "facts", "gpus": 0, "cores": 2, "address": None, "nodename": "a"},
    {"say": "port", "port": 29500},
    {"say": "answer", "answer": {"time": 1.0}},
    {"say": "begun"},
]
OF_ROLES: list[dict[str, Any]] = [
    {"kind": "state", **STATE},
    {"kind": "progress", "label": "train", "done": 1, "total": 2, "facts": {"loss": 0.5}},
    {"kind": "note", "text": "a"},
    {"kind": "event", "name": "copy_failed", "text": "a"},
    ERROR,
    {"kind": "beat", "role": "checkpointer", "pid": 1, "done": 0, "outstanding": None},
]
ORDERS: list[dict[str, Any]] = [
    {"do": "facts", "folder": "/"},
    {"do": "port", "wanted": 0},
    {"do": "answer", "question": {"ask": "time"}},
    {"do": "stop"},
    {"do": "end_ranks"},
    {"do": "drain", "drop_copy": True, "evaluate": False},
    {"do": "end"},
    {"do": "ping"},
]
ODD: list[Any] = [
    None,
    True,
    -1,
    1 << 200,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "\x00",
    "\ud800",
    "é" * 1000,
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    "[/bold]",
]


def mutated(random_: random.Random, value: Any, depth: int = 0) -> Any:
    """The value with some parts replaced, left out, doubled or renamed."""
    if random_.random() < 0.15:
        return random_.choice(ODD)
    if isinstance(value, dict):
        items = [(key, mutated(random_, part, depth + 1)) for key, part in value.items() if random_.random() > 0.05]
        if random_.random() < 0.1:
            items.append((random_.choice(["host", "time", "rank", "", "x" * 300, "99999"]), random_.choice(ODD)))
        return dict(items)
    if isinstance(value, list):
        return [mutated(random_, part, depth + 1) for part in value * random_.choice([1, 1, 1, 2])]
    return value


def line(random_: random.Random, like: list[dict[str, Any]]) -> bytes:
    """One line of nonsense, mostly close to sense."""
    kind = random_.randrange(10)
    if kind == 0:
        return random_.randbytes(random_.choice([1, 50, 5000])).replace(b"\n", b"") + b"\n"
    if kind == 1:
        return b"[" * random_.choice([10, 2000, 200_000]) + b"\n"
    if kind == 2:
        return b'{"say": ' + b"9" * random_.choice([20, 5000]) + b"}\n"
    text = json.dumps(mutated(random_, random_.choice(like)), ensure_ascii=random_.random() < 0.5)
    data = bytearray(text.encode(errors="surrogatepass"))
    if kind == 3 and data:
        for _ in range(random_.randrange(1, 5)):
            data[random_.randrange(len(data))] = random_.randrange(256)
    return bytes(data).replace(b"\n", b" ") + b"\n"


def rounds(share: float) -> Callable[[], bool]:
    """True for this share of the seconds."""
    deadline = time.monotonic() + SECONDS * share
    return lambda: time.monotonic() < deadline


def pair() -> tuple[Wire, socket.socket]:
    ours, theirs = socket.socketpair()
    descriptor = ours.detach()
    return Wire(descriptor, descriptor), theirs


def pour(theirs: socket.socket, data: bytes) -> None:
    """As much of it as the other end takes within a moment."""
    theirs.settimeout(0.5)
    with contextlib.suppress(OSError):
        theirs.sendall(data)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.soak
def test_the_leader_hears_agents() -> None:
    """What is passed on has the fields that the supervisor reads, and nothing else happens."""
    random_, more, before = random.Random(SEED), rounds(0.25), peak()
    while more():
        wire, theirs = pair()
        link = AgentLink("a", wire)
        with theirs:
            sent = threading.Thread(
                target=pour, args=(theirs, b"".join(line(random_, SAID) for _ in range(random_.randrange(1, 60))))
            )
            sent.start()
            heard = []
            while sent.is_alive():
                heard += link.receive()
            heard += link.receive()
        assert of_agents(heard) == heard
        link.close()
    assert peak() - before < MORE_MEMORY


@pytest.mark.soak
def test_lines_without_an_end_are_given_up() -> None:
    random_, more, before = random.Random(SEED + 1), rounds(0.1), peak()
    while more():
        wire, theirs = pair()
        over = threading.Event()

        def flood(theirs: socket.socket = theirs, over: threading.Event = over, block: bytes = b"x" * 65536) -> None:
            theirs.settimeout(0.2)
            with contextlib.suppress(OSError):
                while not over.is_set():
                    theirs.sendall(block)

        block = random_.choice([b"x", b'{"a": [', b"[" * 1000, b"\xff" * 100]) * 6000
        thread = threading.Thread(target=flood, kwargs={"block": block})
        thread.start()
        deadline = time.monotonic() + 20
        while not wire.closed and time.monotonic() < deadline:
            assert wire.receive() == []
        assert wire.closed
        assert len(wire._came) <= wire_module.MAX_MESSAGE
        over.set()
        wire.close()
        theirs.close()
        thread.join()
    assert peak() - before < MORE_MEMORY


@pytest.mark.soak
def test_an_agent_hears_its_ranks_and_roles(tmp_path: Path) -> None:
    random_, more, before, said = random.Random(SEED + 2), rounds(0.2), peak(), []
    orders = Orders(
        run=str(tmp_path),
        attempt=1,
        world=1,
        ranks=[],
        tickets=None,
        arguments=[],
        environment={},
        silence=None,
        evaluator=None,
    )
    while more():
        gang = HostGang(orders, said.append, None)
        wire, theirs = pair()
        gang._roles, gang._roles_pipe = wire, os.open(os.devnull, os.O_RDONLY)
        with theirs:
            for _ in range(20):
                pour(theirs, line(random_, OF_ROLES))
                gang.tend()
        for message in of_roles([message["message"] for message in said if message["say"] == "relay"]):
            json.dumps(message)
        assert of_agents(said) == said
        said.clear()
        gang.end()
    assert peak() - before < MORE_MEMORY


@pytest.mark.soak
def test_a_leaders_port_hears_strangers() -> None:
    random_, more, before = random.Random(SEED + 3), rounds(0.25), peak()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    address, came = listener.getsockname(), queue.Queue[int]()
    errors: list[Any] = []
    hook, threading.excepthook = threading.excepthook, errors.append
    admission = Admission(listener, b"s" * 32, 3, lambda node, descriptor: came.put(descriptor), lambda _: None)
    hello = [{"node": 1, "answer": "0" * 64, "challenge": "c"}, {"challenge": "c"}, {"answer": "0" * 64}]
    try:
        while more():
            strangers = [socket.create_connection(address, timeout=5) for _ in range(random_.randrange(1, 40))]
            for stranger in strangers:
                pour(stranger, line(random_, hello)[: random_.choice([1, 10, 100_000])])
            begun = time.monotonic()
            os.close(introduce(address, b"s" * 32, 1))
            os.close(came.get(timeout=5))
            assert time.monotonic() - begun < 1
            for stranger in strangers:
                stranger.close()
    finally:
        admission.close()
        threading.excepthook = hook
    assert errors == []
    assert peak() - before < MORE_MEMORY


@pytest.mark.soak
def test_an_agent_hears_its_leader(tmp_path: Path) -> None:
    """A real one: it answers to the end, says nothing on its standard error, and stays small."""
    random_, more = random.Random(SEED + 4), rounds(0.2)
    with (tmp_path / "complaints").open("w+b") as complaints:
        agent = subprocess.Popen(
            [*AGENT, "--host", "here"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, cwd=tmp_path
        )
        assert agent.stdin is not None
        assert agent.stdout is not None
        link = AgentLink("here", Wire(os.dup(agent.stdout.fileno()), os.dup(agent.stdin.fileno())))
        try:
            assert link.ask("facts", "facts", 60, folder=str(tmp_path))["nodename"] == os.uname().nodename
            while more():
                data = b"".join(line(random_, ORDERS) for _ in range(20))
                os.set_blocking(link.wire.write, True)
                written = 0
                while written < len(data):
                    written += os.write(link.wire.write, data[written:])
                os.set_blocking(link.wire.write, False)
                link.send("end")
                deadline = time.monotonic() + 60
                while not any(message["say"] == "ended" for message in link.receive()):
                    assert link.silent() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
            assert agent.poll() is None
            status = Path(f"/proc/{agent.pid}/status").read_text()
            [high] = [int(row.split()[1]) << 10 for row in status.splitlines() if row.startswith("VmHWM")]
            assert high < MORE_MEMORY
        finally:
            link.close()
            agent.kill()
            agent.wait()
        complaints.seek(0)
        assert complaints.read() == b""


def test_one_round_of_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that make test sees what make soak does at length."""
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1.0)
    test_the_leader_hears_agents()
    test_lines_without_an_end_are_given_up()
    test_an_agent_hears_its_ranks_and_roles(tmp_path)
    test_a_leaders_port_hears_strangers()
