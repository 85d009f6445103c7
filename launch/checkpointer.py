"""Start a host's checkpointer, watch it, and start a successor when it dies or falls silent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import TrainingError
from vitgraft.launch.role_process import RoleProcess
from vitgraft.trainer.checkpoint.handover import BUFFER_VARIABLE
from vitgraft.trainer.checkpointer import ROLE, SIGNALS
from vitgraft.trainer.signals import DRAIN, DROP_COPY

MAX_RESTARTS = 3
"""Successors that are started before one of them commits anything; then the run ends."""
SLOW_WRITE_S = 60.0
"""After how long a checkpoint that is still being written is told of; then after twice as long, and so on."""


@dataclass
class CheckpointerKeeper:
    """Keeps one checkpointer alive.

    ``silence``: seconds without a sign of life after which it is killed. ``lock``: open descriptor of RUN/lock, which
    it holds too; ``None`` where the run is owned from another host. ``event``: writes to RUN/events.jsonl.
    ``leads``: whether rank 0 is on this host. ``environment``: what it finds besides that of this process.
    """

    run: Path
    attempt: int
    silence: float
    lock: int | None
    event: Callable[..., None]
    leads: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    buffers: list[int] = field(default_factory=list)
    restarts: int = 0
    _role: RoleProcess = field(init=False)
    _pipe: int = -1
    _draining: bool = False
    _ended: bool = True
    _drop_copy: bool = False
    _step: int | None = None
    _since: float = 0.0
    _tell_after: float = SLOW_WRITE_S

    def __post_init__(self) -> None:
        self._role = RoleProcess(ROLE, self.run, self.attempt, self.lock, SIGNALS, self.environment)

    @property
    def pid(self) -> int | None:
        """Of the one that works; ``None``: there is none."""
        return self._role.pid

    def make_buffers(self, ranks: int) -> None:
        """An empty memfd for each rank: it lives as long as any of the processes that know it."""
        self.buffers = [os.memfd_create(f"vitgraft-rank-{rank}", os.MFD_CLOEXEC) for rank in range(ranks)]

    def for_rank(self, rank: int) -> dict[str, str]:
        """What a rank must find in its environment."""
        return {BUFFER_VARIABLE: self._path(self.buffers[rank])}

    def start(self, pipe: int) -> None:
        """Start it; it reports to ``pipe``, which must stay open for its successors."""
        self._pipe, self._ended = pipe, False
        self._start()

    def heard(self, message: dict[str, Any]) -> str | None:
        """A sign of life. Commits show that it gets on; returns what the user should know when it does not."""
        if not self._role.heard(message["pid"]):
            return None  # a predecessor's, late
        now = time.monotonic()
        if message["done"] > 0:
            self.restarts = 0
        if message["outstanding"] != self._step:
            self._step, self._since, self._tell_after = message["outstanding"], now, SLOW_WRITE_S
        taken = now - self._since
        if self._step is None or taken < self._tell_after:
            return None
        self._tell_after = 2 * taken
        return f"WARNING checkpoint of step {self._step} is being written for {taken:.0f} s; its disk may hang"

    def tend(self) -> bool:
        """Call a few times a second: replaces a dead or silent one. Returns whether one is alive.

        Raises:
            TrainingError: one after the other died without committing anything.
        """
        if self._ended:
            return False
        reason = self._role.trouble(self.silence)
        if reason is None:
            return True
        finished = self._draining and self._role.code() == 0
        self._role.kill()
        if finished:
            self._ended = True
            return False
        if self.restarts == MAX_RESTARTS:
            raise TrainingError(
                f"the checkpointer was {reason}, after {self.restarts} restarts without a commit; its log: "
                f"{self.log_path()}"
            )
        self.restarts += 1
        self.event("checkpointer_restart", reason=reason, restarts=self.restarts)
        self._start()
        return True

    def drain(self, *, drop_copy: bool = False) -> None:
        """Ask it to finish what all ranks have handed over and to end; then :meth:`tend` until it has.

        Args:
            drop_copy: do not wait for the copy to a store. May be asked for later, too.
        """
        if self._draining and (self._drop_copy or not drop_copy):
            return
        self._draining, self._drop_copy = True, drop_copy
        self._role.ask(DROP_COPY if drop_copy else DRAIN)

    def end(self) -> None:
        """Kill it, and let the buffers go."""
        self._role.kill()
        self._ended = True
        for descriptor in self.buffers:
            os.close(descriptor)
        self.buffers = []

    def log_path(self) -> Path:
        """RUN/logs/ROLE.HOST.ATTEMPT.log."""
        return self._role.log_path()

    def _start(self) -> None:
        options = {"--follow": not self.leads, "--drain": self._draining, "--drop-copy": self._drop_copy}
        arguments = [option for option, wanted in options.items() if wanted]
        self._role.start(self._pipe, [*arguments, "--buffers", *map(self._path, self.buffers)])

    def _path(self, descriptor: int) -> str:
        return f"/proc/{os.getpid()}/fd/{descriptor}"
