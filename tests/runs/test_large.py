"""ViT-L with ViT-Adapter for real: two optimizer steps on two processes, whatever ZeRO stage and recomputation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vitgraft.launch.local import free_port

# Each pair differs in stage and recomputation at once, and must give the same losses.
CASES: list[dict[str, Any]] = [
    {"stage": 2, "frozen": False, "recompute": "none"},
    {"stage": 3, "frozen": False, "recompute": "full"},
    {"stage": 2, "frozen": True, "recompute": "full"},
    {"stage": 3, "frozen": True, "recompute": "none"},
]
REST = [{**case, "stage": 5 - case["stage"]} for case in CASES]


def run(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    script = Path(__file__).parents[1] / "large_ranks.py"
    port = str(free_port(0))
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        with (folder / f"rank-{rank}.log").open("w") as log:
            command = [sys.executable, str(script), json.dumps(cases)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    output = (folder / "rank-0.log").read_text()
    assert codes == [0, 0], output[-3000:]
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]


def check(results: list[dict[str, Any]]) -> None:
    for frozen in (False, True):
        ours = [result for result in results if result["case"]["frozen"] == frozen]
        for other in ours[1:]:
            assert other["losses"] == pytest.approx(ours[0]["losses"], rel=1e-4)
        # The second loss comes after an update.
        assert ours[0]["losses"][1] != ours[0]["losses"][0]
    # ViT-L is 303 million; ViT-Adapter-L's 23.24 million and the head's are trained either way.
    trained = {result["case"]["frozen"]: result["trained"] for result in results}
    assert 300e6 < trained[False] - trained[True] < 305e6
    assert 23e6 < trained[True] < 27e6


@pytest.mark.slow
def test_vit_large_with_vit_adapter(tmp_path: Path) -> None:
    results = run(CASES, tmp_path)
    assert len(results) == len(CASES)
    check(results)


@pytest.mark.soak
def test_every_combination(tmp_path: Path) -> None:
    check(run(CASES + REST, tmp_path))
