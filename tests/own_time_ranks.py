"""What each process of the test of ranks' own time runs: importable by name, as a spawned process needs it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from vitgraft.trainer.own_time import HostClock, watch_waits

BEFORE_S, AFTER_S = 0.05, 0.03
STEPS = 6


def rank_main(rank: int, folder: str, world: int) -> None:
    """Steps in which rank 1 is slow before a collective inside the forward pass, and again behind the meeting."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    clock, own = HostClock(), []
    watch_waits()  # a second time: nothing is measured twice
    gathered = torch.zeros(world)
    for _ in range(STEPS):
        clock.start()
        time.sleep(BEFORE_S * (rank == 1))
        dist.all_reduce(torch.zeros(8))  # as synchronised BatchNorm does, and ZeRO-3
        own.append(clock.meet())
        handle = dist.all_reduce(torch.zeros(1), async_op=True)
        time.sleep(AFTER_S * (rank == 1))
        handle.wait()
        dist.all_gather_into_tensor(gathered, torch.ones(1))
        clock.stop()
        time.sleep(0.02)  # a checkpoint
    Path(folder, f"{rank}.json").write_text(json.dumps(own))
    dist.destroy_process_group()
