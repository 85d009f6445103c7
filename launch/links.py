"""The supervisor's connections to the agents of its hosts."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.agent import LOCK_VARIABLE
from vitgraft.launch.messages import of_agents
from vitgraft.launch.remote_shell import NoAnswer, explain, ssh_command
from vitgraft.launch.role_process import open_log
from vitgraft.launch.wire import Wire
from vitgraft.trainer.rank import PARENT_VARIABLE
from vitgraft.trainer.signals import OF_THE_JOB

T = TypeVar("T")
CONNECT_S = 10.0
FIRST_ANSWER_S = 60.0
"""An agent starts Python from a file system that may be slow."""
SILENT_S = 15.0
"""Seconds of silence after which a host counts as lost; its agent sends a message every second."""
DEAF = ("sh", "-c", 'trap "" TERM INT USR1 HUP; exec "$@"', "sh")
"""Starts a program that ignores the signals of a scheduler to all processes of a job; ignored signals are inherited."""
AGENT = (sys.executable, "-P", "-m", "vitgraft.launch.agent")


class AgentLink:
    """Connection to an agent. ``facts``: those of its host. ``lost``: why it is given up, or ``None``. ``impatient``:
    its answers are no longer waited for."""

    def __init__(
        self,
        host: str,
        wire: Wire,
        process: subprocess.Popen[bytes] | None = None,
        complaints: IO[bytes] | None = None,
        begin: int = 0,
    ) -> None:
        self.host, self.wire = host, wire
        self.facts: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.lost: str | None = None
        self.impatient = False
        self._process, self._complaints, self._begin = process, complaints, begin
        self._kept: list[dict[str, Any]] = []
        self._sending = threading.Lock()

    def send(self, do: str, **facts: Any) -> None:
        """Send an order; thread-safe, so that heartbeats do not wait for the supervisor's other work."""
        with self._sending:
            if self.lost is None:
                self.wire.send({"do": do, **facts})

    def receive(self) -> list[dict[str, Any]]:
        """Return the agent's messages since the last call."""
        messages, self._kept = [*self._kept, *of_agents(self.wire.receive())], []
        if messages:
            self.heard = time.monotonic()
        return messages

    def ask(self, do: str, answer: str, timeout: float, **facts: Any) -> dict[str, Any]:
        """Send an order and wait for its answer; other messages are kept.

        Raises:
            NoAnswer: none came in time, or the agent is gone.
        """
        self.send(do, **facts)
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.wire.read, selectors.EVENT_READ)
            while not self.wire.closed:
                for message in (messages := of_agents(self.wire.receive())):
                    self.heard = time.monotonic()
                    if message.get("say") in (answer, "refused"):
                        self._kept += [other for other in messages if other is not message]
                        if message["say"] == "refused":
                            raise NoAnswer(str(message["text"]))
                        return message
                self._kept += messages
                if self.impatient:
                    raise NoAnswer("its answer is not waited for any more")
                if (left := deadline - time.monotonic()) <= 0:
                    raise NoAnswer(
                        f"no answer within {timeout:g} s; see whether the host is up and its file system answers"
                    )
                selector.select(min(left, 0.5))
        raise NoAnswer(self.ended())

    def silent(self) -> str | None:
        """Return why this host counts as lost; ``None``: it does not."""
        if self.wire.closed:
            return self.ended()
        quiet = time.monotonic() - self.heard
        return f"nothing was heard of it for {quiet:.0f} s" if quiet > SILENT_S else None

    def ended(self) -> str:
        """Return why the connection has closed, in one line."""
        if self._process is None or self._complaints is None:
            return "its connection closed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            self._complaints.seek(self._begin)
            said = self._complaints.read().decode(errors="replace")
            if not self.facts:
                return explain(code, said, self.host)
            # It has answered before, so how to reach it is not the question.
            return f"its agent is gone: {(said.strip().splitlines() or [f'ended with code {code}'])[-1].strip()}"
        return "its connection closed"

    def close(self, patience: float = 0.0) -> None:
        """Close the connection, which ends the agent. A local process gets ``patience`` seconds to end by itself."""
        with self._sending:
            self.lost = self.lost or "let go"
            self.wire.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
            self._process.kill()
            self._process.wait()
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None


def ask_all(links: Sequence[AgentLink], question: Callable[[AgentLink], T]) -> list[T]:
    """Ask all agents at once. After an interrupt by a signal no further answer is awaited."""
    if not links:
        return []
    with ThreadPoolExecutor(max_workers=len(links)) as pool:
        try:
            return list(pool.map(question, links))
        except BaseException:
            for link in links:
                link.impatient = True
            raise


def start_agent(
    host: str, command: Sequence[str], environment: Mapping[str, str], lock: int | None, logs: Path | None = None
) -> AgentLink:
    """Start the program that leads to an agent: the agent itself, or ssh. What either says on its standard error is
    appended to LOGS/agent.HOST.log; ``None``: it is not kept.

    Raises:
        OSError: that file cannot be written, or no process made.
    """
    # Closed by the link.
    complaints = tempfile.TemporaryFile() if logs is None else open_log(logs / f"agent.{host}.log")  # noqa: SIM115
    begin = complaints.tell()  # behind what earlier agents of the host have said
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        pass_fds=() if lock is None else (lock,),
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    wire = Wire(os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno()))
    process.stdin.close()
    process.stdout.close()
    return AgentLink(host, wire, process, complaints, begin)


def start_here(host: str, lock: int, logs: Path | None = None) -> AgentLink:
    """Start an agent on this host, which ends with this process."""
    environment = {**os.environ, LOCK_VARIABLE: str(lock), PARENT_VARIABLE: str(os.getpid())}
    # Blocked until it ignores them: what a scheduler sends to every process of a job must not end it meanwhile.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_JOB)
    try:
        return start_agent(host, [*AGENT, "--host", host], environment, lock, logs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_over_ssh(host: str, ssh_args: Sequence[str], logs: Path | None = None) -> AgentLink:
    """Start an agent on another host.

    Raises:
        ConfigError: there is no ssh here.
    """
    if shutil.which("ssh") is None:
        raise ConfigError("ssh: not installed here, and other hosts are reached by it; install it")
    # A connection that the user's ControlMaster shares would end for all its runs at once.
    alone = [*ssh_args, "-oControlPath=none"]
    command = ssh_command(host, [*AGENT, "--host", host], alone, CONNECT_S)
    return start_agent(host, [*DEAF, *command], os.environ, None, logs)
