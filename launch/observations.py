"""What a supervisor sees of a gang of ranks, and what it concludes: plain data without behaviour.

Times are seconds of the supervisor's own monotonic clock; what other hosts say is stamped when it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vitgraft.configs.errors import ErrorCause

Phase = Literal["start", "first_step", "step", "save", "evaluate"]

Kind = Literal[
    "crash",
    "hang",
    "host_memory",
    "device_memory",
    "non_finite",
    "bad_data",
    "lost_node",
    "network",
    "full_disk",
    "bad_configuration",
    "bad_checkpoint",
    "defect",
    "preemption",
    "interrupt",
]
"""Why an attempt ended. A straggler is named, but ends nothing."""


@dataclass(frozen=True)
class RankState:
    """What a rank's heartbeats say. ``step``: the one that it computes, saves or evaluates, from 1 as in metrics; in a
    start, steps done. ``since``: when ``phase`` or ``step`` changed last. ``heard``: when it gave its last sign of
    life; infinite: its launcher has not started it yet."""

    rank: int
    host: str
    phase: Phase
    step: int
    since: float
    heard: float


@dataclass(frozen=True)
class ReportedError:
    """A rank's last words: exit code and one line, and where they are known the cause and the step (from 1, as in the
    metrics). ``rank``: -1 for a role that is none. ``host``: empty where none is to blame."""

    rank: int
    host: str
    at: float
    code: int
    text: str
    cause: ErrorCause | None = None
    step: int | None = None


@dataclass(frozen=True)
class RankEnd:
    """A process that is gone. ``code``: as ``subprocess`` has it, -N for signal N. ``by_us``: the supervisor killed it,
    which is no cause of anything."""

    rank: int
    host: str
    at: float
    code: int
    by_us: bool = False


@dataclass(frozen=True)
class HostState:
    """``lost_at``: when its agent fell silent; ``None``: it answers. ``memory_kills``: processes that its kernel has
    killed for want of memory during the attempt. ``run_free``: bytes free where it writes the run. ``ranks``: that it
    has; ``None``: not known, some of them run."""

    name: str
    lost_at: float | None = None
    memory_kills: int = 0
    run_free: int | None = None
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Hang:
    """A gang that stands still. ``rank``, ``host``: who holds the others up; ``None``: all alike."""

    at: float
    phase: Phase
    step: int
    seconds: float
    limit: float
    rank: int | None
    host: str | None


@dataclass(frozen=True)
class Straggler:
    """A rank that all others wait for. ``ratio``: of its own time to the median of all."""

    rank: int
    ratio: float
    seconds: float


@dataclass(frozen=True)
class Observation:
    """All that is known when an attempt has ended. ``asked``: signal with which it was asked to stop."""

    errors: tuple[ReportedError, ...] = ()
    ends: tuple[RankEnd, ...] = ()
    hosts: tuple[HostState, ...] = ()
    hang: Hang | None = None
    asked: int | None = None


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended, in one line (``text``) and with what to do about it (``advice``).

    ``step``: at which it failed, where that is known. ``complete``: the text says itself what to do.
    """

    kind: Kind
    exit_code: int
    text: str
    advice: str
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    complete: bool = False

    @property
    def line(self) -> str:
        """The cause and what to do."""
        return self.text if self.complete else f"{self.text}; {self.advice}"


@dataclass(frozen=True)
class Failure:
    """One attempt that ended before its time, as recovery remembers it.

    ``checkpoint``: step of the newest valid checkpoint when it ended (0: none). ``step``: the step that failed, where
    that is known. ``entries``: samples that a non-finite loss named. ``hosts``: ranks on each host.
    """

    cause: Cause
    checkpoint: int
    step: int | None = None
    entries: frozenset[str] = frozenset()
    hosts: dict[str, int] = field(default_factory=dict)
