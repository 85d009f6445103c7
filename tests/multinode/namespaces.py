"""Hosts on one machine that differ as real ones do: each in namespaces of its own, joined by a bridge.

A host has its own network (eth0 and lo), process ids, host name, /dev/shm and /run, and an sshd on a key of its own.
Its files are the machine's, which stand for shared storage. The bridge lies in a namespace too, so nothing of this
shows in the machine's own network. Every namespace is held by one process that the kernel kills with the process that
made it, and with that process everything inside: no end of a test, not even SIGKILL, leaves anything to clean up.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

PORT = 2222
TOOLS = {"ip": "iproute2", "ssh": "openssh-client", "sshd": "openssh-server", "pdsh": "pdsh"}
BASICS = ("unshare", "nsenter", "setpriv", "mount", "tc")
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
# A holder dies with the process that started it, and what it holds dies with it.
_HELD = ["setpriv", "--pdeathsig", "KILL"]


def missing() -> str | None:
    """What this machine lacks for such hosts, in words; ``None``: nothing."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    lacking = [
        f"{tool} (package {package})" for tool, package in TOOLS.items() if shutil.which(tool, path=_PATH) is None
    ]
    lacking += [tool for tool in BASICS if shutil.which(tool, path=_PATH) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    bridge = "ip link add br0 type bridge && ip link add p0 type veth peer name p1"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "sh", "-c", bridge],
        env={"PATH": _PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Poll until it holds; fails, naming ``what``, when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.02)


def _run(*words: str) -> str:
    done = subprocess.run(words, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr.strip()}"
    return done.stdout


@dataclass
class HostProcess:
    """A command on a host. ``pid`` is the command's own, as this machine counts; the host counts otherwise."""

    shell: subprocess.Popen[str]
    pid: int

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def finish(self, timeout: float) -> tuple[int, str, str]:
        """Wait: exit code, standard output and standard error."""
        out, error = self.shell.communicate(timeout=timeout)
        return self.shell.returncode, out, error


class Host:
    """One host; made by :class:`Network`."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.network, self.name = network, name
        self.address = f"10.77.0.{number}"
        self._port = f"port{number}"
        # It stays the same when the host is switched off and on, or the others would go on sending to the old one.
        self._hardware_address = f"02:00:0a:4d:00:{number:02x}"
        self._folder = network.folder / name
        self._holder: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._folder.mkdir()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / "host_key"))

    @property
    def public_key(self) -> str:
        """What known_hosts says of it."""
        return (self._folder / "host_key.pub").read_text().strip()

    def power_on(self) -> None:
        """Make its namespaces, plug it in and start its sshd."""
        log = self._folder / "sshd.log"
        log.unlink(missing_ok=True)
        script = self._folder / "init.sh"
        script.write_text(self._init_script(log))
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--mount-proc", "--propagation", "slave"]
        namespaces += ["--pid", "--fork", "--kill-child=KILL"]
        self._holder = subprocess.Popen(
            [*self.network.enter("--mount"), *_HELD, "unshare", *namespaces, "bash", str(script)],
            env={"PATH": _PATH, "HOME": "/root"},
            stdin=subprocess.DEVNULL,
            stdout=(self._folder / "init.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._init = self._wait_for_init(self._holder.pid)
        switch = self.network.enter("--net")
        inside = f"type veth peer name eth0 address {self._hardware_address} netns {self._init}".split()
        _run(*switch, "ip", "link", "add", self._port, *inside)
        _run(*switch, "ip", "link", "set", self._port, "master", "br0", "up")
        for words in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _run(*self._enter("--net"), "ip", *words.split())
        # From now on its script goes on to sshd.
        (self._folder / "plugged").touch()
        wait_for(lambda: log.exists() and "Server listening" in log.read_text(), f"sshd of {self.name}; see {log}")

    def _init_script(self, log: Path) -> str:
        (self._folder / "plugged").unlink(missing_ok=True)
        settings = {
            "Port": PORT,
            "HostKey": self._folder / "host_key",
            "AuthorizedKeysFile": self.network.folder / "user_key.pub",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "PidFile": "none",
            "UsePAM": "no",
            "UseDNS": "no",
            "AcceptEnv": "*",
            "MaxStartups": "200",
        }
        config = self._folder / "sshd_config"
        config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        quoted = {name: shlex.quote(str(self._folder / name)) for name in ("plugged", "sshd_config")}
        return f"""set -e
hostname {self.name}
mount -t tmpfs -o size=16m tmpfs /run
mkdir /run/sshd
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --bind {shlex.quote(str(self.network.folder / "hosts"))} /etc/hosts
until [ -e {quoted["plugged"]} ]; do sleep 0.02; done
{shutil.which("sshd", path=_PATH)} -D -e -f {quoted["sshd_config"]} 2>{shlex.quote(str(log))} &
# The first process of a host also buries what others have left.
while :; do wait; sleep 1; done
"""

    def _wait_for_init(self, holder: int) -> int:
        found: list[int] = []

        def started() -> bool:
            # nsenter has become setpriv, unshare and its child; that child has a host name of its own when it is ours.
            with contextlib.suppress(psutil.NoSuchProcess):
                found[:] = [child.pid for child in psutil.Process(holder).children()]
            return bool(found) and Path(f"/proc/{found[0]}/cmdline").read_bytes().startswith(b"bash")

        wait_for(started, f"namespaces of {self.name}; see {self._folder / 'init.log'}")
        return found[0]

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", "--target", str(self._init), *namespaces, "--"]

    def start(
        self, *words: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> HostProcess:
        """Start a command on this host, as if typed there; it dies with this machine's side of it."""
        there = ["env", "-C", str(cwd or Path.cwd())]
        command = [*self._enter("--net", "--uts", "--ipc", "--mount", "--pid"), *there, *_HELD, *map(str, words)]
        shell = subprocess.Popen(
            command,
            env={**(os.environ if environment is None else environment), "PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        pids: list[int] = []

        def started() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                pids[:] = [child.pid for child in psutil.Process(shell.pid).children()]
            return bool(pids) or shell.poll() is not None

        wait_for(started, f"{words[0]} on {self.name}")
        return HostProcess(shell, pids[0] if pids else shell.pid)

    def run(
        self,
        *words: str | Path,
        timeout: float = 60,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> tuple[int, str, str]:
        """Run a command on this host: exit code, standard output and standard error; nothing is checked."""
        process = self.start(*words, environment=environment, cwd=cwd)
        try:
            return process.finish(timeout)
        finally:
            process.shell.kill()

    def check(self, *words: str | Path) -> str:
        """Run a command on this host that must succeed; its standard output."""
        code, out, error = self.run(*words)
        assert code == 0, f"{self.name}: {shlex.join(map(str, words))}: {error}"
        return out

    def processes(self) -> list[psutil.Process]:
        """What lives on this host besides its first process and its sshd."""
        if self._holder is None:
            return []
        home = os.readlink(f"/proc/{self._init}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                listener = process.ppid() == self._init and "-D" in process.cmdline() and "sshd" in process.name()
                # sleep is the pause of the first process.
                idle = process.ppid() == self._init and process.name() == "sleep"
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == home and process.pid != self._init
                if inside and not listener and not idle and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def running(self, text: str) -> list[psutil.Process]:
        """Its processes whose command line holds ``text``."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if text in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_processes(self) -> None:
        """SIGKILL everything on this host; its sshd listens on."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=1)

    def unplug(self) -> None:
        """Take its link down: nobody is told, connections stay as they are and fall silent."""
        _run(*self.network.enter("--net"), "ip", "link", "set", self._port, "down")

    def plug(self) -> None:
        """Take its link up again."""
        _run(*self.network.enter("--net"), "ip", "link", "set", self._port, "up")

    def slow_down(self, rate: str) -> None:
        """Let its link carry no more than ``rate``, e.g. 8mbit, both ways."""
        words = f"root tbf rate {rate} burst 32k latency 200ms".split()
        _run(*self.network.enter("--net"), "tc", "qdisc", "replace", "dev", self._port, *words)
        _run(*self._enter("--net"), "tc", "qdisc", "replace", "dev", "eth0", *words)

    def speed_up(self) -> None:
        """Undo :meth:`slow_down`."""
        _run(*self.network.enter("--net"), "tc", "qdisc", "del", "dev", self._port, "root")
        _run(*self._enter("--net"), "tc", "qdisc", "del", "dev", "eth0", "root")

    def block(self, other: Host) -> None:
        """Let nothing pass from this host to the other."""
        _run(*self._enter("--net"), "ip", "route", "add", "prohibit", f"{other.address}/32")

    def unblock(self, other: Host) -> None:
        """Undo :meth:`block`."""
        _run(*self._enter("--net"), "ip", "route", "del", "prohibit", f"{other.address}/32")

    def mount_tmpfs(self, path: Path, megabytes: int) -> None:
        """A small file system that only this host sees at ``path``."""
        self.check("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path)

    def unmount(self, path: Path) -> None:
        """Undo :meth:`mount_tmpfs`."""
        self.check("umount", path)

    def power_off(self) -> None:
        """Cut its power: everything on it is gone, and nobody hears of it."""
        if self._holder is None:
            return
        with contextlib.suppress(AssertionError):
            self.unplug()
        inside = self.processes()
        for pid in (self._init, self._holder.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._holder.wait()
        psutil.wait_procs(inside, timeout=10)
        self._holder = None
        # The kernel takes the link away with the last process, or with the last connection that still has something to
        # send, which takes minutes.
        gone = [*self.network.enter("--net"), "sh", "-c", f"ip link del {self._port}; ! ip link show {self._port}"]
        wait_for(lambda: subprocess.run(gone, capture_output=True, check=False).returncode == 0, f"end of {self.name}")


class Network:
    """Some hosts, joined; use as a context manager."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._switch: subprocess.Popen[bytes] | None = None
        self.ssh_config = folder / "ssh_config"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "user_key"))
        self.hosts = {name: Host(self, name, number) for number, name in enumerate(names, start=1)}
        names_of = [f"{host.address} {host.name}\n" for host in self.hosts.values()]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names_of))
        known = [f"{host.name} {host.public_key}\n" for host in self.hosts.values()]
        (folder / "known_hosts").write_text("".join(known))
        self.ssh_config.write_text(self._ssh_config())

    def _ssh_config(self) -> str:
        settings = {
            "Port": PORT,
            "User": "root",
            "IdentityFile": self.folder / "user_key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.folder / "known_hosts",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
        }
        lines = [
            f"Host {host.name}\n  HostName {host.address}\n  HostKeyAlias {host.name}\n" for host in self.hosts.values()
        ]
        return "".join(lines) + "Host *\n" + "".join(f"  {key} {value}\n" for key, value in settings.items())

    def __enter__(self) -> Network:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        # Mounts made here show on every host (shared storage), and never on the machine itself.
        script = "mount --make-rshared / && ip link add br0 type bridge && ip link set br0 up && exec sleep infinity"
        self._switch = subprocess.Popen(
            [*_HELD, "unshare", "--net", "--mount", "sh", "-c", script],
            env={"PATH": _PATH},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        held = Path(f"/proc/{self._switch.pid}/cmdline")
        wait_for(lambda: held.read_bytes().startswith(b"sleep"), "the bridge")
        for host in self.hosts.values():
            host.power_on()

    def enter(self, *namespaces: str) -> list[str]:
        """The words before a command that is to run where the bridge is."""
        assert self._switch is not None
        return ["nsenter", "--target", str(self._switch.pid), *namespaces, "--"]

    def mount_tmpfs(self, path: Path, megabytes: int) -> Path:
        """A small file system that all hosts share at ``path``; returns where this machine sees its files."""
        assert self._switch is not None
        _run(*self.enter("--mount"), "mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
        return Path(f"/proc/{self._switch.pid}/root{path}")

    def unmount_tmpfs(self, path: Path) -> None:
        """Undo :meth:`mount_tmpfs`, whatever still uses it."""
        _run(*self.enter("--mount"), "umount", "--lazy", str(path))

    def restore(self) -> None:
        """For the next test: every host up and plugged in, with nothing running."""
        for host in self.hosts.values():
            if host._holder is None:
                host.power_on()
            host.plug()
            host.kill_processes()

    def close(self) -> None:
        """Take everything down."""
        try:
            for host in self.hosts.values():
                host.power_off()
        finally:
            if self._switch is not None:
                self._switch.kill()
                self._switch.wait()
                self._switch = None
