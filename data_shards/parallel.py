"""Parallel map of a pure function over items in worker processes: outcomes in order, a bounded number at a time.

Each process has a pipe of its own, so that one that the kernel kills is noticed at once, even in the middle of what it
was sending; in a pool with one pipe for all, the reader would wait for the rest for ever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from vitgraft.configs.cores import usable_cores
from vitgraft.configs.errors import DataError

PATIENCE_S = 2.0
"""Work that takes less is done without other processes, whose start takes about as long."""
MAX_DEFAULT = 8
_AHEAD = 3
"""Chunks for each process that are under way or wait for their turn: what bounds the memory."""

Given = TypeVar("Given")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """Result of the function for one item, or the exception that it raised."""

    value: Value | None = None
    error: Exception | None = None

    def get(self) -> Value:
        """Return the value, or raise the function's exception."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


def default_jobs() -> int:
    """Return the number of cores this process may use, at most ``MAX_DEFAULT``."""
    return min(usable_cores(), MAX_DEFAULT)


def outcomes(
    function: Callable[[Given], Value], items: Sequence[Given], jobs: int, chunk: int = 1
) -> Generator[Outcome[Value], None, None]:
    """Yield ``function(item)`` of each item, in order for any number of processes; closing the generator ends them.

    Args:
        function: pure, and picklable as the items and their outcomes are.
        jobs: how many processes; 1: none besides this one.
        chunk: items that go to a process at once; more for shorter work.

    Raises:
        DataError: a process was killed.
    """
    done, started = 0, time.monotonic()
    while done < len(items) and (jobs <= 1 or time.monotonic() - started < PATIENCE_S):
        yield _attempt(function, items[done])
        done += 1
    if done < len(items):
        chunks = [slice(start, start + chunk) for start in range(done, len(items), chunk)]
        workers = [_Worker(function) for _ in range(min(jobs, len(chunks)))]
        try:
            yield from _in_order(workers, items, chunks)
        finally:
            for worker in workers:
                worker.end()


def _in_order(workers: list[_Worker], items: Sequence[Any], chunks: list[slice]) -> Generator[Outcome[Any], None, None]:
    idle, busy = list(workers), dict[connection.Connection, tuple[int, "_Worker"]]()
    found: dict[int, list[Outcome[Any]] | DataError] = {}
    following, sent, alive = 0, 0, True
    while following < len(chunks):
        while alive and idle and sent < min(len(chunks), following + _AHEAD * len(workers)):
            worker = idle.pop()
            worker.send(items[chunks[sent]])
            busy[worker.pipe] = sent, worker
            sent += 1
        for pipe in connection.wait(list(busy), timeout=0 if following in found else None):
            number, worker = busy.pop(pipe)  # type: ignore[call-overload]
            try:
                found[number] = worker.receive()
                idle.append(worker)
            except DataError as error:
                # Its turn comes when all before it is handed over.
                found[number], alive = error, False
        if following in found:
            ready = found.pop(following)
            if isinstance(ready, DataError):
                raise ready
            yield from ready
            following += 1


class _Worker:
    """One process. It comes from a fork server: forking a process with threads could copy a lock held for ever."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "vitgraft.data_shards.decode"])
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(function, theirs), daemon=True)
        self._process.start()
        # Only the process holds its end now, so that its death ends the pipe.
        theirs.close()

    def send(self, items: Sequence[Any]) -> None:
        """Send items to the process, which must be idle, so that it reads and no deadlock is possible."""
        with contextlib.suppress(OSError):
            # That it died is found when its answer is awaited.
            self.pipe.send(items)

    def receive(self) -> list[Outcome[Any]]:
        """Return the outcomes of the items sent.

        Raises:
            DataError: the process has died.
        """
        try:
            found: list[Outcome[Any]] = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise DataError(
                f"a worker process died (exit code {self._process.exitcode}), most likely killed for lack of memory; "
                "do the same with fewer --jobs"
            ) from None
        return found

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.pipe.close()
        self._process.kill()
        self._process.join()


def _work(function: Callable[[Any], Any], pipe: connection.Connection) -> None:
    # Ctrl-C goes to all; what it means is decided by the process that is asked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            pipe.send([_attempt(function, item) for item in pipe.recv()])
        except (EOFError, OSError):
            return


def _attempt(function: Callable[[Given], Value], item: Given) -> Outcome[Value]:
    try:
        return Outcome(function(item))
    except DataError as error:
        # Without its traceback: the line says what is wrong with the data.
        return Outcome(error=error.with_traceback(None))
    except Exception as error:
        # The traceback does not go through the pipe; its text does.
        error.add_note(traceback.format_exc())
        return Outcome(error=error)
