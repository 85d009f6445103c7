"""Parameter groups by ordered rules (regular expression → multiplier, decay, frozen) and layer-wise decay. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.train import TrainConfig


@dataclass(frozen=True)
class ParameterFacts:
    """What the rules look at: a parameter's name and number of dimensions."""

    name: str
    dimensions: int


@dataclass(frozen=True)
class Group:
    """Parameters with the same learning-rate multiplier and weight decay."""

    names: tuple[str, ...]
    lr_multiplier: float
    weight_decay: float


def frozen_names(config: TrainConfig, names: Iterable[str]) -> set[str]:
    """Names that the rules freeze (the trunk's own ``frozen`` key is applied by the model)."""
    frozen = set()
    for name in names:
        for rule in config.param_groups:
            if rule.frozen is not None and re.search(rule.match, name):
                frozen.discard(name)
                if rule.frozen:
                    frozen.add(name)
    return frozen


def make_groups(
    config: TrainConfig, parameters: Sequence[ParameterFacts], layer_of: Callable[[str], int], depth: int
) -> list[Group]:
    """Groups of the trained parameters, in the order in which they first occur.

    Biases, norms and other one-dimensional parameters do not decay; ``layer_decay`` multiplies the learning rate of
    layer ``i`` by rate ** (depth + 1 - i); then the rules of ``param_groups`` in order, later ones winning.
    """
    members: dict[tuple[float, float], list[str]] = {}
    for parameter in parameters:
        multiplier = 1.0
        decay = config.optimizer.weight_decay if parameter.dimensions > 1 else 0.0
        if config.layer_decay is not None:
            multiplier = config.layer_decay ** (depth + 1 - layer_of(parameter.name))
        for rule in config.param_groups:
            if re.search(rule.match, parameter.name):
                multiplier = multiplier if rule.lr_multiplier is None else rule.lr_multiplier
                decay = decay if rule.weight_decay is None else rule.weight_decay
        members.setdefault((multiplier, decay), []).append(parameter.name)
    return [Group(tuple(names), multiplier, decay) for (multiplier, decay), names in members.items()]


def check_rules(config: TrainConfig, names: Iterable[str]) -> None:
    """Refuse expressions that match no parameter: a typing error that would otherwise pass unseen.

    Raises:
        ConfigError: names the first such expression.
    """
    known = list(names)
    for rule in config.param_groups:
        if not any(re.search(rule.match, name) for name in known):
            raise ConfigError(
                f"train.param_groups: {rule.match!r} matches no parameter; names look like {known[0]}, {known[-1]}"
            )
