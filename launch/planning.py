"""Plan of an attempt: ranks, device, threads and the evaluator's host, from the hosts' facts. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema import Recipe
from vitgraft.configs.units import counted
from vitgraft.launch.evaluator import evaluator_device
from vitgraft.launch.gang import EvaluatorOrder

Facts = Mapping[str, Mapping[str, Any]]
"""Facts of the hosts from their agents, by host."""


@dataclass(frozen=True)
class Plan:
    """Placement of the ranks and the evaluator in an attempt.

    ``ranks``: number on each host, in the order of the ranks. ``threads``: of each rank; ``why``: reason for their
    number, where it was not the cores alone; ``note``: warning that the hosts' own numbers differ. ``evaluator``: its
    host, device and threads.
    """

    ranks: Mapping[str, int]
    device: str
    threads: int
    evaluator: tuple[str, EvaluatorOrder] | None = None
    why: str | None = None
    note: str | None = None

    def numbers(self) -> dict[str, list[int]]:
        """Return the ranks of each host."""
        found, first = {}, 0
        for host, count in self.ranks.items():
            found[host] = list(range(first, first + count))
            first += count
        return found

    @property
    def world(self) -> int:
        """All ranks."""
        return sum(self.ranks.values())


def evaluator_host(recipe: Recipe, ranks: Mapping[str, int]) -> str | None:
    """Return the host of the recipe's evaluator, by default the first; ``None``: it has none."""
    return None if recipe.evaluator is None else recipe.evaluator.host or next(iter(ranks))


def plan_attempt(
    recipe: Recipe,
    ranks: Mapping[str, int],
    gpus: Callable[[str, int], Sequence[int]],
    facts: Facts,
    evaluator: str | None,
    asked: int | None = None,
) -> Plan:
    """Return the plan of an attempt with so many ``ranks`` on each host.

    Args:
        gpus: those that so many ranks of a host would use.
        evaluator: its host; ``None``: none is started.
        asked: threads that the user's environment asks for.

    Raises:
        ConfigError: a host has not the GPUs that it should have, or the precision needs one.
    """
    slots = {host: gpus(host, count) for host, count in ranks.items() if count}
    poor = [host for host in slots if facts[host]["gpus"] <= max(slots[host])]
    # Where only some hosts have enough GPUs, the run does not fall back to the CPU, which would be far too slow: a
    # fault of one host or a mistake in a hostfile is an error.
    some = recipe.launch.device == "auto" and any(facts[host]["gpus"] for host in slots)
    if poor and (recipe.launch.device == "cuda" or some):
        host = poor[0]
        raise ConfigError(
            f"launch.device: {recipe.launch.device}, but {host} has {facts[host]['gpus']} GPUs for {ranks[host]} ranks "
            f"(slots {','.join(map(str, slots[host]))}); correct its slots, or launch.device: cpu"
        )
    device = "cpu" if recipe.launch.device == "cpu" or poor else "cuda"
    if recipe.train.precision == "bf16_params" and device == "cpu":
        raise ConfigError("train.precision: bf16_params needs a GPU; use bf16, which runs on a CPU too")
    threads, why, note = _threads(recipe, {host: ranks[host] for host in slots}, facts, asked)
    if evaluator is None:
        return Plan(ranks, device, threads, None, why, note)
    wanted, said = recipe.evaluator, facts[evaluator]
    assert wanted is not None
    taken = slots.get(evaluator, ()) if device == "cuda" else ()
    order = EvaluatorOrder(
        device=evaluator_device(wanted.device, said["gpus"], taken),
        threads=wanted.threads or asked or max(1, said["cores"] // (ranks.get(evaluator, 0) + 1)),
    )
    return Plan(ranks, device, threads, (evaluator, order), why, note)


def _threads(
    recipe: Recipe, ranks: Mapping[str, int], facts: Facts, asked: int | None
) -> tuple[int, str | None, str | None]:
    """Return the number, the reason for it, and a note."""
    if recipe.launch.threads is not None:
        return recipe.launch.threads, "launch.threads", None
    if asked is not None:
        return asked, "OMP_NUM_THREADS", None
    possible = {host: max(1, facts[host]["cores"] // count) for host, count in ranks.items()}
    least, most = min(possible, key=possible.__getitem__), max(possible, key=possible.__getitem__)
    quota = facts[least].get("quota")
    why = f"{least} has a CPU quota of {quota:g} cores" if quota is not None else None
    note = None
    if possible[least] != possible[most]:
        note = (
            f"{least} has cores for {counted(possible[least], 'thread')} a rank, {most} for {possible[most]}: all "
            f"ranks use {possible[least]}; launch.threads sets another number"
        )
    return possible[least], why, note


def difference_of(before: Mapping[str, Any], plan: Plan) -> str | None:
    """Return how an attempt differs from the one that wrote its checkpoint, where that changes the last bits of sums;
    ``None``: no difference. ``before``: the event ``start`` of that attempt."""
    now = {"world": plan.world, "device": plan.device, "threads": plan.threads}
    if any(before.get(key) is None for key in now):
        return None  # of another version, or torn
    if now["device"] == before["device"] != "cpu":
        now["threads"] = before["threads"]  # a GPU's sums are its own
    if all(before[key] == value for key, value in now.items()):
        return None

    def said(of: Mapping[str, Any]) -> str:
        return f"{counted(of['world'], 'rank')} on {of['device']} with {counted(of['threads'], 'thread')} each"

    keep = "; launch.threads keeps a number" if before["threads"] != now["threads"] else ""
    return (
        f"this attempt has {said(now)}, the one that wrote its checkpoint {said(before)}: the samples are the same, "
        f"the last bits of losses are not{keep}"
    )
