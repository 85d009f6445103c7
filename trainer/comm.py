"""The few collectives that the roles use, also without a process group."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from vitgraft.configs.errors import TrainingError

T = TypeVar("T")


def active() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """The number of ranks; 1 without a group."""
    return dist.get_world_size() if active() else 1


def gather(value: T) -> list[T]:
    """Everyone's value, by rank, on every rank (small objects of our own processes)."""
    if not active() or world() == 1:
        return [value]
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_tensor(tensor: Tensor) -> Tensor:
    """The tensor summed over the ranks, in place."""
    if active() and world() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: list[Tensor]) -> None:
    """Rank 0's values for everyone, in place."""
    if active() and world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def barrier() -> None:
    """Wait for all ranks."""
    if active() and world() > 1:
        dist.barrier()


def agree(what: dict[str, str | int | None]) -> None:
    """Fail unless all ranks hold the same facts (run directory, step, recipe hash, fingerprint).

    Raises:
        TrainingError: names the first difference.
    """
    for other, facts in enumerate(gather(what)):
        for key, value in what.items():
            if facts[key] != value:
                raise TrainingError(
                    f"rank {rank()} has {key} {value!r}, rank {other} has {facts[key]!r}; start all ranks alike"
                )
