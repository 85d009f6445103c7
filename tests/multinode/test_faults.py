"""Faults on real hosts: what the supervisor says of each and when, and that none of them changes what is trained."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from multinode.campaign import (
    DEATH_S,
    MANY_S,
    ORPHANS_S,
    OUTCOME_S,
    RUNNER,
    SAMPLES,
    SILENCE_S,
    STEPS,
    SupervisedRun,
    lines,
    recipe_of,
    who,
)
from multinode.namespaces import Network, wait_for
from support import train, write_recipe

from vitgraft.launch.agent import SILENCE_S as AGENT_SILENCE_S
from vitgraft.launch.links import CONNECT_S

STANDS_STILL_S = 12.0
"""Of launch.deadlines.silence. Importing torch may keep a rank from giving a sign of life for some seconds."""
STRAGGLER_S = 90.0
"""Twenty steps, most of them slow."""
FULL_S = 60.0
"""Until the next checkpoint fails, and all have ended."""
TWO = "host1 slots=1\nhost2 slots=1\n"
SPARE = TWO + "host3 slots=1 spare=true\n"
THREE = TWO + "host3 slots=1\n"


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks on one host, without any fault."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(write_recipe(folder / "recipe.yaml", recipe_of(data)), folder / "run", "--processes", "2")
    return folder / "run"


def test_ranks_jobs_leaders_and_launchers_end(hosts: Network, tmp_path: Path, data: Path, unbroken: Path) -> None:
    """With an evaluator on a host of its own, and once without DeepSpeed's launcher."""
    recipe = recipe_of(data, data__val={"path": str(data)}, evaluator={"host": "host3", "threads": 1})
    run = SupervisedRun(hosts, tmp_path, write_recipe(tmp_path / "recipe.yaml", recipe), SPARE)
    run.start()
    run.wait_step(6)
    at = time.time()
    hosts.hosts["host3"].kill_processes()
    assert run.event("evaluator_absent", at, DEATH_S)["host"] == "host3"
    assert run.event("host_lost", at, DEATH_S)["host"] == "host3"

    run.wait_step(8)
    process, host = run.rank(1)
    at = time.time()
    process.kill()
    end = run.event("end", at, OUTCOME_S)
    assert (who(end), end["code"], host) == (("crash", 1, "host2"), 5, "host2")
    assert "SIGKILL" in end["reason"]
    assert run.event("restart", at)["kind"] == "crash"
    begun = run.wait_attempt(2)
    assert begun["resume"] >= 4
    assert run.event("host_back", at)["host"] == "host3"

    run.wait_step(begun["resume"] + 4)
    at = run.signal(signal.SIGTERM)
    assert run.finish() == 75, run.said()
    assert run.event("stop_asked", at, DEATH_S)["signal"] == "SIGTERM"
    end = run.event("end", at, MANY_S)
    assert (end["kind"], end["code"]) == ("preemption", 75)
    run.assert_nothing_left()
    stopped = run.step()

    run.start(pdsh=False)
    begun = run.wait_attempt(3)
    assert begun["resume"] == stopped
    assert "pdsh is not installed here: the ranks start over plain ssh" in begun["notes"]
    run.wait_step(stopped + 4)
    assert hosts.hosts["host1"].running(RUNNER) == []
    run.signal(signal.SIGKILL)
    run.finish()
    run.assert_nothing_left(ORPHANS_S)

    run.start()
    begun = run.wait_attempt(4)
    run.wait_step(begun["resume"] + 4)
    # The ranks train on until they are ended, perhaps to the last step.
    at = time.time()
    run.runner().kill()
    end = run.event("end", at, OUTCOME_S)
    assert who(end) == ("crash", None, None)
    assert "DeepSpeed's launcher ended with code -9" in end["reason"]
    assert run.event("restart", at)["hosts"] == {"host1": 1, "host2": 1}

    assert run.finish() == 0, run.said()
    run.assert_nothing_left()
    run.audit(unbroken, STEPS)
    assert [event["code"] for event in run.events("end")] == [5, 75, 5, 0]
    result = json.loads((run.view / "results" / f"step-{STEPS:08d}.json").read_text())
    assert result["samples"] == SAMPLES
    where = {log.name.split(".")[1] for log in (run.view / "logs").glob("evaluator.*.log")}
    assert where == {"host3"}


@pytest.mark.soak
def test_hosts_that_are_not_there_die_and_come_back(hosts: Network, tmp_path: Path, data: Path, unbroken: Path) -> None:
    """The second never comes up, so the spare takes part. The spare dies, and the second, which has come up
    meanwhile, takes its place back. The second loses its power, and the spare takes over once more."""
    run = SupervisedRun(hosts, tmp_path, write_recipe(tmp_path / "recipe.yaml", recipe_of(data)), SPARE)
    hosts.hosts["host2"].power_off()
    at = time.time()
    run.start()
    absent = run.event("host_absent", at)
    assert absent["host"] == "host2"
    begun = run.wait_attempt(1)
    assert begun["hosts"] == {"host1": 1, "host3": 1}
    hosts.hosts["host2"].power_on()

    run.wait_step(8)
    at = time.time()
    hosts.hosts["host3"].kill_processes()
    assert run.event("host_lost", at, DEATH_S)["host"] == "host3"
    assert who(run.event("end", at, OUTCOME_S)) == ("lost_node", None, "host3")
    begun = run.wait_attempt(2)
    assert begun["hosts"] == {"host1": 1, "host2": 1}
    assert "host2 takes part" in run.event("restart", at)["notes"]

    run.wait_step(begun["resume"] + 6)
    at = time.time()
    hosts.hosts["host2"].power_off()
    assert run.event("host_lost", at, SILENCE_S)["host"] == "host2"
    assert who(run.event("end", at, SILENCE_S + OUTCOME_S)) == ("lost_node", None, "host2")
    begun = run.wait_attempt(3)
    assert begun["hosts"] == {"host1": 1, "host3": 1}
    assert begun["time"] - at < SILENCE_S + OUTCOME_S + 2 * CONNECT_S

    assert run.finish() == 0, run.said()
    run.assert_nothing_left()
    run.audit(unbroken, STEPS)


@pytest.mark.soak
def test_a_link_down_and_the_leader_killed(hosts: Network, tmp_path: Path, data: Path, unbroken: Path) -> None:
    """The host that is cut off has rank 0, which commits, and sees the shared storage all along."""
    hostfile = "host2 slots=1\nhost3 slots=1\nhost1 slots=1 spare=true\n"
    run = SupervisedRun(hosts, tmp_path, write_recipe(tmp_path / "recipe.yaml", recipe_of(data)), hostfile)
    run.start()
    run.wait_step(8)
    at = time.time()
    hosts.hosts["host2"].unplug()
    assert run.event("host_lost", at, SILENCE_S)["host"] == "host2"
    assert who(run.event("end", at, SILENCE_S + OUTCOME_S)) == ("lost_node", None, "host2")
    begun = run.wait_attempt(2)
    assert begun["hosts"] == {"host3": 1, "host1": 1}
    wait_for(lambda: not vitgraft_on(hosts, "host2"), "the old attempt's end", at + AGENT_SILENCE_S + 10 - time.time())
    hosts.hosts["host2"].plug()
    run.wait_step(begun["resume"] + 6)
    attempts = {checkpoint_attempt(path) for path in newer_checkpoints(run, begun["resume"])}
    assert attempts == {2}

    at = run.signal(signal.SIGKILL)
    run.finish()
    run.assert_nothing_left(ORPHANS_S)
    killed = time.time()
    run.start()
    begun = run.wait_attempt(3)
    assert begun["hosts"] == {"host2": 1, "host3": 1}
    assert run.events("end", at) == []
    assert begun["time"] > killed

    run.wait_step(begun["resume"] + 4)
    run.signal(signal.SIGINT)
    time.sleep(0.05)
    at = run.signal(signal.SIGINT)
    assert run.finish(ORPHANS_S) == 130, run.said()
    run.assert_nothing_left()
    assert time.time() - at < ORPHANS_S
    run.start()
    assert run.finish() == 0, run.said()
    run.assert_nothing_left()
    run.audit(unbroken, STEPS)


def vitgraft_on(hosts: Network, name: str) -> list[str]:
    """Processes of ours on a host; an sshd notices later that nobody is at the other end any more."""
    return [line for line in lines(hosts.hosts[name]) if "vitgraft" in line and not line.startswith("sshd")]


def newer_checkpoints(run: SupervisedRun, step: int) -> list[Path]:
    found = (run.view / "checkpoints").glob("step-????????/manifest.json")
    return [path for path in found if int(path.parent.name.removeprefix("step-")) > step]


def checkpoint_attempt(manifest: Path) -> int:
    return int(json.loads(manifest.read_text())["attempt"])


@pytest.mark.soak
def test_a_slow_rank_and_one_that_stands_still(hosts: Network, tmp_path: Path, data: Path, unbroken: Path) -> None:
    recipe = recipe_of(data, launch__deadlines={"silence": STANDS_STILL_S})
    run = SupervisedRun(hosts, tmp_path, write_recipe(tmp_path / "recipe.yaml", recipe), TWO)
    run.start()
    run.wait_step(4)
    at = time.time()
    process, _ = run.rank(1)
    # It runs a quarter of the time.
    while not run.events("straggler", at) and time.time() - at < STRAGGLER_S:
        process.suspend()
        time.sleep(0.3)
        process.resume()
        time.sleep(0.1)
    slow = run.event("straggler", at, STRAGGLER_S)
    assert (slow["rank"], slow["host"]) == (1, "host2")
    assert slow["ratio"] > 1.5
    assert run.events("end") == []

    at = time.time()
    process.suspend()
    end = run.event("end", at, STANDS_STILL_S + OUTCOME_S)
    assert who(end) == ("hang", 1, "host2")
    assert "rank 1 on host2 does not get on" in end["reason"]
    assert run.finish() == 0, run.said()
    run.assert_nothing_left()
    run.audit(unbroken, STEPS)


@pytest.mark.soak
def test_a_full_disk_ends_the_run(hosts: Network, tmp_path: Path, data: Path, unbroken: Path) -> None:
    """Nothing is started again for it; with room made, the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    view = hosts.mount_tmpfs(disk, 64)
    try:
        run = SupervisedRun(hosts, disk, write_recipe(tmp_path / "recipe.yaml", recipe_of(data)), TWO, view)
        run.start()
        run.wait_step(8)
        filler, at = view / "filler", time.time()
        while run.going() and time.time() - at < FULL_S:
            fill(filler)
            time.sleep(0.05)
        assert run.finish() == 5, run.said()
        end = run.event("end", at, FULL_S)
        assert (end["kind"], end["code"]) == ("full_disk", 5)
        assert run.events("restart") == []
        run.assert_nothing_left()
        filler.unlink()
        run.start()
        assert run.finish() == 0, run.said()
        run.assert_nothing_left()
        run.audit(unbroken, STEPS)
    finally:
        hosts.unmount_tmpfs(disk)


def fill(filler: Path) -> None:
    """All of a disk but a little: what is told of the end must find room."""
    with filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while (disk := os.statvfs(filler)).f_bavail * disk.f_frsize > 256 << 10:
            stream.write(bytes(64 << 10))


@pytest.mark.soak
def test_a_host_that_fails_twice_is_left_out_once(hosts: Network, tmp_path: Path, data: Path, unbroken: Path) -> None:
    """A world of three, two and three again."""
    run = SupervisedRun(hosts, tmp_path, write_recipe(tmp_path / "recipe.yaml", recipe_of(data)), THREE)
    run.start()
    for attempt, (rank, host) in enumerate([(2, "host3"), (2, "host3"), (1, "host2")], start=1):
        begun = run.wait_attempt(attempt)
        run.wait_step((begun["resume"] or 0) + 6)
        at = time.time()
        run.rank(rank)[0].kill()
        assert who(run.event("end", at, OUTCOME_S)) == ("crash", rank, host)
    assert run.finish() == 0, run.said()
    assert [begun["world"] for begun in run.events("start")] == [3, 3, 2, 3]
    assert run.events("start")[2]["hosts"] == {"host1": 1, "host2": 1}
    run.assert_nothing_left()
    run.audit(unbroken, STEPS, exact=False)
