"""What each process of the test of collectives runs: importable by name, as a spawned process needs it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vitgraft.trainer import comm
from vitgraft.trainer.rendezvous import join

VALUES: list[Any] = [None, {"ä": [1, 2.5, True, None], "path": "a\udcff"}, "x" * 70_000]


def rank_main(rank: int, world: int, port: int, folder: str) -> None:
    """Give values of very different sizes to each collective, where nothing can be unpickled."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    join("gloo")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    pickle.loads = pickle.load = pickle.Unpickler = refuse  # type: ignore[assignment, misc]
    seen: dict[str, Any] = {
        "gather": comm.gather(VALUES[rank]),
        "gather_to_first": comm.gather_to_first(VALUES[rank]),
        "from_first": comm.from_first(VALUES[1] if rank == 0 else "of no interest"),
    }
    comm.agree({"step": 1})
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    comm.barrier()
    dist.destroy_process_group()
