"""The hosts themselves: apart where real hosts are apart, and gone when their maker is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from multinode import namespaces
from multinode.namespaces import Network, wait_for


def ssh(network: Network, start: str, target: str, *words: str, timeout: float = 30) -> tuple[int, str, str]:
    options = ("-F", str(network.ssh_config), "-o", "ConnectTimeout=2")
    return network.hosts[start].run("ssh", *options, target, *words, timeout=timeout)


def test_every_host_reaches_every_other_by_ssh_under_its_own_name(hosts: Network) -> None:
    for start in hosts.hosts:
        for target, host in hosts.hosts.items():
            code, out, error = ssh(hosts, start, target, "hostname; echo $SSH_CONNECTION; ls /sys/class/net")
            assert code == 0, error
            name, connection, *interfaces = out.splitlines()
            assert name == target
            assert connection.split()[2:] == [host.address, "2222"]
            assert {"eth0", "lo"} <= set(interfaces) or target == start


def test_pdsh_runs_on_all(hosts: Network) -> None:
    environment = {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": f"-F {hosts.ssh_config}"}
    code, out, error = hosts.hosts["host1"].run(
        "pdsh", "-S", "-w", "host1,host2,host3", "hostname; exit %n", environment=environment
    )
    assert code == 2, error
    assert sorted(out.splitlines()) == [f"{name}: {name}" for name in hosts.hosts]


def test_a_host_sees_its_own_processes_only(hosts: Network) -> None:
    first, second, _ = hosts.hosts.values()
    process = first.start("sleep", "1234")
    assert [p.pid for p in first.running("sleep 1234")] == [process.pid]
    assert second.running("sleep 1234") == []
    assert "sleep 1234" in first.check("ps", "-eo", "args")
    assert "sleep 1234" not in second.check("ps", "-eo", "args")
    first.kill_processes()
    assert first.processes() == []
    assert process.finish(5)[0] != 0
    assert ssh(hosts, "host2", "host1", "true")[0] == 0


def test_an_unplugged_host_is_silent_and_comes_back(hosts: Network) -> None:
    hosts.hosts["host2"].unplug()
    assert ssh(hosts, "host1", "host2", "true")[0] == 255
    assert ssh(hosts, "host1", "host3", "true")[0] == 0
    hosts.hosts["host2"].plug()
    assert ssh(hosts, "host1", "host2", "true")[0] == 0


def test_a_host_without_power_has_no_processes_and_starts_again(hosts: Network) -> None:
    host = hosts.hosts["host2"]
    process = host.start("sleep", "4321")
    host.power_off()
    assert process.finish(5)[0] != 0
    assert not psutil.pid_exists(process.pid)
    assert ssh(hosts, "host1", "host2", "true")[0] == 255
    host.power_on()
    assert ssh(hosts, "host1", "host2", "hostname")[:2] == (0, "host2\n")


def test_a_blocked_and_a_slow_way(hosts: Network) -> None:
    first, second, third = hosts.hosts.values()
    second.block(third)
    try:
        assert ssh(hosts, "host2", "host3", "true")[0] == 255
        assert ssh(hosts, "host2", "host1", "true")[0] == 0
    finally:
        second.unblock(third)
    copy = ("sh", "-c", f"head -c 1000000 /dev/zero | ssh -F {hosts.ssh_config} host2 cat >/dev/null")
    took = []
    for slow in (False, True):
        if slow:
            second.slow_down("2mbit")
        before = time.monotonic()
        assert first.run(*copy)[0] == 0
        took.append(time.monotonic() - before)
    second.speed_up()
    assert took[1] > max(3, 2 * took[0])  # 8 Mbit need 4 s


def test_small_file_systems_for_one_host_and_for_all(hosts: Network, tmp_path: Path) -> None:
    first, second, third = hosts.hosts.values()
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir()
    shared.mkdir()
    second.mount_tmpfs(own, 1)
    assert second.run("dd", "if=/dev/zero", f"of={own}/full", "bs=1M", "count=2")[0] != 0
    assert list(own.iterdir()) == []
    assert first.check("ls", own) == ""
    second.unmount(own)
    view = hosts.mount_tmpfs(shared, 1)
    first.check("sh", "-c", f"echo hello > {shared}/note")
    assert third.check("cat", shared / "note") == "hello\n"
    assert (view / "note").read_text() == "hello\n"
    assert list(shared.iterdir()) == []


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_PATH", "/nowhere")
    assert "ip (package iproute2), ssh (package openssh-client), sshd (package openssh-server)" in str(
        namespaces.missing()
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in str(namespaces.missing())


def test_nothing_is_left_of_a_killed_session(hosts: Network, tmp_path: Path) -> None:
    """Not even of one that could not clean up."""
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from multinode.namespaces import Network
with Network(Path({str(tmp_path)!r}), ["alone", "other"]) as network:
    network.hosts["alone"].start("sleep", "98765")
    print("up", flush=True)
    time.sleep(60)
"""
    session = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert session.stdout is not None
    assert session.stdout.readline() == "up\n"
    family = psutil.Process(session.pid).children(recursive=True)
    assert {process.name() for process in family} >= {"sshd", "sleep"}
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    wait_for(lambda: not any(process.is_running() for process in family), "end of the hosts")
