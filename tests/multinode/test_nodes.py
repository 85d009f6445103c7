"""One command on each of two hosts, as a scheduler starts them: a node that comes late, dies and comes again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from multinode.campaign import recipe_of
from multinode.namespaces import HostProcess, Network, wait_for
from support import executable, losses, rows, train, write_recipe

LATE_S = 3.0


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks on one host, without any fault."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(write_recipe(folder / "recipe.yaml", recipe_of(data, train__steps=24)), folder / "run", "--processes", "2")
    return folder / "run"


@pytest.mark.soak
def test_nodes_that_come_and_go(hosts: Network, tmp_path: Path, data: Path, unbroken: Path) -> None:
    recipe, run = write_recipe(tmp_path / "recipe.yaml", recipe_of(data, train__steps=24)), tmp_path / "run"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    leader = hosts.hosts["host1"].address

    def start(node: int) -> HostProcess:
        place = ["--nodes", "2", "--node-rank", str(node), "--leader", leader, "--processes", "1"]
        command = [executable(), "train", recipe, "--run-dir", run, *place]
        return hosts.hosts[f"host{node + 1}"].start(*command, environment=environment, cwd=tmp_path)

    first = start(0)
    time.sleep(LATE_S)
    second = start(1)
    wait_for(lambda: rows(run) >= 6, "6 steps", 90)
    second.signal(signal.SIGKILL)
    second.finish(10)
    again = start(1)
    wait_for(lambda: '"attempt": 2' in (run / "metrics.jsonl").read_text(), "the second attempt", 90)
    # The scheduler's signal reaches any node; the leader has all of them stop.
    again.signal(signal.SIGUSR1)
    ends = [process.finish(60) for process in (first, again)]
    assert [end[0] for end in ends] == [75, 75], ends
    nodes = [start(1), start(0)]
    ends = [process.finish(120) for process in nodes]
    assert [end[0] for end in ends] == [0, 0], ends
    assert losses(run) == losses(unbroken)
    for host in hosts.hosts.values():
        assert host.running(str(run)) == []
