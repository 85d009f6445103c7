"""Processes of one attempt on this host: its ranks, and the roles that serve them. All are ended with the attempt."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vitgraft.configs.errors import TrainingError, VitgraftError, cause_of
from vitgraft.launch.checkpointer import CheckpointerKeeper
from vitgraft.launch.evaluator import EvaluatorKeeper
from vitgraft.launch.messages import of_roles
from vitgraft.launch.role_process import end_family, end_of, log_path, open_log
from vitgraft.launch.wire import Wire
from vitgraft.trainer.rank import PARENT_VARIABLE
from vitgraft.trainer.report import PIPE_VARIABLE, error_message
from vitgraft.trainer.signals import OF_THE_JOB

_OF_RANKS = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")

Say = Callable[[dict[str, Any]], None]


class EvaluatorOrder(BaseModel):
    """Device and threads of the evaluator."""

    model_config = ConfigDict(extra="forbid")

    device: str
    threads: int


class Orders(BaseModel):
    """Orders to a host in an attempt.

    ``ranks``: numbers of its ranks, by local rank. ``tickets``: DeepSpeed's launcher says when each starts, and with
    what environment. ``arguments``: of the rank module. ``silence``: of the checkpointer, ``None``: there is none.
    """

    model_config = ConfigDict(extra="forbid")

    run: str
    attempt: int
    world: int
    ranks: list[int]
    tickets: str | None
    arguments: list[str]
    environment: dict[str, str]
    silence: float | None
    evaluator: EvaluatorOrder | None


@dataclass
class RankProcess:
    """A rank and its last state. ``heard``: when, by this host's monotonic clock. ``code``: exit code."""

    process: subprocess.Popen[bytes]
    wire: Wire
    heard: float
    state: dict[str, Any]
    code: int | None = None


@dataclass
class HostGang:
    """Starts, monitors and ends the processes. ``say``: sends to the supervisor. ``lock``: of the run, where this host
    holds it."""

    orders: Orders
    say: Say
    lock: int | None
    ranks: dict[int, RankProcess] = field(default_factory=dict)
    stopping: bool = False
    killed: bool = False
    _keeper: CheckpointerKeeper | None = None
    _evaluator: EvaluatorKeeper | None = None
    _roles: Wire | None = None
    _roles_pipe: int = -1
    _draining: bool = False
    _failed: bool = False

    def start(self) -> None:
        """Start the roles, and the ranks too where no launcher does.

        Raises:
            OSError: a process or a log cannot be started.
        """
        orders, run = self.orders, Path(self.orders.run)
        read, self._roles_pipe = os.pipe()
        self._roles = Wire(read, read)
        # What is forwarded, e.g. for a store or a cache; not which GPUs, threads and meeting point the ranks use.
        roles_find = {name: value for name, value in orders.environment.items() if name not in _OF_RANKS}
        if orders.silence is not None and orders.ranks:
            self._keeper = CheckpointerKeeper(
                run, orders.attempt, orders.silence, self.lock, self._event, 0 in orders.ranks, roles_find
            )
            self._keeper.make_buffers(len(orders.ranks))
            self._keeper.start(self._roles_pipe)
        if orders.evaluator is not None:
            threads, device = orders.evaluator.threads, orders.evaluator.device
            self._evaluator = EvaluatorKeeper(run, orders.attempt, device, threads, self.lock, self._event, roles_find)
            self._evaluator.start(self._roles_pipe)
        if orders.tickets is None:
            for local, rank in enumerate(orders.ranks):
                self.start_rank(rank, {"LOCAL_RANK": str(local)})

    def start_rank(self, rank: int, environment: Mapping[str, str]) -> None:
        """Start one rank; ``environment`` is what differs from that of the host's others.

        Raises:
            OSError: no process or log can be made.
            ValueError: it is no rank of this host.
        """
        if self.killed:
            return  # its launcher is late
        orders, local = self.orders, self.orders.ranks.index(rank)
        ours, its = socket.socketpair()
        variables = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(orders.world),
            "LOCAL_SIZE": str(len(orders.ranks)),
            "LOCAL_WORLD_SIZE": str(len(orders.ranks)),
            **orders.environment,
            **environment,
            PIPE_VARIABLE: str(its.fileno()),
            PARENT_VARIABLE: str(os.getpid()),
            **(self._keeper.for_rank(local) if self._keeper is not None else {}),
        }
        with ours, its, open_log(log_path(Path(orders.run), f"trainer-{rank}", orders.attempt)) as log:
            # Blocked until the rank hears them: what it is asked before that must neither be lost nor end it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_JOB)
            try:
                # A session of its own: Ctrl-C on the terminal reaches the supervisor alone, which stops the ranks in
                # order.
                process = subprocess.Popen(
                    [sys.executable, "-m", "vitgraft.trainer.rank", *orders.arguments],
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(its.fileno(), *(() if self.lock is None else (self.lock,))),
                    start_new_session=True,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            descriptor = ours.detach()
        state: dict[str, Any] = {"phase": "start", "step": 0, "age": 0.0}
        self.ranks[rank] = RankProcess(process, Wire(descriptor, descriptor), time.monotonic(), state)
        if self.stopping:
            process.send_signal(signal.SIGTERM)

    def descriptors(self) -> list[int]:
        """Return the file descriptors to wait for."""
        roles = [self._roles.read] if self._roles is not None else []
        return [*roles, *(rank.wire.read for rank in self.ranks.values() if not rank.wire.closed)]

    def tend(self) -> None:
        """Read messages of ranks and roles, note their ends, restart dead roles; called a few times a second."""
        for number, rank in self.ranks.items():
            # Polled before its last words are read, said after them.
            code = end_of(rank.process) if rank.code is None else None
            for message in of_roles(rank.wire.receive()):
                self._hear(number, rank, message)
            if code is not None:
                rank.code = code
                self.say({"say": "end", "rank": number, "code": code, "by_us": self.killed})
        self._hear_roles()
        try:
            checkpointer = self._keeper is not None and self._keeper.tend()
        except (OSError, TrainingError) as error:
            assert self._keeper is not None
            self._keeper.end()
            self._keeper, checkpointer = None, False
            self.fail("the checkpointer cannot be started again", error)
        evaluator = self._evaluator is not None and self._evaluator.tend()
        if self._draining and not checkpointer and not evaluator:
            self._hear_roles()
            self._draining = False
            self.say({"say": "drained"})

    def fail(self, what: str, error: Exception) -> None:
        """Tell the supervisor, which ends the attempt, of the first thing that goes wrong; what follows is no news."""
        if self._failed:
            return
        self._failed = True
        if not isinstance(error, VitgraftError):
            error = TrainingError(f"{os.uname().nodename}: {what}: {error}", cause=cause_of(error))
        self.say({"say": "relay", "rank": -1, "message": error_message(error)})

    def stop(self) -> None:
        """Ask the ranks to stop after a checkpoint."""
        self.stopping = True
        for rank in self.ranks.values():
            if end_of(rank.process) is None:
                rank.process.send_signal(signal.SIGTERM)

    def end_ranks(self) -> None:
        """Kill the ranks that live, and their loader processes."""
        self.killed = True
        for rank in self.ranks.values():
            if end_of(rank.process) is None:
                # At once: each that ends would be missed by the others.
                rank.process.kill()
        for rank in self.ranks.values():
            end_family(rank.process)

    def drain(self, *, drop_copy: bool, evaluate: bool) -> None:
        """Let the checkpointer finish the saves handed over, and the evaluator the committed checkpoints, after the
        ranks of all hosts have ended."""
        self._draining = True
        if self._keeper is not None:
            self._keeper.drain(drop_copy=drop_copy)
        if self._evaluator is not None:
            if evaluate:
                self._evaluator.drain()
            else:
                self._evaluator.end()
                self._evaluator = None

    def end(self) -> None:
        """Kill everything that still lives."""
        self.end_ranks()
        for keeper in (self._keeper, self._evaluator):
            if keeper is not None:
                keeper.end()
        for rank in self.ranks.values():
            rank.wire.close()
        if self._roles is not None:
            self._roles.close()
            os.close(self._roles_pipe)
            self._roles = None

    def states(self) -> dict[str, dict[str, Any]]:
        """Return the last state of each live rank and its age (``quiet``, seconds); reset what is accumulated."""
        now = time.monotonic()
        states = {}
        for number, rank in self.ranks.items():
            if rank.code is None:
                quiet = now - rank.heard
                states[str(number)] = {**rank.state, "age": rank.state["age"] + quiet, "quiet": quiet}
                rank.state = {**rank.state, "longest": {}, "own": []}
        return states

    def _hear(self, number: int, rank: RankProcess, message: dict[str, Any]) -> None:
        if message.get("kind") != "state":
            self.say({"say": "relay", "rank": number, "message": message})
            return
        earlier = rank.state
        rank.heard = time.monotonic()
        rank.state = {key: message[key] for key in ("phase", "step", "age")}
        # What was not passed on yet is not forgotten.
        longest = earlier.get("longest", {})
        new = {phase: max(taken, longest.get(phase, 0.0)) for phase, taken in message["longest"].items()}
        rank.state |= {"longest": longest | new, "own": [*earlier.get("own", []), *message["own"]]}

    def _hear_roles(self) -> None:
        for message in of_roles(self._roles.receive()) if self._roles is not None else ():
            if message.get("kind") != "beat":
                self.say({"say": "relay", "rank": -1, "message": message})
            elif message["role"] == "checkpointer" and self._keeper is not None:
                slow = self._keeper.heard(message)
                if slow is not None:
                    self.say({"say": "relay", "rank": -1, "message": {"kind": "note", "text": slow}})
            elif message["role"] == "evaluator" and self._evaluator is not None:
                self._evaluator.heard(message)

    def _event(self, name: str, **facts: Any) -> None:
        self.say({"say": "event", "name": name, "facts": facts})
