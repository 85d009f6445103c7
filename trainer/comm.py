"""The few collectives that the roles use, also without a process group.

Values travel as JSON: an unauthenticated peer must not be able to run code, as it could with a pickle.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitgraft.configs.errors import TrainingError


def active() -> bool:
    """Tell whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank; 0 without a group."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """Return the number of ranks; 1 without a group."""
    return dist.get_world_size() if active() else 1


def gather(value: Any) -> list[Any]:
    """Gather the values of all ranks, by rank, on every rank.

    Args:
        value: of JSON's types, and small; tuples come back as lists.
    """
    if not active() or world() == 1:
        return [value]
    own, sizes = _padded(value)
    parts = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(parts, own)
    return [_value(part, size) for part, size in zip(parts, sizes, strict=True)]


def gather_to_first(value: Any) -> list[Any] | None:
    """Gather the values of all ranks, by rank, on rank 0; return ``None`` on the others, which receive nothing.

    Args:
        value: of JSON's types; tuples come back as lists.
    """
    if not active() or world() == 1:
        return [value]
    own, sizes = _padded(value)
    parts = [torch.empty_like(own) for _ in sizes] if rank() == 0 else None
    dist.gather(own, parts, 0)
    return None if parts is None else [_value(part, size) for part, size in zip(parts, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """Return rank 0's value on every rank.

    Args:
        value: of JSON's types; what other ranks give does not matter. Tuples come back as lists.
    """
    if not active() or world() == 1:
        return value
    data = _bytes_of(value) if rank() == 0 else torch.empty(0, dtype=torch.uint8, device=_device())
    size = torch.tensor([len(data)], device=_device())
    dist.broadcast(size, 0)
    if rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=_device())
    dist.broadcast(data, 0)
    return _value(data, len(data))


def _device() -> torch.device:
    """Return the device of the group's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _bytes_of(value: Any) -> Tensor:
    data = bytearray(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass"))
    return torch.frombuffer(data, dtype=torch.uint8).to(_device())


def _value(data: Tensor, size: int) -> Any:
    return json.loads(data[:size].cpu().numpy().tobytes().decode(errors="surrogatepass"))


def _padded(value: Any) -> tuple[Tensor, list[int]]:
    """Return the value's bytes, padded to the longest of all ranks, and the length of each rank's."""
    data = _bytes_of(value)
    sizes = [torch.empty(1, dtype=torch.int64, device=_device()) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=_device()))
    lengths = [int(size) for size in sizes]
    own = torch.zeros(max(lengths), dtype=torch.uint8, device=_device())
    own[: len(data)] = data
    return own, lengths


def sum_tensor(tensor: Tensor) -> Tensor:
    """Sum the tensor over the ranks, in place."""
    if active() and world() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: list[Tensor]) -> None:
    """Broadcast rank 0's values, in place."""
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
