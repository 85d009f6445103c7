"""Start a host's checkpointer, watch it, and start a successor when it dies or falls silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import TrainingError
from vitgraft.launch.run_dir import RunHandle
from vitgraft.trainer.checkpoint.handover import BUFFER_VARIABLE
from vitgraft.trainer.rank import PARENT_VARIABLE
from vitgraft.trainer.report import PIPE_VARIABLE

MAX_RESTARTS = 3
"""Successors that are started before one of them commits anything; then the run ends."""


@dataclass
class CheckpointerKeeper:
    """Keeps one checkpointer alive. ``silence``: seconds without a sign of life after which it is killed."""

    handle: RunHandle
    silence: float
    buffers: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    _pipe: int = -1
    _heard: float = 0.0
    _draining: bool = False

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

    def heard(self, message: dict[str, Any]) -> None:
        """A sign of life. Commits show that it gets on."""
        self._heard = time.monotonic()
        if message["done"] > 0:
            self.restarts = 0

    def tend(self) -> bool:
        """Call a few times a second: replaces a dead or silent one. Returns whether one is alive.

        Raises:
            TrainingError: one after the other died without committing anything.
        """
        if self.process is None:
            return False
        code = self.process.poll()
        if code is None and time.monotonic() - self._heard <= self.silence:
            return True
        if code == 0 and self._draining:
            self.process = None
            return False
        reason = f"silent for {self.silence:g} s"
        if code is not None:
            reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._kill()
        if self.restarts == MAX_RESTARTS:
            raise TrainingError(
                f"the checkpointer was {reason}, after {self.restarts} restarts without a commit; its log: "
                f"{self.log_path()}"
            )
        self.restarts += 1
        self.handle.event("checkpointer_restart", reason=reason, restarts=self.restarts)
        self._start()
        return True

    def drain(self) -> None:
        """Ask it to finish what all ranks have handed over and to end; then :meth:`tend` until it has."""
        self._draining = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill it, and let the buffers go."""
        self._kill()
        for descriptor in self.buffers:
            os.close(descriptor)
        self.buffers = []

    def log_path(self) -> Path:
        """RUN/logs/ROLE.HOST.ATTEMPT.log."""
        return self.handle.path / "logs" / f"checkpointer.{os.uname().nodename}.{self.handle.attempt}.log"

    def _start(self) -> None:
        command = [sys.executable, "-m", "vitgraft.trainer.checkpointer", "--run-dir", str(self.handle.path.resolve())]
        command += ["--attempt", str(self.handle.attempt), *(["--drain"] if self._draining else [])]
        command += ["--buffers", *map(self._path, self.buffers)]
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            PIPE_VARIABLE: str(self._pipe),
            PARENT_VARIABLE: str(os.getpid()),
        }
        self._heard = time.monotonic()
        # It inherits SIGTERM blocked: asked to finish before it can hear, it hears later instead of dying.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            with self.log_path().open("ab") as log:
                self.process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(self._pipe, self.handle.lock.fileno()),
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
