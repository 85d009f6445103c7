"""A small registry: what a recipe calls by name, built from its section of the recipe.

``vitgraft.models.build`` imports every module that registers something; a user's own module does the same by importing
``register`` and being imported before the model is built.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

from vitgraft.configs.errors import ConfigError

Kind = Literal["backbone", "graft", "adapter", "neck", "head"]
"""backbone: the trunk; graft: changes the trunk's blocks in place; adapter: makes maps of trunk and images; neck: makes
maps of maps; head: reads them."""

T = TypeVar("T", bound=Callable[..., Any])

_FACTORIES: dict[Kind, dict[str, Callable[..., Any]]] = {kind: {} for kind in get_args(Kind)}


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Register a class or function that is called as ``factory(config, **context)``.

    Raises ``ConfigError`` when the name is taken by something else.
    """

    def decorate(factory: T) -> T:
        if _FACTORIES[kind].setdefault(name, factory) is not factory:
            raise ConfigError(f"{kind} {name!r} is registered twice; give one of them another name")
        return factory

    return decorate


def names(kind: Kind) -> list[str]:
    """The registered names of one kind, sorted."""
    return sorted(_FACTORIES[kind])


def build(kind: Kind, config: Any, **context: Any) -> Any:
    """Build the module registered as ``config.name`` from its section of the recipe and the builder's context.

    Raises ``ConfigError`` for an unknown name, with the nearest known one.
    """
    factory = _FACTORIES[kind].get(config.name)
    if factory is None:
        near = difflib.get_close_matches(config.name, names(kind), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names(kind))}"
        raise ConfigError(f"model.{kind}: unknown name {config.name!r}; {hint}")
    return factory(config, **context)
