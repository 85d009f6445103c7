"""Backends that start agents and ranks: on this host, or on those of a hostfile over ssh, by DeepSpeed's launcher
where it is available."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vitgraft.launch import deepspeed_launch
from vitgraft.launch.deepspeed_launch import Meeting
from vitgraft.launch.hosts import Host, Slots
from vitgraft.launch.links import AgentLink, start_here, start_over_ssh
from vitgraft.launch.processes import kill_with
from vitgraft.launch.role_process import log_path, open_log

TICKET_MODULE = "vitgraft.launch.ticket"
FAREWELL_S = 3.0


@dataclass(frozen=True)
class LaunchOrder:
    """Order to a launcher. ``ranks``: number on each host. ``tickets``: name of the agents' sockets. ``device``:
    ``cpu`` or ``cuda``."""

    run: Path
    attempt: int
    ranks: Mapping[str, int]
    meeting: Meeting
    tickets: str
    device: str


class Launcher(Protocol):
    """Process that starts the ranks of an attempt through the agents."""

    def ended(self) -> str | None:
        """Return why the launcher has ended; ``None``: it runs."""

    def end(self) -> None:
        """End the launcher and the processes that it started on this host."""


class Backend(Protocol):
    """One way to run on hosts. ``hosts``: those that may take part, the regular ones first used. ``alone``: there is
    none but the supervisor's own, and nothing to compare before ranks start."""

    hosts: Sequence[Host]
    alone: bool

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> AgentLink:
        """Start the agent of a host, or wait for it. ``again``: the run has started before. ``since``: when the first
        host began to be waited for (monotonic clock). ``meanwhile``: called now and then while it waits."""

    def waiting(self) -> Sequence[AgentLink]:
        """Return agents that connected before they were requested."""

    def meeting(self, first: AgentLink, port: int) -> Meeting:
        """Return the rendezvous address of the ranks, on the first host."""

    def used(self, host: str, count: int) -> Sequence[int]:
        """Return the GPUs of ``count`` ranks of a host."""

    def environment(self, host: str, count: int, device: str, threads: int) -> dict[str, str]:
        """Return the environment variables of ``count`` ranks of a host."""

    def launcher(self) -> Callable[[LaunchOrder], Launcher] | None:
        """Return the function that starts the tickets' launcher; ``None``: agents start the ranks without tickets."""

    def close(self) -> None:
        """Release all resources."""


@dataclass
class HereBackend:
    """This host alone."""

    name: str
    processes: int
    lock: int
    logs: Path | None = None
    """Folder for the agent's standard error."""
    hosts: Sequence[Host] = field(init=False)
    alone: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.hosts = [Host(self.name, self.processes)]

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> AgentLink:
        """Start the agent."""
        return start_here(host.name, self.lock, self.logs)

    def waiting(self) -> Sequence[AgentLink]:
        """Return no agents: every agent is started by this process."""
        return ()

    def meeting(self, first: AgentLink, port: int) -> Meeting:
        """Return an address on the loopback, so that the host name need not resolve."""
        return Meeting("127.0.0.1", port)

    def used(self, host: str, count: int) -> Sequence[int]:
        """Return the first GPUs."""
        return range(count)

    def environment(self, host: str, count: int, device: str, threads: int) -> dict[str, str]:
        """Return the variables of local ranks; they connect over the loopback unless the user names an interface."""
        variables = deepspeed_launch.rank_environment({}, device=device, threads=threads)
        interfaces = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        return variables | interfaces

    def launcher(self) -> None:
        """Return ``None``: no launcher is needed."""

    def close(self) -> None:
        """Do nothing: no resource is held."""


@dataclass
class HostfileBackend:
    """The hosts of a hostfile: agents over ssh, ranks through DeepSpeed's launcher over pdsh where there is one."""

    hosts: Sequence[Host]
    slots: Slots
    """The slots that may be used, of all hosts with spares."""
    ssh_args: Sequence[str]
    pdsh: bool = True
    """Whether it is installed here; without it the agents, which ssh has started, start the ranks by themselves."""
    logs: Path | None = None
    """Folder for the standard error of ssh and the agents."""
    alone: bool = field(init=False, default=False)

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> AgentLink:
        """Start the agent over ssh."""
        return start_over_ssh(host.name, self.ssh_args, self.logs)

    def waiting(self) -> Sequence[AgentLink]:
        """Return no agents: every agent is started by this process."""
        return ()

    def meeting(self, first: AgentLink, port: int) -> Meeting:
        """Return the address by which the first host was reached."""
        return Meeting(str(first.facts["address"] or first.host), port)

    def used(self, host: str, count: int) -> Sequence[int]:
        """Return the first of the host's slots."""
        return self.slots[host][:count]

    def environment(self, host: str, count: int, device: str, threads: int) -> dict[str, str]:
        """Return the forwarded variables, and the GPUs of the ranks' slots as DeepSpeed's launcher sets them."""
        variables = deepspeed_launch.rank_environment(os.environ, device=device, threads=threads)
        return {**variables, "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.used(host, count)))}

    def launcher(self) -> Callable[[LaunchOrder], Launcher] | None:
        """Return the starter of DeepSpeed's runner, which needs pdsh."""
        return self.launch if self.pdsh else None

    def launch(self, order: LaunchOrder) -> Launcher:
        """Start DeepSpeed's runner.

        Raises:
            OSError: its files cannot be written.
        """
        folder = order.run / "launch"
        folder.mkdir(exist_ok=True)
        used: Slots = {host: tuple(self.used(host, count)) for host, count in order.ranks.items() if count}
        hostfile, variables = folder / f"hostfile.{order.attempt}", folder / f"environment.{order.attempt}"
        hostfile.write_text(deepspeed_launch.deepspeed_hostfile(used))
        variables.touch(0o600)
        variables.write_text(deepspeed_launch.launchers_variables(order.device))
        command = deepspeed_launch.runner_command(
            hostfile, used, order.meeting, TICKET_MODULE, ["--agent", order.tickets]
        )
        environment = deepspeed_launch.runner_environment(os.environ, variables, self.ssh_args)
        log = log_path(order.run, "deepspeed", order.attempt)
        with open_log(log) as stream:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        return DeepSpeedLauncher(process, log, variables)

    def close(self) -> None:
        """Do nothing: no resource is held."""


@dataclass
class DeepSpeedLauncher:
    """DeepSpeed's runner. ``variables``: its file of them, which tells its pdsh and ssh from all other processes."""

    process: subprocess.Popen[bytes]
    log: Path
    variables: Path

    def ended(self) -> str | None:
        """Return why the runner has ended; its exit code tells nothing (it is 0 after failures, too)."""
        code = self.process.poll()
        return None if code is None else f"DeepSpeed's launcher ended with code {code}; its log: {self.log}"

    def end(self) -> None:
        """End the runner. Its tickets end with their ssh; SIGTERM to the runner would end all processes of that name on
        all hosts, also other users'."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(FAREWELL_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # pdsh gives each ssh a session of its own, and one to a host that is gone would wait there for long.
        kill_with(f"{deepspeed_launch.ENV_FILE_VARIABLE}={self.variables}")
