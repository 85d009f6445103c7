"""DeepSpeed's launcher from outside: nothing that it has started here is left when it is ended."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from support import wait_until

from vitgraft.launch.backends import DeepSpeedLauncher

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
