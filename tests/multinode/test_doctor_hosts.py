"""vitgraft doctor over real ssh: two hosts that are well, and what it says of those that are not."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from multinode.namespaces import Network, wait_for
from support import executable, tiny_recipe, write_recipe

ODD = Path(__file__).with_name("odd_host_facts.py")


@pytest.fixture
def recipe(tmp_path: Path, detection_data: Path) -> Path:
    (tmp_path / "own").mkdir()
    return write_recipe(tmp_path / "own" / "recipe.yaml", tiny_recipe("detection", detection_data, launch__port=29533))


def hostfile(folder: Path, *names: str) -> Path:
    path = folder / "hostfile"
    path.write_text("".join(f"{name} slots=1\n" for name in names))
    return path


def doctor(hosts: Network, *arguments: str | Path) -> tuple[int, str, str]:
    """The command, typed on the first host."""
    environment = {**os.environ, "VITGRAFT_SSH_CONFIG": str(hosts.ssh_config)}
    return hosts.hosts["host1"].run(executable(), "doctor", *arguments, environment=environment, timeout=200)


def of(findings: list[dict[str, Any]], level: str) -> dict[tuple[str, str | None], str]:
    return {(found["check"], found["host"]): found["text"] for found in findings if found["level"] == level}


def wait_for_the_end(hosts: Network) -> None:
    wait_for(lambda: not any(host.processes() for host in hosts.hosts.values()), "the end of all that was started")


def test_healthy_hosts(hosts: Network, recipe: Path, tmp_path: Path) -> None:
    options = ("--hostfile", hostfile(tmp_path, "host1", "host2"), recipe, "--run-dir", tmp_path / "runs" / "new")
    code, out, error = doctor(hosts, *options, "--json")
    assert code == 0, error + out
    report = json.loads(out)
    assert report["ok"] is True
    assert of(report["findings"], "failure") == {}
    fine = of(report["findings"], "ok")
    checks = {
        "reach",
        "clock",
        "python",
        "packages",
        "vitgraft",
        "recipe",
        "data",
        "gpus",
        "storage",
        "ports",
        "network",
    }
    assert {check for check, _ in fine} >= checks | {"all-reduce"}
    assert fine["reach", None] == "host1, host2 answered"
    assert "4 MiB over 2 hosts" in fine["all-reduce", None]
    assert list(tmp_path.glob(".vitgraft*")) == []
    assert not (tmp_path / "runs").exists()
    wait_for_the_end(hosts)


def test_a_sick_host_is_named_with_all_it_lacks(
    hosts: Network, recipe: Path, detection_data: Path, tmp_path: Path
) -> None:
    """Host 2: other versions, a wrong clock, and storage of its own in place of recipe, data and run."""
    second = hosts.hosts["host2"]
    runs = tmp_path / "runs"
    runs.mkdir()
    for folder in (recipe.parent, detection_data, runs):
        second.mount_tmpfs(folder, 2)
    second.slow_down("40mbit")
    both = hostfile(tmp_path, "host1", "host2")
    oddities = ["host2:torch=1.0", "host2:python=3.99.0", "host2:code=0123", "host2:clock=-300"]
    program = f"""
from dataclasses import replace
from pathlib import Path
from vitgraft.launch import doctor
from vitgraft.launch.doctor_report import show
from vitgraft.launch.ui import Screen
case = doctor.case_of({str(recipe)!r}, Path({str(both)!r}), Path({str(runs / "a")!r}), 30)
case = replace(case, asked=[{sys.executable!r}, {str(ODD)!r}, *{oddities!r}])
show(doctor.examine(case, Screen()), as_json=True)
"""
    environment = {**os.environ, "VITGRAFT_SSH_CONFIG": str(hosts.ssh_config)}
    try:
        code, out, error = hosts.hosts["host1"].run(sys.executable, "-c", program, environment=environment, timeout=200)
    finally:
        second.speed_up()
        for folder in (recipe.parent, detection_data, runs):
            second.unmount(folder)
    assert code == 0, error + out
    report = json.loads(out)
    assert report["ok"] is False
    failures = of(report["findings"], "failure")
    assert {host for _, host in failures} <= {"host2", "host1"}
    assert "torch 1.0, elsewhere" in failures["packages", "host2"]
    assert "python 3.99.0, elsewhere 3." in failures["python", "host2"]
    assert "source files differ" in failures["vitgraft", "host2"]
    assert "behind this host's; synchronise it" in failures["clock", "host2"]
    assert "no such recipe file" in failures["recipe", "host2"]
    assert f"data.train.path: {detection_data}: no manifest.json" in failures["data", "host2"]
    for host, other in (("host1", "host2"), ("host2", "host1")):
        assert f"does not see what {other} wrote there" in failures["storage", host]
    warnings = of(report["findings"], "warning")
    assert "MB/s to host1" in warnings["bandwidth", "host2"]
    assert ("all-reduce", None) in of(report["findings"], "ok")


def test_a_dead_host_and_a_port_in_use(hosts: Network, recipe: Path, tmp_path: Path) -> None:
    hosts.hosts["host3"].power_off()
    listen = "import socket, time; s = socket.create_server(('', 29533)); print('up', flush=True); time.sleep(300)"
    listener = hosts.hosts["host1"].start(sys.executable, "-c", listen)
    assert listener.shell.stdout is not None
    assert listener.shell.stdout.readline() == "up\n"
    before = time.monotonic()
    options = ("--hostfile", hostfile(tmp_path, "host1", "host2", "host3"), "--timeout", "5")
    code, out, error = doctor(hosts, *options, recipe, "--run-dir", tmp_path / "runs")
    # A connection to a dead host may hang for two minutes if nobody gives up before.
    assert time.monotonic() - before < 60
    assert code == 2
    lines = [line for line in out.splitlines() if line.startswith("failure")]
    assert any(line.startswith("failure  reach       host3: ") for line in lines), out
    assert any("ports       host1: " in line and "launch.port" in line for line in lines), out
    assert "ok       data        all hosts" in out
    assert error.splitlines()[-1].startswith(
        "vitgraft: doctor: 2 of the checks failed on host3, host1; the first: reach"
    )


def test_a_killed_doctor_leaves_nothing_on_any_host(hosts: Network, tmp_path: Path) -> None:
    first, second, _ = hosts.hosts.values()
    options = ("--hostfile", hostfile(tmp_path, "host1", "host2"))
    environment = {**os.environ, "VITGRAFT_SSH_CONFIG": str(hosts.ssh_config)}
    process = first.start(executable(), "doctor", *options, environment=environment)
    wait_for(lambda: bool(second.running("vitgraft.launch.host_facts")), "the doctor's visit to host2")
    process.signal(signal.SIGKILL)
    wait_for_the_end(hosts)


def test_a_blocked_way_between_two_hosts(hosts: Network, tmp_path: Path) -> None:
    _, second, third = hosts.hosts.values()
    second.block(third)
    try:
        code, out, _ = doctor(hosts, "--hostfile", hostfile(tmp_path, *hosts.hosts), "--json")
    finally:
        second.unblock(third)
    assert code == 2
    findings = json.loads(out)["findings"]
    assert any(
        found["check"] == "network"
        and found["host"] == "host2"
        and f"cannot connect to host3 ({third.address}" in found["text"]
        for found in findings
    )
    assert of(findings, "skipped")["all-reduce", None] == "not every host reaches every other"
    wait_for_the_end(hosts)
