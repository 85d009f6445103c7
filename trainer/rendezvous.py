"""Rendezvous of the ranks: one store of torch, on rank 0's host.

torch would listen there on all interfaces. Whoever reaches a store can read and change what the ranks tell each other,
so this one listens at the address of MASTER_ADDR alone: the loopback for a run on one host, else the interface by which
the other hosts come.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vitgraft.configs.errors import TrainingError

_BACKLOG = 4096
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def join(backend: str) -> None:
    """Form the group of ranks that the environment describes, for torch and DeepSpeed.

    Args:
        backend: ``gloo`` or ``nccl``.

    Raises:
        TrainingError: the port is taken.
    """
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    from vitgraft.trainer.deepspeed_state import avoid_compilation

    avoid_compilation()
    # torchrun keeps the store itself; without the variables DeepSpeed looks whether MPI has started this.
    others = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not others and all(name in os.environ for name in _NEEDED):
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        meeting = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = open_store(meeting, rank, world, default_pg_timeout, several_hosts=here < world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=default_pg_timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def open_store(meeting: tuple[str, int], rank: int, world: int, patience: timedelta, *, several_hosts: bool) -> Any:
    """Open the store at an address and port, where rank 0 serves it.

    Raises:
        TrainingError: the port is taken.
    """
    listener = listen(*meeting, several_hosts=several_hosts).detach() if rank == 0 else None
    return dist.TCPStore(  # type: ignore[attr-defined]
        *meeting, world, is_master=rank == 0, timeout=patience, master_listen_fd=listener
    )


def listen(address: str, port: int, *, several_hosts: bool) -> socket.socket:
    """Listen where other ranks look for this one.

    Args:
        address: IP address or name of this host. Where it is none of this host's addresses, as behind a service or a
            router, or is a name that means the loopback here while ranks on other hosts look for it, all interfaces
            are listened on.

    Raises:
        TrainingError: the port is taken.
    """
    try:
        for family, _, _, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
            if several_hosts and place[0] != address and ipaddress.ip_address(place[0]).is_loopback:
                continue
            try:
                # Bound once without listening: an address of another host is no reason to end.
                with socket.socket(family) as probe:
                    probe.bind((place[0], 0, *place[2:]))
            except OSError:
                continue
            return socket.create_server(place, family=family, backlog=_BACKLOG)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        text = f"rank 0 cannot listen at {address}:{port}: {error.strerror or error}"
        raise TrainingError(f"{text}; start again, or set launch.port to a free one", cause="lost_peers") from None
