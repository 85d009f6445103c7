"""A host's agent, as a real process: what ends it, and what it ends. No ranks are needed for that."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from vitgraft.configs.errors import ConfigError
from vitgraft.launch import agent as module
from vitgraft.launch.agent import Agent
from vitgraft.launch.gang import HostGang, Orders
from vitgraft.launch.links import AGENT, AgentLink, start_agent, start_here, start_over_ssh
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


def test_what_a_whole_job_is_sent_does_not_end_it_while_it_starts(run: Path, tmp_path: Path) -> None:
    link = started(run)
    assert link._process is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        link._process.send_signal(number)
    assert link.ask("facts", "facts", 30, folder=str(tmp_path))["say"] == "facts"
    link.close(patience=10)


@pytest.mark.parametrize(
    ("login", "own", "expected"),
    [
        ("10.0.0.9 5 10.0.0.1 22", None, "eth7"),
        ("10.0.0.9 5 10.0.0.1 22", "ib0", "ib0"),
        ("127.0.0.1 5 127.0.0.1 22", None, None),
        ("", None, None),
    ],
)
def test_ranks_meet_by_the_interface_that_the_leader_comes_in_by(
    login: str, own: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitgraft.launch.network_probe.interface_of", {"10.0.0.1": "eth7"}.get)
    monkeypatch.setenv("SSH_CONNECTION", login)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", own or "")
    if own is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    module._choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_logs_that_were_moved_away_begin_anew(run: Path) -> None:
    """Whoever tidies up while a run goes on must not end it at its next restart."""
    (run / "logs").rename(run / "logs.moved")
    link = start_agent("node-1", ["sh", "-c", "echo gone >&2; exit 1"], os.environ, None, run / "logs")
    assert link._process is not None
    assert link._process.wait(20) == 1
    link.close()
    assert (run / "logs" / "agent.node-1.log").read_text() == "gone\n"
    (run / "logs").rename(run / "logs.moved-2")
    said: list[dict[str, Any]] = []
    gang = HostGang(Orders.model_validate(orders(run, ranks=[0])), said.append, None)
    gang.start()
    gang.end()
    assert [path.name for path in (run / "logs").iterdir()] == [f"trainer-0.{os.uname().nodename}.1.log"]


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


def test_what_it_says_is_kept_and_only_its_own_is_quoted(run: Path) -> None:
    """Of a log that earlier agents have written to as well."""
    dies = ["sh", "-c", "echo Traceback >&2; echo 'MemoryError: the last line' >&2; exit 1"]
    (run / "logs" / "agent.node-1.log").write_text("of an earlier one\n")
    link = start_agent("node-1", dies, os.environ, None, run / "logs")
    link.facts = {"cores": 1}  # it has answered before
    assert link._process is not None
    assert link._process.wait(20) == 1
    assert link.ended() == "its agent is gone: MemoryError: the last line"
    link.close()
    silent = start_agent("node-1", ["false"], os.environ, None, run / "logs")
    silent.facts = {"cores": 1}
    assert silent.ended() == "its agent is gone: ended with code 1"
    silent.close()
    log = (run / "logs" / "agent.node-1.log").read_text()
    assert log.startswith("of an earlier one\nTraceback")
    assert log.endswith("MemoryError: the last line\n")


def test_a_process_that_only_has_the_number_of_an_earlier_agent_lives_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITGRAFT_AGENT", "")
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


EARLIER = """
import subprocess, sys, time
from pathlib import Path
from vitgraft.launch.predecessor import end_predecessor

end_predecessor(Path(sys.argv[1]), "here")
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def test_what_an_earlier_agent_has_left_is_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader process that was stopped does not see its rank die."""
    monkeypatch.setenv("VITGRAFT_AGENT", "")
    earlier = subprocess.Popen([sys.executable, "-c", EARLIER, str(run)], stdout=subprocess.PIPE, text=True)
    assert earlier.stdout is not None
    left = psutil.Process(int(earlier.stdout.readline()))
    other = subprocess.Popen(["sleep", "600"])
    left.suspend()
    earlier.kill()
    earlier.wait()
    try:
        assert left.is_running()
        end_predecessor(run, "here")
        left.wait(20)
        assert other.poll() is None
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


def test_a_supervisor_whose_order_takes_long_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said meanwhile is not read yet."""
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    to_agent, from_agent = os.pipe(), os.pipe()
    agent = Agent(Wire(to_agent[0], from_agent[1]), "here", None)
    agent._answers["facts"] = lambda _: time.sleep(0.8)
    os.write(to_agent[1], b'{"do": "facts"}\n')
    later = threading.Timer(1.0, os.write, (to_agent[1], b'{"do": "leave", "code": 7}\n'))
    later.start()
    assert agent.serve() == 7
    later.join()
    for descriptor in (*to_agent, *from_agent):
        os.close(descriptor)


def test_what_a_login_shell_prints_takes_no_message_with_it() -> None:
    greeting = ["sh", "-c", 'printf "Welcome to node-1"; exec "$@"', "sh"]
    link = start_agent("here", [*greeting, *AGENT, "--host", "here"], os.environ, None)
    assert link.ask("facts", "facts", 20, folder="/")["cores"] >= 1
    link.close(patience=5)


def test_a_file_system_that_hangs_silences_nobody(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_agent, from_agent = os.pipe(), os.pipe()
    agent, hangs, over = Agent(Wire(to_agent[0], from_agent[1]), "here", None), threading.Event(), threading.Event()

    def look(_: Path) -> Any:
        if hangs.is_set():
            over.wait(20)
        hangs.set()
        return SimpleNamespace(f_bavail=3, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", look)
    monkeypatch.setattr(module, "ALIVE_S", 0.01)
    agent._begin({"orders": orders(run)})
    hangs.wait(5)
    time.sleep(0.1)
    begun = time.monotonic()
    agent._say_alive()
    assert time.monotonic() - begun < 5
    over.set()
    agent._end({})
    supervisor = Wire(from_agent[0], to_agent[1])
    assert [said["free"] for said in supervisor.receive() if said["say"] == "alive"] == [3 * 4096]
    agent._wire.close()
    supervisor.close()


# Stands for a rank that is slow to start; whether it was asked to stop is its exit code.
SLOW_RANK = """#!{python}
import sys, time
time.sleep(0.5)
from vitgraft.trainer.rank import hear_stops
sys.exit(75 if hear_stops().wait(1) else 3)
"""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_a_stop_before_a_rank_listens_is_not_lost(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any, before: bool
) -> None:
    """Whether its agent ignores such signals, as over ssh, or hands them on, as with one command per node."""
    (tmp_path / "rank").write_text(SLOW_RANK.format(python=sys.executable))
    (tmp_path / "rank").chmod(0o755)
    monkeypatch.setattr("vitgraft.launch.gang.sys", SimpleNamespace(executable=str(tmp_path / "rank")))
    gang = HostGang(Orders.model_validate(orders(run, ranks=[0])), lambda _: None, None)
    old = signal.signal(signal.SIGTERM, handler)
    try:
        gang.stopping = before
        gang.start()
        gang.ranks[0].process.send_signal(signal.SIGUSR1)  # of the scheduler
        if not before:
            gang.stop()
        assert gang.ranks[0].process.wait(20) == 75
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGTERM, old)
        gang.end()


def test_roles_find_what_is_forwarded_and_not_what_is_the_ranks_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluator far away reads from the same store, and a checkpointer there copies to it."""
    found: list[dict[str, str]] = []

    def keeper(*facts: Any) -> Any:
        found.append(facts[-1])
        return SimpleNamespace(
            start=lambda pipe: None, end=lambda: None, make_buffers=lambda ranks: None, for_rank=lambda local: {}
        )

    monkeypatch.setattr("vitgraft.launch.gang.CheckpointerKeeper", keeper)
    monkeypatch.setattr("vitgraft.launch.gang.EvaluatorKeeper", keeper)
    own = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "9", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    forwarded = {"AWS_PROFILE": "cluster", "VITGRAFT_CACHE": "/local"}
    changes = {"silence": 1.0, "evaluator": {"device": "cpu", "threads": 1}, "ranks": [0], "tickets": "none"}
    gang = HostGang(Orders.model_validate(orders(run, environment=own | forwarded, **changes)), lambda _: None, None)
    gang.start()
    gang.end()
    assert found == [forwarded, forwarded]


def test_a_checkpointer_that_cannot_be_started_again_is_told_of_once(run: Path) -> None:
    said: list[dict[str, Any]] = []
    gang = HostGang(Orders.model_validate(orders(run)), said.append, None)
    gang.start()

    def tend() -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    ended: list[bool] = []
    gang._keeper = SimpleNamespace(tend=tend, end=lambda: ended.append(True))  # type: ignore[assignment]
    gang.tend()
    gang.fail("what follows", OSError("is no news"))
    gang.drain(drop_copy=True, evaluate=False)
    gang.tend()
    gang.end()
    assert [message["say"] for message in said] == ["relay", "drained"]
    error = said[0]["message"]
    assert (error["kind"], error["code"], error["cause"], error["step"]) == ("error", 5, "no_space", None)
    assert error["text"].endswith("the checkpointer cannot be started again: [Errno 28] No space left on device")
    assert ended


@pytest.mark.parametrize(("rank", "says"), [("0", "Not a directory"), ("7", "7 is not in list")])
def test_a_rank_that_cannot_be_started_does_not_end_the_agent(run: Path, rank: str, says: str) -> None:
    link, name = started(run), f"vitgraft-test-{os.getpid()}-{rank}"
    link.ask("begin", "begun", 30, orders=orders(run, ranks=[0], tickets=name))
    (run / "logs").rmdir()
    (run / "logs").touch()
    with socket.socket(socket.AF_UNIX) as ticket:
        ticket.connect(f"\0{name}")
        ticket.sendall(json.dumps({"environment": {"RANK": rank, "LOCAL_RANK": "0"}}).encode() + b"\n")
        told = link.ask("ping", "relay", 20)
    assert told["message"]["code"] == 5
    assert "the agent cannot start a rank: " in told["message"]["text"]
    assert says in told["message"]["text"]
    assert link.ask("facts", "facts", 20, folder="/")["say"] == "facts"
    link.close()


# A program in the place of ssh, which tells what it ignores and what it was given.
PLAYED_SSH = """#!{python}
import json, signal, sys
ignored = [number.name for number in signal.Signals if signal.getsignal(number) == signal.SIG_IGN]
print(json.dumps({{"ignored": ignored, "arguments": sys.argv[1:]}}), flush=True)
sys.stdin.read()
"""


def test_the_ssh_of_an_agent_is_its_own_and_ignores_what_is_sent_to_a_whole_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text(PLAYED_SSH.format(python=sys.executable))
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    link = start_over_ssh("node-1", ["-oControlPath=/mine"])
    deadline, told = time.monotonic() + 20, []
    while not told and time.monotonic() < deadline:
        told = link.wire.receive()
        time.sleep(0.05)
    link.close(patience=5)
    assert {"SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"} <= set(told[0]["ignored"])
    paths = [word for word in told[0]["arguments"] if word.startswith("-oControlPath")]
    assert paths == ["-oControlPath=/mine", "-oControlPath=none"], "the first one wins"


def test_without_ssh_no_other_host_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="ssh: not installed here"):
        start_over_ssh("node-1", [])


def test_a_connection_is_closed_once() -> None:
    """The numbers of its descriptors are others' by the second time."""
    link = start_agent("here", [sys.executable, "-c", ""], os.environ, None)
    link.close(patience=10)
    others = os.pipe()
    assert set(others) & {link.wire.read, link.wire.write}
    link.close()
    assert link.silent() == "its connection closed"
    for descriptor in others:
        os.close(descriptor)


def test_last_words_are_read_after_a_write_has_failed() -> None:
    to_us, from_us = os.pipe(), os.pipe()
    wire = Wire(to_us[0], from_us[1])
    os.write(to_us[1], b'{"do": "leave"}\n')
    os.close(from_us[0])
    wire.send({"say": "alive"})
    assert not wire.closed
    assert wire.receive() == [{"do": "leave"}]
    os.close(to_us[1])
    assert wire.receive() == []
    assert wire.closed
    wire.close()


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
