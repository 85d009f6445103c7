"""Which device and which GPUs an attempt uses, where its evaluator is, and what is refused about hosts and slots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support_agents import PlayedAgent, obedient
from support_writers import make_run

from vitgraft.configs.errors import ConfigError
from vitgraft.launch import supervisor as module
from vitgraft.launch.backends import HereBackend, HostfileBackend
from vitgraft.launch.hosts import Host, Slots
from vitgraft.launch.node_backend import NodeBackend
from vitgraft.launch.nodes import NodePlace
from vitgraft.launch.observations import Cause, Failure
from vitgraft.launch.planning import Plan, difference_of
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.supervisor import Supervisor
from vitgraft.launch.training import Where, _backend
from vitgraft.launch.ui import Screen


@pytest.fixture(autouse=True)
def no_wish_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever starts the tests has one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


class ByHostfile(HostfileBackend):
    """Hosts that are played."""

    agents: dict[str, Any]

    def connect(self, host: Host, *, again: bool, since: float, meanwhile: Callable[[], None]) -> Any:
        return self.agents[host.name]

    def launcher(self) -> Any:
        return None


def supervisor(folder: Path, slots: Slots, gpus: dict[str, int], **settings: Any) -> Supervisor:
    """Of these hosts, which answer."""
    run, recipe = make_run(folder / "run", **{"launch__device": "auto", **settings})
    backend = ByHostfile([Host(name, len(numbers)) for name, numbers in slots.items()], slots, [])
    backend.agents = {name: PlayedAgent(name, obedient({0: 0, 1: 0})) for name in slots}
    for name, count in gpus.items():
        backend.agents[name].facts["gpus"] = count
    made = Supervisor(open_run(run, recipe, "auto"), recipe, backend, Screen(), str(folder))
    made.roster.links.update(backend.agents)
    return made


def ranks(slots: Slots) -> dict[str, int]:
    return {host: len(numbers) for host, numbers in slots.items()}


@pytest.mark.parametrize(
    ("slots", "gpus", "device", "expected"),
    [
        ({"a": (0, 1), "b": (0, 1)}, {"a": 0, "b": 0}, "auto", "cpu"),
        ({"a": (0, 1), "b": (0, 1)}, {"a": 2, "b": 4}, "auto", "cuda"),
        ({"a": (2, 3)}, {"a": 4}, "auto", "cuda"),
        ({"a": tuple(range(8))}, {"a": 4}, "cpu", "cpu"),
        ({"a": tuple(range(8))}, {"a": 4}, "auto", r"a has 4 GPUs for 8 ranks \(slots 0,1,.*correct its slots, or"),
        ({"a": (6, 7)}, {"a": 4}, "auto", r"a has 4 GPUs for 2 ranks \(slots 6,7\); correct"),
        # Else the host whose driver failed would turn all to the CPU.
        ({"a": (0,), "b": (0,)}, {"a": 1, "b": 0}, "auto", "launch.device: auto, but b has 0 GPUs for 1 ranks"),
        ({"a": (0,)}, {"a": 0}, "cuda", "launch.device: cuda, but a has 0 GPUs for 1 ranks"),
    ],
)
def test_the_device_of_a_run(tmp_path: Path, slots: Slots, gpus: dict[str, int], device: str, expected: str) -> None:
    made = supervisor(tmp_path, slots, gpus, launch__device=device)
    if expected in ("cpu", "cuda"):
        assert made._plan(ranks(slots)).device == expected
        return
    with pytest.raises(ConfigError, match=expected):
        made._plan(ranks(slots))


def test_the_evaluator_takes_a_gpu_that_no_rank_uses(tmp_path: Path) -> None:
    slots = {"a": (0, 1, 2, 3), "b": (2, 3)}
    settings = {"val": "nowhere", "evaluator__host": "b"}
    plan = supervisor(tmp_path, slots, {"a": 4, "b": 4}, **settings)._plan(ranks(slots))
    assert plan.evaluator is not None
    assert (plan.device, plan.evaluator[0], plan.evaluator[1].device) == ("cuda", "b", "cuda:0")


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_an_evaluators_host_that_is_gone_is_told_of(tmp_path: Path, when: str, evaluated: bool) -> None:
    """And the run is done all the same."""
    made = supervisor(tmp_path, {"a": (0, 1), "b": (0, 1)}, {"a": 0, "b": 0}, val="nowhere", evaluator__host="b")
    run = made.handle.path
    if evaluated:
        # Runs that have no checkpoint are done at step 0.
        (run / "results" / "step-00000000.json").touch()
    if when == "before":
        made.roster.links["b"].close()
    else:
        made.backend.agents["b"].gone = "nothing was heard of it"  # type: ignore[attr-defined]
    assert made._attempt({"a": 2}) is None
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = [(event["event"], event.get("host")) for event in events if event["event"].startswith("evaluator")]
    assert told == [("evaluator_absent", "b"), *([] if evaluated else [("evaluator_gave_up", "b")])]
    assert events[-1]["code"] == 0


def test_an_evaluators_host_needs_no_ranks(tmp_path: Path) -> None:
    made = supervisor(tmp_path, {"a": (0, 1), "b": (0, 1)}, {"a": 0, "b": 0}, val="nowhere", evaluator__host="b")
    made.roster.links["b"].facts["cores"] = 6
    made.roster.links["a"].facts["cores"] = 6
    plan = made._plan({"a": 2})
    assert (plan.threads, plan.evaluator[1].threads if plan.evaluator else 0) == (1, 6)
    beside = made._plan({"a": 2, "b": 2}).evaluator
    assert beside is not None
    assert beside[1].threads == 2
    assert made._attempt({"a": 2}) is None
    (begin,) = [order["orders"] for order in made.backend.agents["b"].told if order["do"] == "begin"]  # type: ignore[attr-defined]
    assert (begin["ranks"], begin["evaluator"]) == ([], {"device": "cpu", "threads": 6})
    events = [json.loads(line)["event"] for line in (made.handle.path / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "end"]


def threads_of(folder: Path, cores: dict[str, int], **settings: Any) -> str:
    slots: Slots = dict.fromkeys(cores, (0, 1))
    made = supervisor(folder, slots, dict.fromkeys(cores, 0), **{"launch__threads": None, **settings})
    for host, count in cores.items():
        made.roster.links[host].facts["cores"] = count
    plan = made._plan(dict.fromkeys(cores, 2))
    return f"{plan.threads}; {plan.why}; {plan.note}"


def test_threads_come_from_the_recipe_the_user_or_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of(tmp_path / "1", {"a": 8, "b": 9}) == "4; None; None"
    assert threads_of(tmp_path / "2", {"a": 8, "b": 2}) == (
        "1; None; b has cores for 1 thread a rank, a for 4: all ranks use 1; launch.threads sets another number"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of(tmp_path / "3", {"a": 8, "b": 2}) == "3; OMP_NUM_THREADS; None"
    assert threads_of(tmp_path / "4", {"a": 8}, launch__threads=5) == "5; launch.threads; None"


def test_a_containers_quota_is_said(tmp_path: Path) -> None:
    made = supervisor(tmp_path, {"a": (0, 1)}, {"a": 0}, launch__threads=None)
    made.roster.links["a"].facts |= {"cores": 4, "quota": 4.5}
    plan = made._plan({"a": 2})
    assert (plan.threads, plan.why) == (2, "a has a CPU quota of 4.5 cores")


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({}, None),
        (
            {"threads": 2},
            "with 3 threads each, .* 2 ranks on cpu with 2 threads each: .*; launch.threads keeps a number",
        ),
        ({"world": 4}, "has 2 ranks on cpu .* checkpoint 4 ranks on cpu .* the last bits of losses are not$"),
        ({"device": "cuda"}, "checkpoint 2 ranks on cuda"),
        ({"threads": None}, None),
    ],
)
def test_what_changes_last_bits_at_a_resume_is_said(before: dict[str, Any], said: str | None) -> None:
    plan = Plan({"a": 2}, "cpu", 3)
    found = difference_of({"world": 2, "device": "cpu", "threads": 3, **before}, plan)
    assert found is None if said is None else re.search(said, found or "")
    on_gpus = Plan({"a": 2}, "cuda", 3)
    assert difference_of({"world": 2, "device": "cuda", "threads": 1}, on_gpus) is None


def test_the_attempt_is_compared_with_the_one_that_wrote_the_checkpoint(tmp_path: Path) -> None:
    """Shown, kept in the log, and in the events of the new start."""
    made = supervisor(tmp_path, {"a": (0, 1)}, {"a": 0}, launch__threads=2)
    for attempt, threads in (1, 2), (2, 1), (3, 2):
        made.handle.attempt = attempt
        made.handle.event("start", world=2, device="cpu", threads=threads)
    wrote = SimpleNamespace(manifest=SimpleNamespace(attempt=2), step=0, path=Path("step-00000000"))
    made.handle.resume, made.handle.attempt = cast(Any, wrote), 4
    assert made._attempt({"a": 2}) is None
    last = [json.loads(line) for line in (made.handle.path / "events.jsonl").read_text().splitlines()][-2]
    assert (last["event"], last["attempt"], last["threads"]) == ("start", 4, 2)
    assert last["notes"] == [
        "this attempt has 2 ranks on cpu with 2 threads each, the one that wrote its checkpoint 2 ranks on cpu with "
        "1 thread each: the samples are the same, the last bits of losses are not; launch.threads keeps a number"
    ]


def test_the_gpus_of_ranks(tmp_path: Path) -> None:
    assert list(HostfileBackend([], {"a": (1, 3, 5)}, []).used("a", 2)) == [1, 3]
    assert list(HereBackend("a", 3, 0).used("a", 3)) == [0, 1, 2]
    nodes = NodeBackend(NodePlace(2, 0, "127.0.0.1", 0), 2, tmp_path, 0, print)
    assert list(nodes.used("node-1", 2)) == [0, 1]
    nodes.close()


def test_limits_of_another_world_are_forgotten(tmp_path: Path) -> None:
    slots = {"a": (0, 1)}
    made = supervisor(tmp_path, slots, {"a": 0})
    for before, left in ({"a": 1, "b": 1}, 500.0), ({"a": 2, "b": 2}, 1800.0):
        made._deadlines.forget()
        for _ in range(8):
            made._deadlines.learn("step", 100.0)
        made.record.append(Failure(Cause("crash", 5, "it died", "mend it"), 0, hosts=before))
        assert made._attempt(ranks(slots)) is None
        assert made._deadlines.limits()["step"] == left


def test_the_only_host_of_a_hostfile_is_examined_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def preflight(links: list[Any], *_: object) -> tuple[dict[str, str], list[str]]:
        asked.append([link.host for link in links])
        return {"a": "versions: another torch"}, []

    monkeypatch.setattr(module, "preflight", preflight)
    made = supervisor(tmp_path, {"a": (0, 1)}, {"a": 0}, launch__threads=None)
    made.roster.links.clear()
    with pytest.raises(ConfigError, match="a: versions: another torch"):
        made._first_ranks()
    assert asked == [["a"]]


@pytest.mark.parametrize(("include", "exclude"), [("a", ""), ("", "b")])
def test_an_evaluator_on_a_host_that_is_left_out_is_refused(tmp_path: Path, include: str, exclude: str) -> None:
    _, recipe = make_run(tmp_path / "run", val="nowhere", evaluator__host="b")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\n")
    assert recipe.evaluator is not None
    with pytest.raises(ConfigError, match=r"evaluator\.host: b is not among the hosts of .* that are used \(a\)"):
        _backend(recipe, Where(hostfile=hostfile, include=include, exclude=exclude), Screen())
    _backend(recipe, Where(hostfile=hostfile), Screen())
