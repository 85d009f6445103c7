"""A host's agent, as a real process: what ends it, and what it ends. No ranks are needed for that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vitgraft.launch import agent as module
from vitgraft.launch.agent import Agent
from vitgraft.launch.links import AgentLink, start_here
from vitgraft.launch.predecessor import end_predecessor
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.wire import Wire

TORCH_FREE = ("launch.agent", "launch.supervisor", "launch.training", "launch.ticket", "launch.node_backend")


def orders(run: Path, **changes: object) -> dict[str, object]:
    known = {"run": str(run), "attempt": 1, "world": 1, "ranks": [], "tickets": None, "arguments": []}
    return {**known, "environment": {}, "silence": None, "evaluator": None, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for folder in ("logs", "checkpoints"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    return tmp_path / "run"


def started(run: Path) -> AgentLink:
    with (run / "lock").open("a") as lock:
        return start_here("here", lock.fileno())


@pytest.mark.parametrize("name", TORCH_FREE)
def test_nothing_that_supervises_loads_torch(name: str) -> None:
    code = f"import sys, vitgraft.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_tells_of_its_host_and_ends_with_the_pipe(run: Path, tmp_path: Path) -> None:
    link = started(run)
    facts = link.ask("facts", "facts", 30, folder=str(tmp_path))
    assert facts["nodename"] == os.uname().nodename
    assert facts["cores"] >= 1
    process = psutil.Process(link._process.pid if link._process is not None else -1)
    assert process.cwd() == str(tmp_path)
    link.close(patience=10)
    assert not process.is_running()


def test_it_leaves_with_the_code_that_it_is_told(run: Path) -> None:
    link = started(run)
    link.ask("facts", "facts", 30, folder="/")
    assert link._process is not None
    link.send("leave", code=75)
    assert link._process.wait(10) == 75
    link.close()


def test_what_it_cannot_do_is_an_answer(run: Path) -> None:
    link = started(run)
    with pytest.raises(NoAnswer, match=r"No such file or directory: '/nowhere'"):
        link.ask("facts", "facts", 30, folder="/nowhere")
    with pytest.raises(NoAnswer, match="surplus"):
        link.ask("begin", "begun", 30, orders=orders(run, surplus=1))
    assert link.ask("facts", "facts", 30, folder="/")["say"] == "facts"
    link.close()


def test_an_agent_that_was_left_behind_is_ended_by_its_successor(run: Path) -> None:
    first = started(run)
    assert first.ask("begin", "begun", 30, orders=orders(run))
    second = started(run)
    assert second.ask("begin", "begun", 30, orders=orders(run, attempt=2))
    assert first._process is not None
    assert first._process.wait(5) == -signal.SIGKILL
    assert "ended with code -9" in first.ended()
    for link in (first, second):
        link.close()


def test_a_process_that_only_has_the_number_of_an_earlier_agent_lives_on(run: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (run / "agents").mkdir()
        facts = {"pid": other.pid, "started": 1, "boot": "another", "space": "pid:[1]"}
        for record in (json.dumps(facts), json.dumps({"pid": other.pid}), "[1]", "{torn"):
            (run / "agents" / "here.json").write_text(record)
            end_predecessor(run, "here")
            assert other.poll() is None
            assert json.loads((run / "agents" / "here.json").read_text())["pid"] == os.getpid()
    finally:
        other.kill()
        other.wait()


def test_a_supervisor_that_says_nothing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut network closes nothing."""
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    to_agent, from_agent = os.pipe(), os.pipe()
    begun = time.monotonic()
    assert Agent(Wire(to_agent[0], from_agent[1]), "here", None).serve() == 5
    assert 0.5 <= time.monotonic() - begun < 5
    for descriptor in (*to_agent, *from_agent):
        os.close(descriptor)


def test_half_lines_and_noise_are_no_messages() -> None:
    read, write = os.pipe()
    wire = Wire(read, write)
    os.write(write, b'Welcome to node-1!\n[1]\n{"say": "al')
    assert wire.receive() == []
    os.write(write, b'ive"}\n{"say": "end"}\n')
    assert wire.receive() == [{"say": "alive"}, {"say": "end"}]
    wire.close()


def test_who_reads_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitgraft.launch.wire.MAX_UNSENT", 1 << 20)
    read, write = os.pipe()
    wire = Wire(read, write)
    for _ in range(400):
        wire.send({"text": "x" * 4000})
    assert wire.closed
    wire.close()
