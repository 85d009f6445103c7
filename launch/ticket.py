"""What DeepSpeed's launcher starts for each rank: ``python -m vitgraft.launch.ticket --agent NAME``.

It hands the environment that the launcher has made (rank, world, where to meet, devices) to this host's agent, which
starts the rank with it, and lives as long as the agent wants. So ranks and world are the launcher's, and start, end and
exit codes the supervisor's: the launcher ends others when one fails, and is told nothing of how they end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys

HANDED_ON = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
    "CUDA_VISIBLE_DEVICES",
)


def main(arguments: list[str] | None = None) -> int:
    """Hand the environment over and wait for the end; always 0: failures are the supervisor's to tell."""
    parser = argparse.ArgumentParser(prog="python -m vitgraft.launch.ticket", description=__doc__)
    parser.add_argument("--agent", required=True, help="name of the agent's socket")
    parser.add_argument("--local_rank", default=None, help="accepted from DeepSpeed's launcher")
    options = parser.parse_args(arguments)
    environment = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
        connection.connect(f"\0{options.agent}")
        connection.sendall((json.dumps({"environment": environment}) + "\n").encode())
        while connection.recv(1 << 12):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
