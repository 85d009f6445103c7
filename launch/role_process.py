"""Process of a role on this host: start, requests, and detection of its end or silence."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from vitgraft.trainer.rank import PARENT_VARIABLE
from vitgraft.trainer.report import PIPE_VARIABLE
from vitgraft.trainer.signals import signal_name

START_S = 120.0
"""Smallest time-out of a start-up, in seconds: a cold file system and many checkpoints are slow."""


@dataclass
class RoleProcess:
    """The process of ``vitgraft.trainer.ROLE`` that works now, or that did last.

    ``lock``: open descriptor of RUN/lock, which it holds too; ``None`` where the run is owned from another host.
    ``signals``: blocked until it listens, so that what it is asked before that is heard later instead of ending it.
    ``environment``: what it finds besides that of this process.
    """

    role: str
    run: Path
    attempt: int
    lock: int | None
    signals: Sequence[int]
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _pid: int = -1
    _heard: float = 0.0
    _beating: bool = False

    def start(self, pipe: int, arguments: Sequence[str]) -> None:
        """Start one in a session of its own; it reports to ``pipe``.

        Raises:
            OSError: no process or log can be made.
        """
        command = [sys.executable, "-m", f"vitgraft.trainer.{self.role}", "--run-dir", str(self.run.resolve())]
        command += ["--attempt", str(self.attempt), *arguments]
        variables = {
            **os.environ,
            **self.environment,
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            PIPE_VARIABLE: str(pipe),
            PARENT_VARIABLE: str(os.getpid()),
        }
        self._heard, self._beating = time.monotonic(), False
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        try:
            with open_log(self.log_path()) as log:
                self._process = subprocess.Popen(
                    command,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(pipe, *(() if self.lock is None else (self.lock,))),
                    start_new_session=True,
                )
                self._pid = self._process.pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def heard(self, pid: int) -> bool:
        """Note a heartbeat; return whether it is of this process, also if it has just ended."""
        if pid != self._pid:
            return False
        self._heard, self._beating = time.monotonic(), True
        return True

    @property
    def pid(self) -> int | None:
        """Of the one that works now or has ended by itself; ``None``: there is none."""
        return None if self._process is None else self._pid

    def alive(self) -> bool:
        """Tell whether it was started and has not ended."""
        return self._process is not None and self.code() is None

    def code(self) -> int | None:
        """Return its exit code, -N for signal N; ``None``: it runs, or was not started."""
        return None if self._process is None else end_of(self._process)

    def trouble(self, silence: float) -> str | None:
        """Return why it must be replaced: it ended, or was silent for ``silence`` seconds; ``None``: it need not."""
        code = self.code()
        if code is not None:
            return f"ended by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
        patience = silence if self._beating else max(silence, START_S)
        return f"silent for {patience:g} s" if time.monotonic() - self._heard > patience else None

    def ask(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self._process is not None and self.code() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it and its loader processes."""
        if self._process is not None:
            end_family(self._process)
            self._process = None

    def log_path(self) -> Path:
        """Return RUN/logs/ROLE.HOST.ATTEMPT.log."""
        return log_path(self.run, self.role, self.attempt)


def end_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, and what it has started: a loader that was stopped would not end by itself.

    Nothing is done to those of a process that has ended and been waited for: its number may be another's by now.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_of(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code of a session leader, -N for signal N; ``None``: it runs. If it failed, kill the processes
    that it started."""
    if process.returncode is None:
        end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        # Its number is its own until it is waited for.
        if end is not None and end.si_status != 0:
            end_family(process)
    return process.poll()


def open_log(path: Path) -> BinaryIO:
    """Open a log to append to, and create its folder if it was moved away during the run.

    Raises:
        OSError: it cannot be written.
    """
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir()
    return path.open("a+b")


def log_path(run: Path, role: str, attempt: int, host: str | None = None) -> Path:
    """Return RUN/logs/ROLE.HOST.ATTEMPT.log. ``host``: its node name; ``None``: this host."""
    return run / "logs" / f"{role}.{host or os.uname().nodename}.{attempt}.log"
