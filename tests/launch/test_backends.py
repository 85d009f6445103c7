"""The ways to start ranks on the hosts of a hostfile: DeepSpeed's launcher from outside, and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import wait_until
from support_writers import make_run

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.backends import Backend, DeepSpeedLauncher, HostfileBackend, LaunchOrder
from vitgraft.launch.deepspeed_launch import Meeting
from vitgraft.launch.run_dir import RunHandle, open_run
from vitgraft.launch.training import Where, _backend
from vitgraft.launch.ui import Screen

# As pdsh does, which gives each of its ssh a session of its own.
RUNNER = "setsid sleep 600 & setsid sleep 600 & echo started; wait"


def started(variables: Path) -> subprocess.Popen[bytes]:
    """Stands for the runner; reads as started when its processes are."""
    process = subprocess.Popen(
        ["sh", "-c", RUNNER],
        env={"PATH": os.environ["PATH"], "DS_ENV_FILE": str(variables)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    return process


def sleepers(variables: Path) -> list[str]:
    """Processes that were started with this file of variables."""
    wanted = f"DS_ENV_FILE={variables}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_no_ssh_outlives_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is ended, or was killed before; those of another run stay."""
    monkeypatch.setattr("vitgraft.launch.backends.FAREWELL_S", 0.1)
    other = started(tmp_path / "environment.10")
    for kill in (False, True):
        process = started(tmp_path / "environment.1")
        wait_until(lambda: len(sleepers(tmp_path / "environment.1")) == 3, 10)
        launcher = DeepSpeedLauncher(process, tmp_path / "log", tmp_path / "environment.1")
        assert launcher.ended() is None
        if kill:
            process.kill()
            time.sleep(0.1)
        launcher.end()
        wait_until(lambda: sleepers(tmp_path / "environment.1") == [], 10)
        assert f"ended with code -9; its log: {tmp_path / 'log'}" in (launcher.ended() or "")
    assert len(sleepers(tmp_path / "environment.10")) == 3
    DeepSpeedLauncher(other, tmp_path / "log", tmp_path / "environment.10").end()


# Stands for python, and writes down how DeepSpeed's runner would be started.
RECORDER = """#!{python}
import json, os, sys
print(json.dumps({{"arguments": sys.argv[1:], "variables": open(os.environ["DS_ENV_FILE"]).read()}}), flush=True)
"""


def test_no_secret_lies_in_the_run_or_on_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks get what is forwarded from their agents; DeepSpeed's launcher needs none of it."""
    for name in ("HF_TOKEN", "NCCL_SOMETHING", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "top-secret $(id)")
    (tmp_path / "python").write_text(RECORDER.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("vitgraft.launch.deepspeed_launch.sys", SimpleNamespace(executable=str(tmp_path / "python")))
    run, _ = make_run(tmp_path / "run")
    backend = HostfileBackend([], {"a": (1, 2), "b": (0,)}, [])
    assert backend.environment("a", 2, "cuda", 4)["HF_TOKEN"] == "top-secret $(id)"
    launcher = backend.launch(LaunchOrder(run, 3, {"a": 2, "b": 1}, Meeting("10.0.0.1", 29500), "vitgraft-ab", "cuda"))
    wait_until(lambda: launcher.ended() is not None, 20)
    launcher.end()
    (log,) = (run / "logs").iterdir()
    told = json.loads(log.read_text())
    assert told["variables"] == "DS_ACCELERATOR=cuda\n"
    assert told["arguments"][-3:] == ["vitgraft.launch.ticket", "--agent", "vitgraft-ab"]
    assert "a:1,2@b:0" in told["arguments"]
    assert (run / "launch" / "environment.3").stat().st_mode & 0o777 == 0o600
    assert [file for file in run.rglob("*") if file.is_file() and b"top-secret" in file.read_bytes()] == []


def by_hostfile(folder: Path) -> tuple[Backend, RunHandle]:
    """The backend of a hostfile with two hosts, and its run."""
    run, recipe = make_run(folder / "run", train__global_batch=6)
    (folder / "hosts").write_text("a slots=4\nb slots=1\n")
    handle = open_run(run, recipe, "auto")
    return _backend(recipe, Where(hostfile=folder / "hosts", include="a:2,3@b"), Screen())(handle), handle


def test_without_pdsh_the_agents_start_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPUs of their slots, and in a folder to which DeepSpeed's launcher could not change."""
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    backend, handle = by_hostfile(tmp_path)
    assert handle.notes == ["pdsh is not installed here: the ranks start over plain ssh"]
    assert backend.launcher() is None
    assert backend.environment("a", 2, "cuda", 1)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert backend.environment("a", 1, "cuda", 1)["CUDA_VISIBLE_DEVICES"] == "2"
    assert backend.environment("b", 1, "cuda", 1)["CUDA_VISIBLE_DEVICES"] == "0"
    handle.close()


def test_with_pdsh_deepspeeds_launcher_gives_the_tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pdsh").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    backend, handle = by_hostfile(tmp_path)
    assert handle.notes == []
    assert backend.launcher() is not None
    handle.close()
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(ConfigError, match="unusual characters"):
        by_hostfile(tmp_path)
