"""World sizes that are valid for a recipe's batch."""

from __future__ import annotations

from vitgraft.configs.errors import ConfigError

LARGEST = 4096


def possible_worlds(global_batch: int, accumulation: int) -> list[int]:
    """World sizes that can carry the global batch: it is cut by accumulation first, then over ranks."""
    micro = global_batch // accumulation
    return [world for world in range(1, min(micro, LARGEST) + 1) if micro % world == 0]


def check_world(global_batch: int, accumulation: int, world: int, *, why: str = "") -> None:
    """Check that a world size is valid for the global batch. ``why``: begins the message, e.g. with the option that
    asked for it.

    Raises:
        ConfigError: lists the worlds that can.
    """
    worlds = possible_worlds(global_batch, accumulation)
    if world not in worlds:
        raise ConfigError(
            f"{why}a world of {world} cannot carry global_batch {global_batch} with accumulation {accumulation}; "
            f"possible worlds: {', '.join(map(str, worlds))}"
        )
