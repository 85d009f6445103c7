"""Start a host's checkpointer, watch it, and start a successor when it dies or falls silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import TrainingError
from vitgraft.trainer.checkpoint.handover import BUFFER_VARIABLE
from vitgraft.trainer.checkpointer import SIGNALS
from vitgraft.trainer.rank import PARENT_VARIABLE
from vitgraft.trainer.report import PIPE_VARIABLE
from vitgraft.trainer.signals import DRAIN, DROP_COPY

MAX_RESTARTS = 3
"""Successors that are started before one of them commits anything; then the run ends."""
START_S = 120.0
"""How long its start-up may be silent at least: a cold file system and many checkpoints take a while."""
SLOW_WRITE_S = 60.0
"""After how long a checkpoint that is still being written is told of; then after twice as long, and so on."""


@dataclass
class CheckpointerKeeper:
    """Keeps one checkpointer alive.

    ``silence``: seconds without a sign of life after which it is killed. ``lock``: open descriptor of RUN/lock, which
    it holds too; ``None`` where the run is owned from another host. ``event``: writes to RUN/events.jsonl.
    """

    run: Path
    attempt: int
    silence: float
    lock: int | None
    event: Callable[..., None]
    buffers: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    _pipe: int = -1
    _heard: float = 0.0
    _started: bool = False
    _draining: bool = False
    _drop_copy: bool = False
    _step: int | None = None
    _since: float = 0.0
    _tell_after: float = SLOW_WRITE_S

    def make_buffers(self, ranks: int) -> None:
        """An empty memfd for each rank: it lives as long as any of the processes that know it."""
        self.buffers = [os.memfd_create(f"vitgraft-rank-{rank}", os.MFD_CLOEXEC) for rank in range(ranks)]

    def environment(self, rank: int) -> dict[str, str]:
        """What a rank must know."""
        return {BUFFER_VARIABLE: self._path(self.buffers[rank])}

    def start(self, pipe: int) -> None:
        """Start it; it reports to ``pipe``, which must stay open for its successors."""
        self._pipe = pipe
        self._start()

    def heard(self, message: dict[str, Any]) -> str | None:
        """A sign of life. Commits show that it gets on; returns what the user should know when it does not."""
        if self.process is None or message["pid"] != self.process.pid:
            return None  # a predecessor's, late
        self._heard, self._started = time.monotonic(), True
        if message["done"] > 0:
            self.restarts = 0
        if message["outstanding"] != self._step:
            self._step, self._since, self._tell_after = message["outstanding"], self._heard, SLOW_WRITE_S
        taken = self._heard - self._since
        if self._step is None or taken < self._tell_after:
            return None
        self._tell_after = 2 * taken
        return f"WARNING checkpoint of step {self._step} is being written for {taken:.0f} s; its disk may hang"

    def tend(self) -> bool:
        """Call a few times a second: replaces a dead or silent one. Returns whether one is alive.

        Raises:
            TrainingError: one after the other died without committing anything.
        """
        if self.process is None:
            return False
        code = self.process.poll()
        patience = self.silence if self._started else max(self.silence, START_S)
        if code is None and time.monotonic() - self._heard <= patience:
            return True
        if code == 0 and self._draining:
            self.process = None
            return False
        reason = f"silent for {patience:g} s"
        if code is not None:
            reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._kill()
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
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(DROP_COPY if drop_copy else DRAIN)

    def end(self) -> None:
        """Kill it, and let the buffers go."""
        self._kill()
        for descriptor in self.buffers:
            os.close(descriptor)
        self.buffers = []

    def log_path(self) -> Path:
        """RUN/logs/ROLE.HOST.ATTEMPT.log."""
        return self.run / "logs" / f"checkpointer.{os.uname().nodename}.{self.attempt}.log"

    def _start(self) -> None:
        command = [sys.executable, "-m", "vitgraft.trainer.checkpointer", "--run-dir", str(self.run.resolve())]
        command += ["--attempt", str(self.attempt), *(["--drain"] if self._draining else [])]
        command += ["--drop-copy"] if self._drop_copy else []
        command += ["--buffers", *map(self._path, self.buffers)]
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            PIPE_VARIABLE: str(self._pipe),
            PARENT_VARIABLE: str(os.getpid()),
        }
        self._heard, self._started = time.monotonic(), False
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with self.log_path().open("ab") as log:
                self.process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(self._pipe, *(() if self.lock is None else (self.lock,))),
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _path(self, descriptor: int) -> str:
        return f"/proc/{os.getpid()}/fd/{descriptor}"
