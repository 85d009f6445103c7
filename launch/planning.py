"""Who does what in an attempt: ranks, device, threads, the evaluator's place, from what hosts have. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema import Recipe
from vitgraft.launch.evaluator import evaluator_device
from vitgraft.launch.gang import EvaluatorOrder

Facts = Mapping[str, Mapping[str, Any]]
"""What agents said of their hosts, by host."""


@dataclass(frozen=True)
class Plan:
    """Who does what in an attempt. ``ranks``: how many on each host, in the order of their numbers. ``evaluator``: its
    host and what it uses there."""

    ranks: Mapping[str, int]
    device: str
    threads: int
    evaluator: tuple[str, EvaluatorOrder] | None = None

    def numbers(self) -> dict[str, list[int]]:
        """The ranks of each host."""
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
    """Where the recipe wants its evaluator; ``None``: it has none."""
    return None if recipe.evaluator is None else recipe.evaluator.host or next(iter(ranks))


def plan_attempt(
    recipe: Recipe,
    ranks: Mapping[str, int],
    gpus: Callable[[str, int], Sequence[int]],
    facts: Facts,
    evaluator: str | None,
) -> Plan:
    """The plan of an attempt with so many ``ranks`` on each host.

    Args:
        gpus: those that so many ranks of a host would use.
        evaluator: its host; ``None``: none is started.

    Raises:
        ConfigError: a host has not the GPUs that it should have, or the precision needs one.
    """
    slots = {host: gpus(host, count) for host, count in ranks.items() if count}
    poor = [host for host in slots if facts[host]["gpus"] <= max(slots[host])]
    # Where only some have what they need, the run would be far slower than anybody wants: no host's trouble, and no
    # mistake in a hostfile, turns all to the CPU.
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
    threads = recipe.launch.threads or max(1, min(facts[host]["cores"] // ranks[host] for host in slots))
    if evaluator is None:
        return Plan(ranks, device, threads)
    taken = slots.get(evaluator, ()) if device == "cuda" else ()
    return Plan(ranks, device, threads, (evaluator, _order(recipe, facts[evaluator], taken, ranks.get(evaluator, 0))))


def _order(recipe: Recipe, facts: Mapping[str, Any], taken: Sequence[int], ranks: int) -> EvaluatorOrder:
    wanted = recipe.evaluator
    assert wanted is not None
    device = evaluator_device(wanted.device, facts["gpus"], taken)
    return EvaluatorOrder(device=device, threads=wanted.threads or max(1, facts["cores"] // max(1, ranks + 1)))
