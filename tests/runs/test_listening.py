"""What a run on one host opens to the network: nothing."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import psutil
from support import pids, rows, start, tiny_recipe, wait_until, write_recipe


def test_a_run_on_one_host_listens_on_the_loopback_alone(semantic_data: Path, tmp_path: Path) -> None:
    """torch's store would listen on all interfaces, and gloo at the address of the host's name."""
    run = tmp_path / "run"
    recipe = tiny_recipe("semantic", semantic_data / "train", data__workers=1, train__steps=100_000)
    command = start("train", write_recipe(tmp_path / "recipe.yaml", recipe), "--run-dir", run)
    try:
        wait_until(lambda: rows(run) >= 2, process=command)
        family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
        bound = {
            connection.laddr.ip: process.name()
            for process in family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN or not connection.raddr
        }
        assert bound  # the ranks do meet
        assert len(pids(run, "rank")) == 2
        assert [address for address in bound if not ip_address(address).is_loopback] == []
    finally:
        command.terminate()
        command.communicate(timeout=60)
    assert command.returncode == 75
