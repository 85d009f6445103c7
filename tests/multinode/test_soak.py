"""Random faults, one after another, in one run on real hosts: ``make soak``, and more of them with SOAK=n."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from multinode.campaign import (
    AGENT,
    DEATH_S,
    MANY_S,
    ORPHANS_S,
    OUTCOME_S,
    SILENCE_S,
    SupervisedRun,
    recipe_of,
    who,
)
from multinode.namespaces import Host, Network
from support import train, write_recipe

COUNT = int(os.environ.get("SOAK", "20"))
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
STEPS = 60 + 20 * COUNT
STANDS_STILL_S = 12.0
HOSTFILE = "host1 slots=1\nhost2 slots=1\nhost3 slots=1 spare=true\n"
CHECKPOINTER = "vitgraft.trainer.checkpointer"


class Soak:
    """Each fault is a method: it brings it about, and looks at what is said of it. Whether another attempt follows, it
    returns."""

    def __init__(self, run: SupervisedRun, draw: random.Random) -> None:
        self.run, self.draw = run, draw
        self.faults: list[Callable[[], bool]] = [
            self.kill_rank,
            self.stop_rank,
            self.kill_launcher,
            self.kill_agent,
            self.kill_checkpointer,
            self.kill_host,
            self.cut_link,
            self.cut_power,
            self.kill_leader,
            self.preempt,
        ]

    def _rank(self) -> tuple[int, psutil.Process, str]:
        number = self.draw.randrange(2)
        process, host = self.run.rank(number)
        assert self.run.places()[number] == host
        return number, process, host

    def _other_host(self) -> Host:
        """One that takes part and is not the leader's."""
        names = [name for name in self.run.places().values() if name != "host1"]
        return self.run.hosts[self.draw.choice(names)]

    def _loses(self, host: Host, at: float, within: float) -> bool:
        assert self.run.event("host_lost", at, within)["host"] == host.name
        assert who(self.run.event("end", at, within + OUTCOME_S)) == ("lost_node", None, host.name)
        return True

    def kill_rank(self) -> bool:
        number, process, host = self._rank()
        at = time.time()
        process.kill()
        assert who(self.run.event("end", at, OUTCOME_S)) == ("crash", number, host)
        return True

    def stop_rank(self) -> bool:
        number, process, host = self._rank()
        at = time.time()
        process.suspend()
        assert who(self.run.event("end", at, STANDS_STILL_S + OUTCOME_S)) == ("hang", number, host)
        return True

    def kill_launcher(self) -> bool:
        at = time.time()
        self.run.runner().kill()
        assert who(self.run.event("end", at, OUTCOME_S)) == ("crash", None, None)
        return True

    def kill_agent(self) -> bool:
        host = self.run.hosts[self.draw.choice([*self.run.places().values()])]
        # Its command line is also that of its ssh and shell.
        agents = [process for process in host.running(AGENT) if process.cmdline()[1:4] == ["-P", "-m", AGENT]]
        at = time.time()
        agents[0].kill()
        return self._loses(host, at, DEATH_S)

    def kill_checkpointer(self) -> bool:
        found = [(p, host) for host in self.run.hosts.values() for p in host.running(CHECKPOINTER)]
        process, host = self.draw.choice(found)
        at = time.time()
        process.kill()
        assert self.run.event("checkpointer_restart", at, DEATH_S)["host"] == host.name
        return False

    def kill_host(self) -> bool:
        host, at = self._other_host(), time.time()
        host.kill_processes()
        return self._loses(host, at, DEATH_S)

    def cut_link(self) -> bool:
        """Plugged in again as soon as it is given up, while what it did lives on there."""
        host, at = self._other_host(), time.time()
        host.unplug()
        try:
            self.run.event("host_lost", at, SILENCE_S)
        finally:
            host.plug()
        return self._loses(host, at, SILENCE_S)

    def cut_power(self) -> bool:
        host, at = self._other_host(), time.time()
        host.power_off()
        try:
            return self._loses(host, at, SILENCE_S)
        finally:
            host.power_on()

    def kill_leader(self) -> bool:
        at = self.run.signal(signal.SIGKILL)
        self.run.finish()
        self.run.assert_nothing_left(ORPHANS_S)
        assert self.run.events("end", at) == []
        self.run.start()
        return True

    def preempt(self) -> bool:
        at = self.run.signal(self.draw.choice([signal.SIGTERM, signal.SIGUSR1]))
        assert self.run.finish() == 75, self.run.said()
        assert self.run.event("end", at, MANY_S)["kind"] == "preemption"
        self.run.assert_nothing_left()
        self.run.start()
        return True


@pytest.mark.soak
@pytest.mark.timeout(600 + 150 * COUNT)
def test_random_faults(hosts: Network, tmp_path: Path, data: Path) -> None:
    print(f"SOAK={COUNT} SOAK_SEED={SEED}")
    draw = random.Random(SEED)
    recipe = recipe_of(
        data,
        train__steps=STEPS,
        launch__max_restarts=COUNT,
        launch__deadlines={"silence": STANDS_STILL_S},
    )
    train(write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "unbroken", "--processes", "2", timeout=1200)
    run = SupervisedRun(hosts, tmp_path, tmp_path / "recipe.yaml", HOSTFILE)
    soak = Soak(run, draw)
    run.start()
    run.wait_attempt(1)
    attempts = 1
    for number in range(COUNT):
        fault = draw.choice(soak.faults)
        run.wait_step(run.done() + draw.randint(1, 6))
        print(f"{number + 1}: attempt {attempts}, step {run.step()}: {fault.__name__}", flush=True)
        if fault():
            attempts += 1
            run.wait_attempt(attempts)
    assert run.finish(MANY_S + STEPS) == 0, run.said()
    # Nothing is told of but what was done.
    assert [event["attempt"] for event in run.events("start")] == list(range(1, attempts + 1))
    run.assert_nothing_left()
    run.audit(tmp_path / "unbroken", STEPS)
