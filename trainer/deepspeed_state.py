"""Where DeepSpeed keeps the fp32 master weights and optimizer states of each parameter.

The only file that touches DeepSpeed's private attributes (0.19): ``_hp_mapping`` under ZeRO-1/2, ``grad_position``,
``ds_numel`` and ``ds_shape`` under ZeRO-3, the optimizer's own parameters under ZeRO-0. Its public
``safe_get_local_*`` functions see only the first parameter group under ZeRO-1/2 and nothing under ZeRO-0. Tested for
every stage in tests/runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitgraft.configs.errors import TrainingError
from vitgraft.trainer.checkpoint.layout import even_range


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: elements [start, stop) of the flattened parameter ``name`` lie in the flat fp32
    tensor ``flat`` from ``offset`` on. ``writes``: the sub-range this rank saves (all of it when sharded)."""

    name: str
    start: int
    stop: int
    flat: Tensor
    offset: int
    writes: tuple[int, int]

    def view(self, buffer: Tensor) -> Tensor:
        """The fragment's elements in ``buffer``, a tensor laid out like ``flat``; shares memory."""
        return buffer.detach().view(-1).narrow(0, self.offset, self.stop - self.start)

    def saved(self, buffer: Tensor) -> Tensor:
        """The elements that this rank writes."""
        first, last = self.writes
        return self.view(buffer).narrow(0, first - self.start, last - first)


def full_shape(parameter: nn.Parameter) -> list[int]:
    """A parameter's own shape: under ZeRO-3 its ``shape`` is empty, and DeepSpeed keeps the real one beside it."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def avoid_compilation() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective when the ranks meet on CPUs: it serves inference only,
    takes half a minute and needs a compiler. Call before ``init_distributed``."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fragments(engine: Any, names: dict[nn.Parameter, str], rank: int, world: int) -> list[Fragment]:
    """All fragments that this rank holds, in the order of ``names``.

    Args:
        engine: the DeepSpeed engine.
        names: the trained parameters of the module and their names.
        rank, world: in the data-parallel group.

    Raises:
        TrainingError: this DeepSpeed lays its state out in an unknown way.
    """
    stage = engine.zero_optimization_stage()
    try:
        if stage == 0:
            return list(_unsharded(names, rank, world))
        if stage in (1, 2):
            return list(_stage_1_2(engine.optimizer, names))
        return list(_stage_3(engine.optimizer, names, rank))
    except AttributeError as error:
        raise TrainingError(
            f"DeepSpeed keeps its ZeRO-{stage} state differently from 0.19 ({error}); see constraints.txt"
        ) from error


def _unsharded(names: dict[nn.Parameter, str], rank: int, world: int) -> Iterator[Fragment]:
    for parameter, name in names.items():
        numel = parameter.numel()
        yield Fragment(name, 0, numel, parameter, 0, even_range(numel, rank, world))


def _stage_1_2(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    for parameter, name in names.items():
        mapping = getattr(parameter, "_hp_mapping")  # noqa: B009 - unknown to the type checker
        if mapping is None:
            continue
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        if low.numel == 0:
            continue
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        stop = low.start + low.numel
        yield Fragment(name, low.start, stop, flat, high.start, (low.start, stop))


def _stage_3(optimizer: Any, names: dict[nn.Parameter, str], rank: int) -> Iterator[Fragment]:
    for parameter, name in names.items():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        numel = int(getattr(parameter, "ds_numel"))  # noqa: B009
        start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
        if start < stop:
            yield Fragment(name, start, stop, optimizer.fp32_partitioned_groups_flat[group], offset, (start, stop))


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def tensor_states(engine: Any, flat: Tensor, kinds: list[str]) -> dict[str, Tensor]:
    """The optimizer's tensor states laid out like ``flat`` (e.g. exp_avg); empty before the first step.

    Args:
        kinds: those that its class is known for: beside a 0-d parameter only their names tell them from scalars.
    """
    state = inner_optimizer(engine).state.get(flat, {})
    return {
        key: value
        for key, value in state.items()
        if torch.is_tensor(value) and value.shape == flat.shape and (key in kinds or value.dim())
    }


def scalar_states(engine: Any, flats: list[Tensor], kinds: list[str]) -> dict[str, float]:
    """The optimizer's scalar states (e.g. its step count), the same for every flat tensor; ``kinds`` are none, whatever
    their size."""
    scalars: dict[str, float] = {}
    for flat in flats:
        for key, value in inner_optimizer(engine).state.get(flat, {}).items():
            if key in kinds or (torch.is_tensor(value) and value.numel() != 1):
                continue
            if isinstance(value, int | float) or torch.is_tensor(value):
                scalars[key] = float(value)
    return scalars


def install_states(engine: Any, flats: list[Tensor], kinds: list[str], scalars: dict[str, float]) -> None:
    """Make zeroed tensor states and the given scalars: they do not exist before the first step."""
    optimizer = inner_optimizer(engine)
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for flat in flats:
        state: dict[str, Any] = {kind: _zeros_like(flat) for kind in kinds}
        # torch keeps the step count in float32: beside the parameters for a fused optimizer, else on the CPU.
        device = flat.device if fused else torch.device("cpu")
        state.update({key: torch.tensor(value, dtype=torch.float32, device=device) for key, value in scalars.items()})
        optimizer.state[flat] = state


def _zeros_like(flat: Tensor) -> Tensor:
    """Zeros that cost nothing before they are written: torch's own would be touched twice in a restore."""
    if flat.device.type != "cpu" or flat.dtype != torch.float32:
        return torch.zeros_like(flat, requires_grad=False)
    return torch.from_numpy(np.zeros(tuple(flat.shape), np.float32))
