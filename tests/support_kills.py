"""Processes that kill, or stop, themselves at their k-th operation on the disk: forks of the test, so that hundreds are
cheap. Nothing is simulated: a real process does real operations on real files until the kernel ends it."""

from __future__ import annotations

import _pyio
import contextlib
import io
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree"}
PATIENCE_S = 60.0
_SLOT, _SLOTS = 16, 256
_AT_ONCE = 32


class Fork:
    """A fork that runs ``job`` and ends with what it returns.

    Args:
        watch: operations in this folder count.
        at: the operation (from 0) at which the process sends itself ``number``; ``None``: only count.
        group: the process group to join; ``None``: its own.
        whole_group: the signal goes to all of the group.
        delay: seconds that every operation takes longer: a slow disk.
    """

    def __init__(
        self,
        job: Callable[[], int | None],
        watch: Path,
        at: int | None = None,
        *,
        number: int = signal.SIGKILL,
        group: int | None = None,
        whole_group: bool = False,
        delay: float = 0.0,
    ) -> None:
        self._board = mmap.mmap(-1, _SLOT * _SLOTS)
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            with contextlib.suppress(OSError):  # both sides do it, so that neither goes on before it is done
                os.setpgid(self.pid, group or self.pid)
            return
        code = 99
        try:
            os.setpgid(0, group or 0)
            send = (lambda: os.killpg(os.getpgrp(), number)) if whole_group else (lambda: os.kill(os.getpid(), number))
            _count(self._board, str(watch), at, send, delay)
            code = job() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    @property
    def operations(self) -> list[str]:
        """What it has done so far, or was about to do when the signal came."""
        slots = (self._board[start : start + _SLOT].rstrip(b"\0") for start in range(0, len(self._board), _SLOT))
        return [slot.decode() for slot in slots if slot]

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def stopped(self) -> bool:
        """Whether the kernel has stopped it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code; negative: the signal that ended it."""
        until(lambda: not self.running(), seconds)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """End it."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@contextlib.contextmanager
def all_ended(forks: list[Fork]) -> Iterator[None]:
    """Whatever happens inside, none of them outlives it."""
    try:
        yield
    finally:
        for fork in forks:
            fork.kill()


def kill_in_run(plan: Path, run: str) -> None:
    """Arm a checkpointer of a real run, in its own process, with the next line of a plan: files
    NUMBER.VICTIM.OPERATION, each good for one process. VICTIM: ``self``, ``rank`` (the last one here) or ``all``."""
    file = next(iter(sorted(plan.iterdir())), None)
    if file is None:
        return
    file.unlink()
    _, victim, at = file.name.split(".")

    def send() -> None:
        if victim == "rank":
            os.kill(_ranks_beside()[-1], signal.SIGKILL)
            return
        if victim == "all":
            agent = os.getppid()
            supervisor = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
            # The kernel ends the agent with its supervisor, and the ranks with their agent.
            os.kill(supervisor, signal.SIGKILL)
            os.kill(agent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    _count(mmap.mmap(-1, _SLOT * _SLOTS), run, int(at), send, 0.0)


def _ranks_beside() -> list[int]:
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    return [int(pid) for pid in children if b"vitgraft.trainer.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _count(board: mmap.mmap, folder: str, at: int | None, send: Callable[[], None], delay: float) -> None:
    """Count this process's operations from here on, and fall at one of them.

    Python tells audit hooks of all that changes names; writing and flushing are wrapped. A write counts twice, before
    it and in the middle of it, and Python's own implementation of text files lets those be seen too.
    """
    lock, done = threading.Lock(), [0]

    def fall(name: str) -> bool:
        with lock:
            mine = done[0]
            done[0] += 1
            if mine < _SLOTS:
                board[mine * _SLOT : mine * _SLOT + len(name)] = name.encode()
        if delay:
            time.sleep(delay)
        return mine == at

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and not isinstance(path, int)
            if changes and os.fspath(path).startswith(folder) and fall("open"):
                send()
        elif event in CHANGES:
            path = os.fspath(arguments[0])
            # Names without a folder are relative to an open one: a tree that is being removed.
            if (path.startswith(folder) or not os.path.isabs(path)) and fall(event):
                send()

    write, fsync, pwrite = os.write, os.fsync, os.pwrite

    def torn_write(descriptor: int, data: Any) -> int:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(folder):
            return write(descriptor, data)  # a pipe
        if fall("write"):
            send()
        if fall("half a write"):
            half = memoryview(data).cast("B")[: len(data) // 2]
            written = write(descriptor, half)
            send()
            return written
        return write(descriptor, data)

    def torn_pwrite(descriptor: int, data: Any, offset: int) -> int:
        if fall("pwrite"):
            send()
        # A few bytes inside a page go at once.
        if len(data) > _AT_ONCE and fall("half a pwrite"):
            pwrite(descriptor, data[: len(data) // 2], offset)
            send()
        return pwrite(descriptor, data, offset)

    def sync(descriptor: int) -> None:
        if fall("fsync"):
            send()
        fsync(descriptor)

    os.write, os.fsync, os.pwrite = torn_write, sync, torn_pwrite  # type: ignore[assignment]
    io.open = _pyio.open  # type: ignore[assignment]
    sys.addaudithook(hook)
