"""Devices of this host, found without importing torch (which takes seconds)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.cores import asked_threads, deciding_quota, usable_cores
from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema import Recipe
from vitgraft.configs.worlds import check_world


@dataclass(frozen=True)
class Placement:
    """Device and number of ranks."""

    device: str
    processes: int


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that a process started here may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()])
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def place(recipe: Recipe, processes: int | None) -> Placement:
    """Choose device and ranks.

    Raises:
        ConfigError: no such device, or a world that cannot carry the global batch.
    """
    launch, gpus = recipe.launch, count_gpus()
    if launch.device == "cuda" and gpus == 0:
        raise ConfigError("launch.device: cuda, but no GPU is visible on this host; use device: auto or cpu")
    device = "cpu" if launch.device == "cpu" or gpus == 0 else "cuda"
    if recipe.train.precision == "bf16_params" and device == "cpu":
        raise ConfigError("train.precision: bf16_params needs a GPU; use bf16, which runs on a CPU too")
    wanted = processes or launch.processes or (gpus if device == "cuda" else 2)
    if device == "cuda" and processes is None:
        wanted = min(wanted, gpus)
    if device == "cuda" and wanted > gpus:
        raise ConfigError(f"--processes {wanted}: this host has {gpus} visible GPUs; one rank needs one GPU")
    check_world(recipe.train.global_batch, recipe.train.accumulation, wanted)
    return Placement(device, wanted)


def limit_threads() -> None:
    """Keep torch's threads in this process to the CPU quota of its container, of which torch knows nothing; a user's
    OMP_NUM_THREADS it takes by itself."""
    if asked_threads(os.environ) is None and deciding_quota() is not None:
        import torch

        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
