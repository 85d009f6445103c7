"""Tiny recipes and data sets, and the command line run as a user would run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

DETECTION_HEAD = {
    "name": "mask_rcnn",
    "anchor_sizes": [16, 32, 64],
    "rpn_batch": 32,
    "rpn_proposals": 50,
    "roi_batch": 16,
    "box_channels": 32,
    "mask_channels": 16,
    "mask_convs": 1,
}
SEMANTIC_HEAD = {"name": "upernet", "channels": 16, "pool_scales": [1, 2], "dropout": 0.0}
VIDEO_HEAD = {"name": "video_transformer", "embed_dim": 32, "depth": 1, "num_heads": 2, "grid": 2}
PYRAMID = {"name": "simple_pyramid", "channels": 16, "strides": [4, 8, 16], "norm": "syncbn"}


def tiny_recipe(task: str, train: Path | str, val: Path | str | None = None, **settings: Any) -> dict[str, Any]:
    """A recipe that trains in seconds. ``settings``: dotted keys (with __ for .) to set, e.g. train__zero_stage=3."""
    head = {"detection": DETECTION_HEAD, "semantic": SEMANTIC_HEAD, "video": VIDEO_HEAD}[task]
    adapter = {"name": "adaptformer", "bottleneck": 8} if task == "video" else PYRAMID
    side = 64 if task == "video" else 128
    tree: dict[str, Any] = {
        "name": f"tiny-{task}",
        "model": {
            "backbone": {"name": "vit", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
            "adapter": dict(adapter),
            "head": dict(head),
        },
        "data": {
            "train": {"path": str(train)},
            "val": None if val is None else {"path": str(val)},
            "image_size": [side, side],
            "clip": {"frames": 4, "sampling": "uniform"},
            # Loader processes cost seconds to start; tests that are about them ask for them.
            "workers": 0,
        },
        "train": {
            "steps": 20,
            "global_batch": 4,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "clip_grad": 1.0,
            "checkpoint": {"every_steps": 3, "keep_last": 2},
        },
        "evaluate": {"batch": 4, "every_checkpoints": 100, "pictures": 2},
        # Failures end a run at once: tests of restarts ask for them.
        "launch": {"processes": 2, "device": "cpu", "threads": 1, "max_restarts": 0},
    }
    for key, value in settings.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    """The recipe as a YAML file."""
    path.write_text(yaml.safe_dump(tree))
    return path


def vitgraft(*arguments: str | Path, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; nothing is checked."""
    return subprocess.run(
        [executable(), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def executable() -> str:
    """The installed console script."""
    return str(Path(sys.executable).with_name("vitgraft"))


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command line as the leader of a process group."""
    return subprocess.Popen(
        [executable(), *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def succeed(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line and fail the test, with its output, unless it succeeds."""
    done = vitgraft(*arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def train(recipe: Path | str, run: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Train to the end."""
    return succeed("train", recipe, "--run-dir", run, *arguments, timeout=timeout)


def rows(run: Path) -> int:
    """Complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def history(run: Path) -> dict[int, dict[str, Any]]:
    """The row of metrics.jsonl that counts for each step: the last one."""
    last: dict[int, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        last[row["step"]] = row
    return last


def losses(run: Path) -> list[str]:
    """loss_hex of each step, in order."""
    found = history(run)
    return [found[step]["loss_hex"] for step in sorted(found)]


def audited_entries(run: Path) -> dict[int, list[list[int]]]:
    """The entries (epoch, sample, repetition) of each step by RUN/ledger, sorted: those of the last attempt that
    trained it, over its ranks and micro-steps."""
    found: dict[int, dict[str, list[list[int]]]] = {}
    for path in (run / "ledger").iterdir():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # a kill may have torn the last one
                row = json.loads(line)
                found.setdefault(row["step"], {}).setdefault(path.name.split(".")[0], []).extend(row["entries"])
    return {step: sorted(attempts[max(attempts)]) for step, attempts in sorted(found.items())}


def wait_until(condition: Any, seconds: float = 120, process: subprocess.Popen[str] | None = None) -> None:
    """Poll until ``condition()`` holds; fails when the time is over or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.communicate() if process else None
        time.sleep(0.01)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL the whole process group, as a cluster does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def pids(run: Path, module: str) -> list[int]:
    """Live processes of a role of this run, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"vitgraft.trainer.{module}\0" in line and str(run) in line and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def processes_naming(text: str | Path) -> list[str]:
    """Command lines of live processes that mention ``text``: strays, when there should be none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if str(text) in line and state != "Z":
                found.append(line)
    return found
