"""Decision after a failed attempt: restart (when, on which hosts, without which samples), or stop. Pure functions.

Everything follows from the failures so far, the hosts and what the recipe allows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from vitgraft.configs.errors import TrainingError
from vitgraft.launch.hosts import Host
from vitgraft.launch.observations import Failure, Kind

BUDGET_SPENT = 6
"""Exit code when restarts bring no progress."""
NO_RESTART: frozenset[Kind] = frozenset(
    ("bad_configuration", "bad_data", "bad_checkpoint", "full_disk", "preemption", "interrupt")
)
"""Causes that a restart cannot cure, or that were requested."""
SAME_STEP: frozenset[Kind] = frozenset(("defect", "device_memory"))
"""Causes that recur at the same step if they are deterministic, as one restart shows."""
Verdict = Literal["data", "passing"]
HOST_FAULTS: frozenset[Kind] = frozenset(("crash", "hang", "lost_node", "host_memory"))
"""Causes that speak against the host they came from."""


@dataclass(frozen=True)
class Policy:
    """``max_restarts``: without a newer checkpoint between them; 0: the first failure ends the run. ``host_failures``:
    after so many a host is left out, as long as others can go on. ``non_finite``: what happens to samples with which
    the loss is not finite twice."""

    max_restarts: int = 3
    host_failures: int = 2
    non_finite: Literal["stop", "skip"] = "stop"
    first_delay_s: float = 5.0
    longest_delay_s: float = 300.0


@dataclass(frozen=True)
class Restart:
    """Start again from the newest valid checkpoint, after ``delay_s``. ``ranks``: how many on each host.
    ``skip``: samples that keep their place in the order at weight zero. ``notes``: for the events."""

    delay_s: float
    ranks: dict[str, int]
    skip: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    """Give up, with an exit code and one line."""

    exit_code: int
    text: str


def decide(
    record: Sequence[Failure],
    hosts: Sequence[Host],
    answering: Collection[str],
    worlds: Collection[int],
    policy: Policy,
    earlier: Failure | None = None,
) -> Restart | Stop:
    """Return whether and how to restart after the last failure of the record.

    Args:
        record: every failure of this supervisor, oldest first; at least one.
        hosts: of the hostfile, in its order.
        answering: hosts that answer and have passed their checks now.
        worlds: world sizes that the recipe can carry.
        earlier: a non-finite loss under an earlier supervisor, still without a verdict.
    """
    last = record[-1]
    if last.cause.kind in NO_RESTART or policy.max_restarts == 0:
        return Stop(last.cause.exit_code, last.cause.line)
    if last.cause.kind in SAME_STEP and _came_back(record):
        return Stop(last.cause.exit_code, f"{last.cause.text}, again at step {last.step}; {last.cause.advice}")
    skip, notes = _skipped(record, policy, earlier), []
    if culprits := culprits_of(record, earlier):
        if policy.non_finite == "stop":
            text = f"again with the same samples: it is the data; {last.cause.line}"
            return Stop(last.cause.exit_code, text)
        notes.append(f"not finite twice with the same samples, so they are left out: {', '.join(sorted(culprits))}")
    vain = restarts_in_vain(record)
    if vain >= policy.max_restarts:
        return Stop(BUDGET_SPENT, f"{vain} restarts brought no newer checkpoint; the last end: {last.cause.text}")
    out, answering = left_out(record, policy), [host.name for host in hosts if host.name in answering]
    ranks = place(hosts, [name for name in answering if name not in out], worlds)
    if ranks is None and out:
        # Nobody can go on without them, the only host of a run above all: they have the rest of the budget.
        out, ranks = set(), place(hosts, answering, worlds)
    if ranks is None:
        names = ", ".join(answering) or "none"
        return Stop(TrainingError.exit_code, f"{last.cause.text}; the hosts that are left ({names}) can carry no world")
    notes += _changes(last.hosts, ranks, out)
    delay = 0.0 if vain == 0 else min(policy.longest_delay_s, policy.first_delay_s * 2.0 ** (vain - 1))
    return Restart(delay, ranks, skip, tuple(notes))


def restarts_in_vain(record: Sequence[Failure]) -> int:
    """Return the number of restarts since the newest checkpoint was committed; the first failure follows no restart."""
    count = 0
    for earlier, later in zip(reversed(record[:-1]), reversed(record[1:]), strict=True):
        if later.checkpoint > earlier.checkpoint:
            break
        count += 1
    return count


def non_finite_verdict(record: Sequence[Failure], earlier: Failure | None = None) -> Verdict | None:
    """Return the last attempt's verdict on an earlier non-finite loss.

    ``data``: it recurred with some of its samples (at another world size the ranks' samples are grouped differently);
    ``passing``: it did not recur past its step. ``None``: there was no such loss, or its step was not reached.
    """
    return _verdict(open_fault(record[:-1], earlier), record[-1])


def open_fault(record: Sequence[Failure], earlier: Failure | None = None) -> Failure | None:
    """Return the last non-finite loss that still has no verdict."""
    fault = earlier
    for failure in record:
        verdict = _verdict(fault, failure)
        if verdict is not None:
            fault = None
        if failure.cause.kind == "non_finite" and verdict != "data":
            fault = failure
    return fault


def culprits_of(record: Sequence[Failure], earlier: Failure | None = None) -> frozenset[str]:
    """Return the samples common to the last two non-finite losses; none, unless the data is the cause."""
    fault = open_fault(record[:-1], earlier)
    if fault is None or _verdict(fault, record[-1]) != "data":
        return frozenset()
    return record[-1].entries & fault.entries


def left_out(record: Sequence[Failure], policy: Policy) -> set[str]:
    """Return the hosts to exclude from the next attempt: those that failed too often, for at least one attempt. A host
    that was excluded before is excluded again at its next failure."""
    failures: dict[str, int] = {}
    out: set[str] = set()
    for failure in record:
        # Who was out has been out of this attempt, and may come back in the next.
        out = set()
        host = failure.cause.host
        if host is None or failure.cause.kind not in HOST_FAULTS:
            continue
        failures[host] = failures.get(host, 0) + 1
        if failures[host] >= policy.host_failures:
            out = {host}
            failures[host] = policy.host_failures - 1
    return out


def place(hosts: Sequence[Host], usable: Collection[str], worlds: Collection[int]) -> dict[str, int] | None:
    """Return the ranks on each host for the next attempt: the largest world size valid for the recipe and the usable
    hosts, at most the hostfile's without its spares. Spares replace missing hosts. ``None``: no world is possible."""
    wanted = sum(host.slots for host in hosts if not host.spare)
    ordered = [host for spare in (False, True) for host in hosts if host.spare == spare and host.name in usable]
    room = min(wanted, sum(host.slots for host in ordered))
    world = max((world for world in worlds if 0 < world <= room), default=None)
    if world is None:
        return None
    ranks: dict[str, int] = {}
    for host in ordered:
        if world > 0:
            ranks[host.name] = min(host.slots, world)
            world -= ranks[host.name]
    return ranks


def _came_back(record: Sequence[Failure]) -> bool:
    """Tell whether the previous attempt failed at the same step with the same kind of cause."""
    if len(record) < 2:
        return False
    before, last = record[-2], record[-1]
    return before.cause.kind == last.cause.kind and last.step is not None and before.step == last.step


def _verdict(fault: Failure | None, later: Failure) -> Verdict | None:
    """Return the verdict of a later failure on an earlier non-finite loss; ``None``: undecided."""
    if fault is None or fault.step is None:
        return None
    if later.cause.kind == "non_finite" and later.entries & fault.entries and later.step == fault.step:
        return "data"
    past = later.step is not None and later.step > fault.step
    return "passing" if past or later.checkpoint >= fault.step else None


def _skipped(record: Sequence[Failure], policy: Policy, earlier: Failure | None) -> frozenset[str]:
    """Return all samples found faulty so far."""
    if policy.non_finite == "stop":
        return frozenset()
    ends = range(1, len(record) + 1)
    return frozenset(entry for end in ends for entry in culprits_of(record[:end], earlier))


def _changes(before: dict[str, int], now: dict[str, int], out: set[str]) -> list[str]:
    notes = [f"{host} is left out: it failed again and again" for host in sorted(out)]
    notes += [f"{host} takes part" for host in now if host not in before]
    if sum(before.values()) != sum(now.values()):
        notes.append(f"{sum(now.values())} ranks instead of {sum(before.values())}")
    return notes
