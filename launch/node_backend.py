"""One command on each node: node 0 leads and listens, the others connect to it and are agents.

A secret in the run directory, which only the run's owner can read, lets both sides know each other
(:mod:`vitgraft.launch.handshake`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from vitgraft.configs.errors import ConfigError, InterruptedRun, PreemptedRun, TrainingError, VitgraftError
from vitgraft.configs.files import open_regular
from vitgraft.launch import deepspeed_launch, ending
from vitgraft.launch.admission import Admission
from vitgraft.launch.agent import Agent
from vitgraft.launch.deepspeed_launch import Meeting
from vitgraft.launch.handshake import HandshakeError, introduce
from vitgraft.launch.hosts import Host
from vitgraft.launch.links import AgentLink, start_here
from vitgraft.launch.nodes import NodePlace
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.run_state import RunEnd, run_end
from vitgraft.launch.ui import Screen
from vitgraft.launch.wire import Wire
from vitgraft.trainer.monitor_files import read_rows

SECRET = "leader.secret"
_MAX_SECRET = 1024
WAIT_S = 600.0
"""Seconds in all that nodes wait for each other at the start of a run: a scheduler may start them minutes apart."""
REJOIN_S = 30.0
"""Seconds to wait for lost nodes before the run goes on without them."""
_BACKLOG = 1024
"""Backlog of connections of the leader's socket; clients above it try again a second later."""


@dataclass
class NodeBackend:
    """The leader's side. ``processes``: ranks of each node. ``note``: shows a line, from any thread."""

    place: NodePlace
    processes: int
    run: Path
    lock: int
    note: Callable[[str], None]
    hosts: Sequence[Host] = field(init=False)
    alone: bool = field(init=False, default=False)
    _admission: Admission = field(init=False)
    _came: dict[str, AgentLink] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False

    def __post_init__(self) -> None:
        self.hosts = [Host(name_of(node), self.processes) for node in range(self.place.nodes)]
        secret = secrets.token_bytes(32)
        try:
            _write_secret(self.run / SECRET, secret)
        except OSError as error:
            path = self.run / SECRET
            raise ConfigError(
                f"{path}: cannot be written: {error.strerror}; make room or choose another --run-dir"
            ) from None
        try:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            listener = socket.create_server(
                ("", self.place.port),
                family=family,
                backlog=_BACKLOG,
                dualstack_ipv6=family == socket.AF_INET6,
            )
        except OSError as error:
            (self.run / SECRET).unlink()
            where = f"--leader {self.place.host}:{self.place.port}"
            raise ConfigError(f"{where}: cannot listen there: {error.strerror}; choose another port") from None
        self._admission = Admission(listener, secret, self.place.nodes, self._welcome, self.note)

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> AgentLink:
        """Start this node's own agent, or wait for another's."""
        if host.name == name_of(self.place.rank):
            return start_here(host.name, self.lock, self.run / "logs")
        deadline = since + (REJOIN_S if again else WAIT_S)
        with self._changed:
            # One that waited and went away, as its supervisor has heard, is not there.
            while (link := self._came.get(host.name)) is None or link.wire.closed:
                if (left := deadline - time.monotonic()) <= 0:
                    raise NoAnswer("it has not connected; see whether its command runs and reaches the leader")
                self._changed.wait(min(1.0, left))
                meanwhile()
            return self._came.pop(host.name)

    def waiting(self) -> Sequence[AgentLink]:
        """Return nodes that have connected, perhaps again, before they are needed."""
        with self._changed:
            return list(self._came.values())

    def meeting(self, first: AgentLink, port: int) -> Meeting:
        """Return the rendezvous, at the leader's address where it takes part."""
        leads = first.host == name_of(self.place.rank)
        return Meeting(self.place.host if leads else str(first.facts["address"]), port)

    def used(self, host: str, count: int) -> Sequence[int]:
        """Return the first GPUs."""
        return range(count)

    def environment(self, host: str, count: int, device: str, threads: int) -> dict[str, str]:
        """Return no variables: each node uses its own environment."""
        return deepspeed_launch.rank_environment({}, device=device, threads=threads)

    def launcher(self) -> None:
        """Return ``None``: the command was started on every node, so no launcher is needed."""

    def close(self) -> None:
        """Listen no more, and let go who has come since."""
        with self._changed:
            self._closed = True
            for link in self._came.values():
                link.close()
        self._admission.close()
        with contextlib.suppress(OSError):
            (self.run / SECRET).unlink()

    def _welcome(self, node: int, descriptor: int) -> None:
        link = AgentLink(name_of(node), Wire(descriptor, descriptor))
        with self._changed:
            if self._closed:
                link.close()  # too late: its events tell it how the run ended
                return
            earlier = self._came.pop(link.host, None)
            if earlier is not None:
                earlier.close()
            self._came[link.host] = link
            self._changed.notify_all()


def follow(place: NodePlace, run: Path, screen: Screen) -> None:
    """Run the agent of a node other than the first, until the leader or the run's events report the run's end.

    Raises:
        VitgraftError: with the run's exit code, if it is not 0; the leader says why.
        PreemptedRun: there is no leader, or none any more when this node was asked to stop; the same command may find
            one later.
        TrainingError: there is none in a job whose nodes start together.
        InterruptedRun: the same after Ctrl-C.
    """
    screen.note(f"node {place.rank} of {place.nodes}: connecting to the leader at {place.host}:{place.port}")
    earlier, asked = _end_of(run), list[int]()
    while True:
        _hear(_give_up)
        if asked:
            _give_up(asked[-1], None)
        found = _connect(place, run, earlier)
        if isinstance(found, RunEnd):
            code = found.code
            break
        agent = Agent(Wire(found, found), name_of(place.rank), None)
        _pass_on(agent, asked)
        screen.note("connected; the leader shows how the run is")
        code = agent.serve()
        if not agent.left_alone:
            break
        # It may be started again, or have given this node up for the moment.
        screen.note("the leader is gone; waiting for it")
    if code != 0:
        error = VitgraftError(f"node {place.rank}: the run ended with code {code}; the leader says why")
        error.exit_code = code
        raise error


def _pass_on(agent: Agent, asked: list[int]) -> None:
    def hear(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        agent.ask_to_stop(number)

    _hear(hear)


def _hear(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in ending.SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has had the end of the terminal
            signal.signal(number, handler)


def _give_up(number: int, frame: FrameType | None) -> None:
    ending.decide()
    if number == signal.SIGINT:
        raise InterruptedRun("interrupted while there was no leader; the same command goes on")
    raise PreemptedRun("stopped while there was no leader; the same command goes on")


def _end_of(run: Path) -> RunEnd | None:
    return run_end(read_rows(run / "events.jsonl"))


def name_of(node: int) -> str:
    """Return the name of a node in events and logs."""
    return f"node-{node}"


def _connect(place: NodePlace, run: Path, earlier: RunEnd | None) -> int | RunEnd:
    """Connect to the leader; return the descriptor, or the run's end where it ended without this node. ``earlier``: the
    end recorded before this command began, which does not count."""
    deadline, reason = time.monotonic() + WAIT_S, "nobody listens there"
    while True:
        try:
            return introduce((place.host, place.port), _read_secret(run / SECRET), place.rank)
        except FileNotFoundError:
            reason = f"{run / SECRET} is not there; --run-dir must lie on storage that all nodes share"
        except (OSError, HandshakeError) as error:
            reason = str(error) or type(error).__name__
        end = _end_of(run)
        if end is not None and end.over and end != earlier:
            return end
        if time.monotonic() > deadline:
            text = f"--leader {place.host}:{place.port}: no leader within {WAIT_S:g} s ({reason})"
            if place.together:
                # Queued again, a job whose leader cannot start would hold its nodes for so long again and again.
                raise TrainingError(f"{text}, though SLURM started all nodes together; see what the first node says")
            raise PreemptedRun(f"{text}; start it, and this again")
        time.sleep(1.0)


def _read_secret(path: Path) -> bytes:
    """Read the secret of the run without following a link.

    Raises:
        OSError: missing, or no regular file.
    """
    descriptor = open_regular(path, follow=False)
    try:
        return os.read(descriptor, _MAX_SECRET)
    finally:
        os.close(descriptor)


def _write_secret(path: Path, secret: bytes) -> None:
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secret)
        stream.flush()
        os.fsync(descriptor)
    os.replace(draft, path)
