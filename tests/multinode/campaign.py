"""A supervised run on real hosts: start it, break it, and audit what it says and leaves."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from multinode.namespaces import Host, HostProcess, Network
from support import audited_entries, executable, history, losses, tiny_recipe

from vitgraft.launch.attempt import GRACE_AFTER_FAILURE_S
from vitgraft.launch.links import SILENT_S

RANK, AGENT, RUNNER = "vitgraft.trainer.rank", "vitgraft.launch.agent", "deepspeed.launcher.runner"
MANY_S = 180.0
"""A start of ranks on a busy machine, and what else has no limit of its own."""
DEATH_S = 10.0
"""A process that is gone is noticed within; mostly it takes a fraction of a second."""
OUTCOME_S = DEATH_S + 2 * GRACE_AFTER_FAILURE_S
"""And the attempt is over, and its cause known, within."""
SILENCE_S = SILENT_S + 10.0
"""A host that falls silent is noticed within."""
ORPHANS_S = 20.0
"""Where the leader is gone, nothing is left of it within."""
SAMPLES, BATCH, STEPS = 22, 6, 48

Event = dict[str, Any]


def recipe_of(data: Path, **settings: Any) -> dict[str, Any]:
    """A recipe that commits after every other step, and restarts at once."""
    usual: dict[str, Any] = {
        "train__steps": STEPS,
        "train__global_batch": BATCH,
        "train__ledger": True,
        "train__checkpoint": {"every_steps": 2, "keep_last": 2},
        "launch__max_restarts": 3,
        "launch__restart_delay_s": 0.5,
    }
    return tiny_recipe("semantic", data, **(usual | settings))


class SupervisedRun:
    """``vitgraft train --hostfile`` on the first host.

    Args:
        hostfile: its text.
        view: where this machine sees ``folder``, if it is not where the hosts do.
    """

    def __init__(self, hosts: Network, folder: Path, recipe: Path, hostfile: str, view: Path | None = None) -> None:
        self.hosts, self.recipe = hosts.hosts, recipe
        self.run, self.view = folder / "run", (view or folder) / "run"
        self.folder = recipe.parent
        self.hostfile, self.log = self.folder / "hosts.txt", self.folder / "leader.log"
        self.hostfile.write_text(hostfile)
        own = {"VITGRAFT_SSH_CONFIG": str(hosts.ssh_config), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own}
        self.leader: HostProcess | None = None

    def start(self, *arguments: str, pdsh: bool = True) -> None:
        """Give the command on the first host. ``pdsh``: whether that is installed there."""
        train = [executable(), "train", self.recipe, "--run-dir", self.run, "--hostfile", self.hostfile, *arguments]
        said = f'exec "$@" >>{self.log} 2>&1'  # a pipe that nobody reads would fill
        if not pdsh:
            tools = self.folder / "tools"
            if not tools.exists():
                tools.mkdir()
                for name in ("sh", "ssh"):
                    (tools / name).symlink_to(shutil.which(name) or name)
            said = f"PATH={tools}; {said}"
        first = next(iter(self.hosts.values()))
        self.leader = first.start("sh", "-c", said, "sh", *train, environment=self.environment, cwd=self.folder)

    def finish(self, timeout: float = MANY_S) -> int:
        """Wait for the end of the command; its exit code."""
        assert self.leader is not None
        return self.leader.finish(timeout)[0]

    def going(self) -> bool:
        """Whether the command runs."""
        return self.leader is not None and self.leader.shell.poll() is None

    def signal(self, number: int) -> float:
        """Send the leader a signal; returns when."""
        assert self.leader is not None
        at = time.time()
        self.leader.signal(number)
        return at

    def said(self) -> str:
        """What the leader has printed, in all of its starts."""
        return self.log.read_text()

    def events(self, name: str | None = None, since: float = 0.0) -> list[Event]:
        """The events so far, oldest first."""
        path = self.view / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [event for event in found if event["time"] >= since and name in (None, event["event"])]

    def event(self, name: str, since: float, within: float = MANY_S) -> Event:
        """Wait for an event; it must come ``within`` so many seconds, by its own time."""
        self._until(lambda: self.events(name, since) != [], f"event {name}", within + MANY_S)
        found = self.events(name, since)[0]
        assert found["time"] - since < within, (f"{name} took {found['time'] - since:.1f} s", found)
        return found

    def attempt(self) -> int:
        """Number of the newest attempt; 0: none yet."""
        return max((int(event["attempt"]) for event in self.events("start")), default=0)

    def step(self) -> int:
        """The last step of the newest attempt; 0: none yet."""
        path = self.view / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        attempt = self.attempt()
        return max((int(row["step"]) for row in rows if row["attempt"] == attempt), default=0)

    def done(self) -> int:
        """Steps of the newest attempt and of those that it goes on from."""
        return max(self.step(), self.events("start")[-1]["resume"] or 0)

    def wait_step(self, step: int) -> None:
        """Wait until the newest attempt has done this step."""
        self._until(lambda: self.step() >= step, f"step {step} of attempt {self.attempt()}", MANY_S)

    def wait_attempt(self, attempt: int) -> Event:
        """Wait until an attempt starts; its event."""
        self._until(lambda: self.attempt() >= attempt, f"attempt {attempt}", MANY_S)
        return self.events("start")[-1]

    def _until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = not self.going() and not condition()
            assert not ended, f"the command ended while {what} was waited for: {self.said()[-4000:]}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}: {self.said()[-4000:]}"
            time.sleep(0.1)

    def rank(self, number: int) -> tuple[psutil.Process, str]:
        """The process of a rank, and its host."""
        for host in self.hosts.values():
            for process in host.running(RANK):
                if str(self.run) in process.cmdline() and process.environ().get("RANK") == str(number):
                    return process, host.name
        raise AssertionError(f"no rank {number} lives")

    def runner(self) -> psutil.Process:
        """DeepSpeed's launcher."""
        return next(iter(next(iter(self.hosts.values())).running(RUNNER)))

    def places(self) -> dict[int, str]:
        """The host of each rank, by the event of the newest start."""
        ranks = self.events("start")[-1]["hosts"]
        return dict(enumerate(host for host, count in ranks.items() for _ in range(count)))

    def assert_nothing_left(self, within: float = 5.0) -> None:
        """No process lives on any host, whoever started it."""
        deadline = time.monotonic() + within
        while left := {name: words for name, host in self.hosts.items() if (words := lines(host))}:
            assert time.monotonic() < deadline, f"left after {within:g} s: {left}"
            time.sleep(0.1)

    def audit(self, unbroken: Path, steps: int, *, exact: bool = True) -> None:
        """The run is what it would have been without any fault.

        Args:
            exact: with the same world all along; else losses differ in the order of sums, and a ReLU may make more of
                it than a last bit (tests/runs/test_worlds.py).
        """
        assert len(losses(self.view)) == steps
        if exact:
            assert losses(self.view) == losses(unbroken)
        else:
            ours, theirs = history(self.view), history(unbroken)
            differences = [abs(ours[step]["loss"] / theirs[step]["loss"] - 1) for step in sorted(theirs)]
            assert max(differences[:10]) < 1e-3, differences
            assert max(differences) < 1e-2, differences
        entries = audited_entries(self.view)
        assert entries == audited_entries(unbroken)
        epochs: dict[int, Counter[int]] = {}
        for of_step in entries.values():
            for epoch, sample, _ in of_step:
                epochs.setdefault(epoch, Counter())[sample] += 1
        assert all(set(seen.values()) == {1} for seen in epochs.values())
        assert all(len(epochs[epoch]) == SAMPLES for epoch in range(max(epochs)))


def lines(host: Host) -> list[str]:
    """What runs on a host, in words."""
    found = []
    for process in host.processes():
        try:
            found.append(" ".join(process.cmdline())[:120])
        except psutil.NoSuchProcess:
            continue
    return found


def who(end: Event) -> tuple[str | None, int | None, str | None]:
    """Kind, rank and host of the event of an end."""
    return end.get("kind"), end.get("rank"), end.get("host")
