"""Start the trainer's ranks on this host, watch them, and leave none behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from vitgraft.configs.errors import ConfigError, InterruptedRun, PreemptedRun, TrainingError, VitgraftError
from vitgraft.launch.checkpointer import CheckpointerKeeper
from vitgraft.launch.devices import Placement
from vitgraft.launch.run_dir import RunHandle
from vitgraft.launch.ui import Screen
from vitgraft.trainer.rank import PARENT_VARIABLE, THREADS_VARIABLE
from vitgraft.trainer.report import PIPE_VARIABLE

GRACE_AFTER_FAILURE_S = 5.0
_LOST_PEERS = "lost the other ranks"
_NO_FAILURE = (None, 0, PreemptedRun.exit_code)


def free_port(wanted: int) -> int:
    """The wanted port, or a free one for 0.

    Raises:
        ConfigError: the wanted port is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ConfigError(f"launch.port: {wanted}: {error.strerror}; choose another, or 0 for a free one") from None
        return int(probe.getsockname()[1])


@dataclass
class Gang:
    """The ranks of one attempt, and the checkpointer that serves them unless they write themselves."""

    handle: RunHandle
    placement: Placement
    screen: Screen
    keeper: CheckpointerKeeper | None = None
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    errors: list[tuple[int, str]] = field(default_factory=list)
    stopping: int | None = None

    def run(self, port: int) -> None:
        """Start, watch, end.

        Raises:
            VitgraftError: why the ranks ended, unless they finished; no process of the run lives then.
        """
        read, write = os.pipe()
        old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self.keeper is not None:
                self.keeper.make_buffers(self.placement.processes)
                self.keeper.start(write)
            for rank in range(self.placement.processes):
                self.ranks.append(self._start(rank, port, write))
            if self.keeper is None:
                os.close(write)
                write = -1
            if self.stopping is not None:
                self._ask_to_stop()  # the signal came before all ranks were there
            self._watch(read)
        finally:
            self.end()
            for number, handler in old.items():
                signal.signal(number, handler)
            os.close(read)
            if write != -1:
                os.close(write)

    def end(self) -> None:
        """Kill everything that still lives, the ranks' loader processes with them."""
        self._end_ranks()
        if self.keeper is not None:
            self.keeper.end()

    def _end_ranks(self) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.kill()
        for process in self.ranks:
            process.wait()

    def _start(self, rank: int, port: int, pipe: int) -> subprocess.Popen[bytes]:
        handle, placement = self.handle, self.placement
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(placement.processes),
            "LOCAL_SIZE": str(placement.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            THREADS_VARIABLE: str(placement.threads),
            "DS_ACCELERATOR": placement.device,
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            PIPE_VARIABLE: str(pipe),
            PARENT_VARIABLE: str(os.getpid()),
            **(self.keeper.environment(rank) if self.keeper is not None else {}),
        }
        # The ranks of one host meet on the loopback; a host name that does not resolve must not matter.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        command = [sys.executable, "-m", "vitgraft.trainer.rank", "--run-dir", str(handle.path.resolve())]
        command += ["--attempt", str(handle.attempt), "--device", placement.device]
        if handle.resume is not None:
            # Not resolved: blobs lie in the run, wherever a link has put its checkpoints.
            command += ["--resume", os.path.abspath(handle.resume.path)]
        with self.log_path(rank).open("ab") as log:
            # A session of its own: Ctrl-C on the terminal reaches the launcher alone, which stops the ranks in order.
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(pipe, handle.lock.fileno()),
                start_new_session=True,
            )

    def log_path(self, rank: int) -> Path:
        """RUN/logs/ROLE.HOST.ATTEMPT.log."""
        name = f"trainer-{rank}.{os.uname().nodename}.{self.handle.attempt}.log"
        return self.handle.path / "logs" / name

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping is not None and number == signal.SIGINT:
            raise InterruptedRun("interrupted; the same command goes on from the last committed checkpoint")
        self.stopping = number
        self.screen.note("stopping behind a checkpoint at the end of this step; Ctrl-C again ends at once")
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _watch(self, pipe: int) -> None:
        buffer = b""
        failed_at: float | None = None
        os.set_blocking(pipe, False)
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while any(process.poll() is None for process in self.ranks):
                if selector.select(timeout=0.2):
                    buffer = self._read(pipe, buffer)
                if self.keeper is not None:
                    self.keeper.tend()
                if failed_at is None and any(process.poll() not in _NO_FAILURE for process in self.ranks):
                    failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at > GRACE_AFTER_FAILURE_S:
                    dead = [process.poll() for process in self.ranks]
                    self._end_ranks()
                    break
            else:
                dead = [process.returncode for process in self.ranks]
            done = all(code == 0 for code in dead)
            buffer, failure = self._drain(selector, pipe, buffer, wait_for_copy=done)
            self._read(pipe, buffer)
        self._judge(dead)
        if failure is not None:
            raise failure

    def _drain(
        self, selector: selectors.BaseSelector, pipe: int, buffer: bytes, *, wait_for_copy: bool
    ) -> tuple[bytes, TrainingError | None]:
        """The ranks have ended, for whatever reason: let the checkpointer finish what all of them handed over. What
        goes wrong with that matters only when nothing else did. The last copy to a store is waited for at the end of a
        run, until somebody wants to stop."""
        if self.keeper is None:
            return buffer, None
        try:
            while self.keeper.tend():
                self.keeper.drain(drop_copy=not wait_for_copy or self.stopping is not None)
                if selector.select(timeout=0.05):
                    buffer = self._read(pipe, buffer)
        except TrainingError as error:
            return buffer, error
        return buffer, None

    def _read(self, pipe: int, buffer: bytes) -> bytes:
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return buffer
        *lines, rest = (buffer + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                self._message(json.loads(line))
        if not data:
            time.sleep(0.05)  # every rank closed its end; they are about to exit
        return rest

    def _message(self, message: dict[str, Any]) -> None:
        if message["kind"] == "progress":
            self.screen.progress(message["label"], message["done"], message["total"], message["facts"])
        elif message["kind"] == "note":
            self.screen.note(message["text"])
        elif message["kind"] == "event":
            self.screen.note(message["text"])
            self.handle.event(message["name"], text=message["text"])
        elif message["kind"] == "beat":
            if self.keeper is not None:
                slow = self.keeper.heard(message)
                if slow is not None:
                    self.screen.note(slow)
        else:
            self.errors.append((message["code"], message["text"]))

    def _judge(self, codes: list[int | None]) -> None:
        """Turn the ranks' ends (``None``: it still lived when the others were given up) into one error: the cause."""
        if not any(codes):
            return
        stops = (PreemptedRun.exit_code, InterruptedRun.exit_code)
        for code, text in self.errors:
            if code not in stops and _LOST_PEERS not in text:
                raise _error(code, text, self.log_path(0))
        asked = self.stopping is not None
        for rank, end in enumerate(codes):
            # SIGTERM before a rank could turn it into a checkpoint is our own doing.
            if end is not None and end < 0 and not (asked and end == -signal.SIGTERM):
                name = signal.Signals(-end).name
                raise TrainingError(f"rank {rank} was ended by {name} (out of memory?); its log: {self.log_path(rank)}")
        committed = " behind a committed checkpoint" if all(end == PreemptedRun.exit_code for end in codes) else ""
        if self.stopping == signal.SIGINT:
            raise InterruptedRun(f"interrupted{committed}; the same command goes on from the last committed checkpoint")
        if asked:
            raise PreemptedRun(f"stopped{committed}; the same command goes on from the last committed checkpoint")
        if self.errors:
            raise _error(*self.errors[0], self.log_path(0))
        rank = next(i for i, end in enumerate(codes) if end)
        raise TrainingError(f"rank {rank} ended with code {codes[rank]}; its log: {self.log_path(rank)}")


def _error(code: int, text: str, log: Path) -> VitgraftError:
    error = VitgraftError(text if code not in (1, 5) else f"{text} (log: {log})")
    error.exit_code = code
    return error
