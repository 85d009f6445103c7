"""Cause of an attempt's end from the supervisor's observations. Pure functions.

The first failure is the cause; what follows from it is not: ranks that have lost the others, and those that the
supervisor killed itself.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

from vitgraft.configs.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ErrorCause,
    InterruptedRun,
    PreemptedRun,
    TrainingError,
    VitgraftError,
)
from vitgraft.launch.observations import Cause, HostState, Kind, Observation, RankEnd, ReportedError
from vitgraft.trainer.signals import signal_name

EXIT_CODES: dict[Kind, int] = {
    "crash": TrainingError.exit_code,
    "hang": TrainingError.exit_code,
    "host_memory": TrainingError.exit_code,
    "device_memory": TrainingError.exit_code,
    "non_finite": TrainingError.exit_code,
    "lost_node": TrainingError.exit_code,
    "network": TrainingError.exit_code,
    "full_disk": TrainingError.exit_code,
    "bad_data": DataError.exit_code,
    "bad_configuration": ConfigError.exit_code,
    "bad_checkpoint": CheckpointError.exit_code,
    "defect": VitgraftError.exit_code,
    "preemption": PreemptedRun.exit_code,
    "interrupt": InterruptedRun.exit_code,
}

ADVICE: dict[Kind, str] = {
    "crash": "look at the end of the log",
    "hang": "look at that rank's log and host: a stopped process, a stuck disk or GPU, a broken link",
    "host_memory": "lower data.workers or train.global_batch, or give the host more memory",
    "device_memory": "lower train.global_batch, raise train.accumulation, or set train.activation_checkpointing: full",
    "non_finite": "look at the samples that are named, or leave them out by train.on_non_finite: skip",
    "bad_data": "repair the data, or leave damaged samples out with data.on_error",
    "lost_node": "look at the host: power, kernel log, network",
    "network": "look at the links and ports between the hosts: vitgraft doctor",
    "full_disk": "make room, or make it writable again; committed checkpoints are whole",
    "bad_configuration": "correct the recipe or the command",
    "bad_checkpoint": "restore a valid checkpoint, or start afresh with --resume never",
    "defect": "report it with the traceback in that rank's log",
    "preemption": "queue the same command again",
    "interrupt": "the same command goes on",
}

FULL_BELOW = 16 << 20
"""A disk with fewer free bytes is full."""
SAME_MOMENT_S = 2.0
"""Connections break this long before the death of a host or a process is noticed."""
_STOPS = (PreemptedRun.exit_code, InterruptedRun.exit_code)
_BY_CAUSE: dict[ErrorCause, Kind] = {
    "non_finite": "non_finite",
    "device_memory": "device_memory",
    "host_memory": "host_memory",
    "no_space": "full_disk",
    "read_only": "full_disk",
}
_BY_CODE: dict[int, Kind] = {
    VitgraftError.exit_code: "defect",
    ConfigError.exit_code: "bad_configuration",
    DataError.exit_code: "bad_data",
    CheckpointError.exit_code: "bad_checkpoint",
    TrainingError.exit_code: "crash",
    PreemptedRun.exit_code: "preemption",
    InterruptedRun.exit_code: "interrupt",
}


def cause_of(seen: Observation) -> Cause | None:
    """Return the cause of the attempt's end; ``None``: no failure."""
    failures = sorted(_failures(seen), key=lambda found: found[0])
    if failures:
        return failures[0][1]
    if _done(seen):
        return None  # also if it was asked to stop in its last step
    if seen.asked is not None:
        kind: Kind = "interrupt" if seen.asked == signal.SIGINT else "preemption"
        return _cause(kind, f"stopped by {signal_name(seen.asked)}")
    victims = [error for error in seen.errors if _is_victim(error)]
    if victims:
        first = min(victims, key=lambda error: error.at)
        text = f"{first.text}, though none of them failed by itself"
        return _cause("network", text, first.rank, first.host, first.step)
    return next((_cause(_BY_CODE[end.code], "a rank stopped", end.rank, end.host) for end in _stopped(seen.ends)), None)


def _done(seen: Observation) -> bool:
    """Tell whether all known ranks have ended with code 0."""
    well = {end.rank for end in seen.ends if end.code == 0}
    known = {rank for host in seen.hosts for rank in host.ranks or ()}
    return bool(well) and well >= known | {end.rank for end in seen.ends}


def _was_needed(host: HostState, ends: Sequence[RankEnd]) -> bool:
    """Tell whether a lost host had a rank that was running, or that failed as the host was lost."""
    if host.ranks is None or host.lost_at is None:
        return True
    over = set()
    for end in ends:
        failed = end.code not in (0, *_STOPS) and not end.by_us
        if end.at <= host.lost_at - SAME_MOMENT_S * failed:
            over.add(end.rank)
    return not over.issuperset(host.ranks)


def _stopped(ends: Sequence[RankEnd]) -> Iterator[RankEnd]:
    return (end for end in ends if end.code in _STOPS)


def _failures(seen: Observation) -> Iterator[tuple[float, Cause]]:
    """Yield the primary failures and their times."""
    hosts = {host.name: host for host in seen.hosts}
    gone = {host.name for host in seen.hosts if host.lost_at is not None and _was_needed(host, seen.ends)}
    for host in seen.hosts:
        if host.name in gone and host.lost_at is not None:
            # It was gone before its silence was noticed, and before others could complain.
            yield host.lost_at - SAME_MOMENT_S, _cause("lost_node", f"{host.name} is gone", host=host.name)
    spoken = set()
    for error in seen.errors:
        if error.code in _STOPS:
            continue
        spoken.add(error.rank)
        if not _is_victim(error):
            kind = _kind_of(error, hosts.get(error.host))
            # What is no rank has none, and DeepSpeed's launcher no host to blame.
            rank = error.rank if error.rank >= 0 else None
            # Its own line ends with a remedy.
            cause = replace(_cause(kind, error.text, rank, error.host or None, error.step), complete=rank is not None)
            # A cache on a full disk is bad data to the command line: what a rank says of its end holds.
            yield error.at, replace(cause, exit_code=error.code) if error.cause is not None else cause
    for end in seen.ends:
        if end.by_us or end.rank in spoken or end.code in (0, *_STOPS) or _asked_for(end, seen.asked):
            continue
        if end.host in gone:
            continue  # with its host
        yield end.at - SAME_MOMENT_S * (end.code < 0), _of_end(end, hosts.get(end.host))
    if seen.hang is not None:
        hang = seen.hang
        who = "no rank" if hang.rank is None else f"rank {hang.rank} on {hang.host} does not"
        rest = "gets on" if hang.rank is None else "get on"
        where = "" if hang.phase == "start" else f"at step {hang.step}, "
        what = {"first_step": "the first step", "step": "a step"}.get(hang.phase, hang.phase)
        text = f"{who} {rest}: {where}{what} for {hang.seconds:.0f} s, expected {hang.limit:.0f} s"
        yield hang.at, _cause("hang", text, hang.rank, hang.host, hang.step)


def _is_victim(error: ReportedError) -> bool:
    return error.cause == "lost_peers"


def _asked_for(end: RankEnd, asked: int | None) -> bool:
    """Tell whether a rank was ended by the signal to stop, before it could save a checkpoint."""
    return asked is not None and end.code in (-signal.SIGTERM, -asked)


def _kind_of(error: ReportedError, host: HostState | None) -> Kind:
    if error.cause is not None and error.cause in _BY_CAUSE:
        return _BY_CAUSE[error.cause]
    kind = _BY_CODE.get(error.code, "crash")
    return "full_disk" if kind == "crash" and _is_full(host) else kind


def _of_end(end: RankEnd, host: HostState | None) -> Cause:
    """Return the cause for a process that ended without a message."""
    if end.code < 0:
        name = signal_name(-end.code)
        if end.code == -signal.SIGKILL and host is not None and host.memory_kills > 0:
            text = f"rank {end.rank} on {end.host} was killed by its kernel for want of memory"
            return _cause("host_memory", text, end.rank, end.host)
        if end.code == -signal.SIGBUS:
            text = f"rank {end.rank} on {end.host} was ended by {name}: /dev/shm or the disk is full, or a file shrank"
            return _cause("full_disk" if _is_full(host) else "crash", text, end.rank, end.host)
        return _cause("crash", f"rank {end.rank} on {end.host} was ended by {name}", end.rank, end.host)
    kind = "full_disk" if _is_full(host) and end.code == TrainingError.exit_code else _BY_CODE.get(end.code, "crash")
    return _cause(kind, f"rank {end.rank} on {end.host} ended with code {end.code}", end.rank, end.host)


def _is_full(host: HostState | None) -> bool:
    return host is not None and host.run_free is not None and host.run_free < FULL_BELOW


def _cause(kind: Kind, text: str, rank: int | None = None, host: str | None = None, step: int | None = None) -> Cause:
    return Cause(kind, EXIT_CODES[kind], text, ADVICE[kind], rank, host, step)
