"""A rank's own time for a step, without the time in which it waits for the others, so that the slowest rank is found.

On a CPU that is everything between two steps' last meetings except waits for collectives. On a GPU, where waiting
happens on the device, it is what comes before the ranks meet to add up their losses: waiting for data and the forward
pass, by the device's clock (a model whose forward pass meets the others, as ZeRO-3's and synchronised BatchNorm's do,
blurs it).
"""

from __future__ import annotations

import time
from collections import deque
from statistics import median_low
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_waited = 0.0


def watch_waits() -> None:
    """Measure every wait for a collective from now on; all of torch's and DeepSpeed's on a CPU end in ``Work.wait``."""
    plain = dist.Work.wait
    if getattr(plain, "measured", False):
        return

    def wait(self: Any, *arguments: Any, **options: Any) -> Any:
        global _waited
        started = time.perf_counter()
        try:
            return plain(self, *arguments, **options)
        finally:
            _waited += time.perf_counter() - started

    wait.measured = True  # type: ignore[attr-defined]
    dist.Work.wait = wait  # type: ignore[method-assign]


class HostClock:
    """A rank's own seconds on a CPU."""

    def __init__(self) -> None:
        watch_waits()
        self._spent = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Start the clock at the beginning of a micro-step; do nothing while it runs."""
        if self._since is None:
            self._since = time.perf_counter() - _waited

    def meet(self) -> float:
        """Return the own seconds since the last call, before a collective."""
        self.stop()
        spent, self._spent = self._spent, 0.0
        self.start()
        return spent

    def stop(self) -> None:
        """Stop the clock before work that belongs to no step: a checkpoint or an evaluation."""
        if self._since is not None:
            self._spent += time.perf_counter() - _waited - self._since
            self._since = None


class DeviceClock:
    """A rank's own seconds on a GPU, known when the device gets there: those of the micro-step before, mostly."""

    def __init__(self) -> None:
        self._started: torch.cuda.Event | None = None
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Start the clock at the beginning of a micro-step; do nothing while it runs."""
        if self._started is None:
            self._started = _mark()

    def meet(self) -> float:
        """Return the own seconds of all earlier micro-steps that the device has completed and that were not returned
        yet, before a collective."""
        seconds = 0.0
        while self._spans and self._spans[0][1].query():  # type: ignore[no-untyped-call]
            started, ended = self._spans.popleft()
            seconds += started.elapsed_time(ended) / 1e3
        if self._started is not None:
            self._spans.append((self._started, _mark()))
            self._started = None
        return seconds

    def stop(self) -> None:
        """Do nothing: no time is measured between :meth:`meet` and the next start."""


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def clock_for(device: torch.device) -> HostClock | DeviceClock:
    """Return the clock for the device that trains."""
    return DeviceClock() if device.type == "cuda" else HostClock()


class Spread(NamedTuple):
    """The ranks' own seconds of a step, in short."""

    median: float
    slowest: float
    slowest_rank: int


def spread(seconds: list[float]) -> Spread:
    """Return the spread of ``seconds``, by rank, with the lower median, so that of two ranks the slow one stands
    out."""
    slowest = max(seconds)
    return Spread(median_low(seconds), slowest, seconds.index(slowest))
