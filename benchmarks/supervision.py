"""What supervision costs a step, and how long a run stands still after a fault.

Overhead: a real run of two ranks on this host. What supervisor and agent compute while it trains is the processor time
that they take from the ranks; a rank's own share (what it tells its heart, and what that sends every second) is timed
call by call. Both against the time of a step.

Recovery: a rank is killed by SIGKILL in the middle of such a run; until the first new step of the next attempt, against
the time from the command to the first step of the first attempt, most of which is imports.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from common.measure import machine, spread, write
from rich.console import Console
from rich.table import Table

from vitgraft.trainer.heartbeat import BEAT_S, Heart
from vitgraft.trainer.report import Reporter

STEPS, ROUNDS, BOUND = 200, 3, 0.005
CALLS = 20_000
VITGRAFT = Path(sys.executable).with_name("vitgraft")


def recipe(folder: Path) -> Path:
    """Steps of about a third of a second on two cores: short, so that what a step costs weighs more than it would."""
    data = folder / "data"
    pack = ["shards", "pack", "digits", "--task", "semantic", "--split", "train", "--samples", "64", "--out", str(data)]
    subprocess.run([VITGRAFT, *pack], check=True, capture_output=True)
    tree: dict[str, Any] = {
        "name": "supervision",
        "model": {
            "backbone": {"name": "vit", "embed_dim": 64, "depth": 4, "num_heads": 2, "patch_size": 8},
            "adapter": {"name": "simple_pyramid", "channels": 32, "strides": [4, 8, 16], "norm": "syncbn"},
            "head": {"name": "upernet", "channels": 32, "pool_scales": [1, 2]},
        },
        "data": {"train": {"path": str(data)}, "image_size": [128, 128], "workers": 0},
        "train": {
            "steps": STEPS,
            "global_batch": 8,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "checkpoint": {"every_steps": 20, "keep_last": 2},
        },
        "launch": {"processes": 2, "device": "cpu", "threads": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    """The steps so far."""
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def supervising(leader: psutil.Process) -> float:
    """Processor seconds of the supervisor and its agent so far."""
    own = [leader, *(child for child in leader.children() if "launch.agent" in " ".join(child.cmdline()))]
    return sum(sum(process.cpu_times()[:2]) for process in own)


def one_run(path: Path, run: Path) -> dict[str, float]:
    """Train; kill a rank after half of the steps."""
    started = time.monotonic()
    with (run.parent / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen([VITGRAFT, "train", str(path), "--run-dir", str(run)], stdout=log, stderr=log)
        leader = psutil.Process(process.pid)
        while not rows(run):
            time.sleep(0.02)
        cold = time.monotonic() - started
        before, since, first = supervising(leader), time.monotonic(), len(rows(run))
        while len(rows(run)) < STEPS // 2:
            time.sleep(0.5)
        taken, seconds, steps = supervising(leader) - before, time.monotonic() - since, len(rows(run)) - first
        agent = next(child for child in leader.children() if "launch.agent" in " ".join(child.cmdline()))
        rank = next(child for child in agent.children() if "trainer.rank" in " ".join(child.cmdline()))
        os.kill(rank.pid, signal.SIGKILL)
        killed = time.monotonic()
        while max((row["attempt"] for row in rows(run)), default=1) < 2:
            time.sleep(0.02)
        recovery = time.monotonic() - killed
        code = process.wait()
    if code != 0 or max(row["step"] for row in rows(run)) != STEPS:
        raise RuntimeError(f"the run did not recover; see {run.parent / run.name}.log")
    return {"cold": cold, "recovery": recovery, "step": seconds / steps, "cpu_per_step": taken / steps}


def heart_seconds() -> float:
    """What a step tells the heart, timed."""
    heart = Heart(Reporter(os.open(os.devnull, os.O_WRONLY)))
    started = time.perf_counter()
    for step in range(CALLS):
        heart.enter("step", step)
        heart.own_seconds([0.1, 0.1])
    return (time.perf_counter() - started) / CALLS


def beat_seconds() -> float:
    """What the heart's own thread takes for a sign of life."""
    reporter = Reporter(os.open(os.devnull, os.O_WRONLY))
    heart = Heart(reporter)
    started = time.perf_counter()
    for _ in range(CALLS):
        heart.enter("step", 1)
        heart.own_seconds([0.1, 0.1])
        reporter.state(heart.message())
    return (time.perf_counter() - started) / CALLS


def main() -> int:
    """Measure, print and write; 1 when the bound is not kept."""
    with tempfile.TemporaryDirectory() as temporary:
        path = recipe(Path(temporary))
        runs = [one_run(path, Path(temporary) / f"run-{number}") for number in range(ROUNDS)]
    heart, beat = heart_seconds(), beat_seconds()
    # Two ranks on two cores: what others compute, the ranks wait for.
    overhead = [(run["cpu_per_step"] / 2 + heart) / run["step"] + beat / BEAT_S for run in runs]
    recovery = [run["recovery"] / run["cold"] for run in runs]
    figures = {
        "share of a step that supervision takes": overhead,
        "fault to first new step, s": [run["recovery"] for run in runs],
        "command to first step, s": [run["cold"] for run in runs],
        "recovery / cold start": recovery,
    }
    step = statistics.median(run["step"] for run in runs)
    table = Table(title=f"Supervision of two ranks: {ROUNDS} runs of {STEPS} steps of {step:.2f} s")
    for column in ("figure", "median", "min", "max"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, values in figures.items():
        table.add_row(name, *(f"{spread(values)[key]:.4g}" for key in ("median", "min", "max")))
    Console(width=120).print(table)
    summary = {
        "what": "supervision's share of a step; seconds without training after a rank was killed",
        "rounds": ROUNDS,
        "step_s": step,
        "heart_s": heart,
        "beat_s": beat,
        "bound": BOUND,
        "kept": statistics.median(overhead) <= BOUND,
        "cases": {name: spread(values) for name, values in figures.items()},
        **machine("torch", "deepspeed"),
    }
    write("supervision", summary)
    return 0 if summary["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
