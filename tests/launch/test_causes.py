"""Every situation that a supervisor can find has one cause: the first failure, not what follows from it."""

from __future__ import annotations

import signal
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraft.configs.errors import ErrorCause
from vitgraft.launch.causes import ADVICE, EXIT_CODES, cause_of
from vitgraft.launch.observations import Hang, HostState, Kind, Observation, RankEnd, ReportedError

HOSTS = ("a", "b")
LOST = "lost the other ranks: Connection closed by peer"


def error(
    rank: int, at: float, code: int, text: str, cause: ErrorCause | None = None, step: int | None = None
) -> ReportedError:
    return ReportedError(rank, HOSTS[rank % 2], at, code, text, cause, step)


def lost(rank: int, at: float) -> ReportedError:
    return error(rank, at, 5, LOST, "lost_peers")


def end(rank: int, at: float, code: int, by_us: bool = False) -> RankEnd:
    return RankEnd(rank, HOSTS[rank % 2], at, code, by_us)


def victims(*ranks: int, at: float = 11.0) -> tuple[ReportedError, ...]:
    """Ranks that say they lost the others."""
    return tuple(lost(rank, at) for rank in ranks)


def hosts(**facts: HostState) -> tuple[HostState, ...]:
    return tuple(facts.get(name, HostState(name)) for name in HOSTS)


KILL, TERM, INT = -signal.SIGKILL, -signal.SIGTERM, signal.SIGINT
HANG = Hang(at=90.0, phase="step", step=7, seconds=80.0, limit=60.0, rank=1, host="b")
NAN = "step 8: loss box is not finite; samples: x.jpg; look at these samples"

# What is seen; the cause, its rank and its host.
SITUATIONS: dict[str, tuple[Observation, Kind | None, int | None, str | None]] = {
    "done": (Observation(ends=(end(0, 1, 0), end(1, 1, 0))), None, None, None),
    "a rank is killed": (
        Observation(victims(0), (end(1, 10.5, KILL), end(0, 11, 5)), hosts()),
        "crash",
        1,
        "b",
    ),
    "its end is noticed after the others' complaints": (
        Observation((lost(0, 10.0),), (end(0, 10.1, 5), end(1, 10.4, KILL)), hosts()),
        "crash",
        1,
        "b",
    ),
    "a victim words it otherwise": (
        Observation((error(0, 10, 5, "Broken pipe", "lost_peers"),), (end(0, 10, 5), end(1, 11, KILL))),
        "crash",
        1,
        "b",
    ),
    "a segmentation fault": (Observation(ends=(end(0, 1, -signal.SIGSEGV),)), "crash", 0, "a"),
    "a real-time signal": (Observation(ends=(end(0, 1, -50),)), "crash", 0, "a"),
    "the kernel kills for memory": (
        Observation(ends=(end(1, 10, KILL), end(0, 11, KILL, True)), hosts=hosts(b=HostState("b", memory_kills=1))),
        "host_memory",
        1,
        "b",
    ),
    "it kills on another host": (
        Observation(ends=(end(0, 10, KILL),), hosts=hosts(b=HostState("b", memory_kills=1))),
        "crash",
        0,
        "a",
    ),
    "Python has no memory": (
        Observation((error(0, 1, 5, "out of memory: MemoryError", "host_memory"),)),
        "host_memory",
        0,
        "a",
    ),
    "a GPU has no memory": (
        Observation((error(1, 1, 5, "out of memory: tried to allocate 2 GiB", "device_memory"),)),
        "device_memory",
        1,
        "b",
    ),
    "a loss is not finite": (
        Observation((error(1, 5, 5, NAN, "non_finite", 8), error(0, 5.1, 5, NAN, "non_finite", 8))),
        "non_finite",
        1,
        "b",
    ),
    "a gradient is not finite": (
        Observation((error(0, 5, 5, "step 9: the gradient's norm is inf", "non_finite", 9),)),
        "non_finite",
        0,
        "a",
    ),
    "a sample is broken": (
        Observation((error(1, 5, 3, "x.tar: truncated"), lost(0, 5.5))),
        "bad_data",
        1,
        "b",
    ),
    "the recipe is wrong": (Observation((error(0, 1, 2, "model.head: no"),)), "bad_configuration", 0, "a"),
    "no checkpoint fits": (Observation((error(0, 1, 4, "step-3: another model"),)), "bad_checkpoint", 0, "a"),
    "a defect": (
        Observation((error(1, 4, 1, "a defect of vitgraft: KeyError"), lost(0, 4.5))),
        "defect",
        1,
        "b",
    ),
    "a defect that mentions memory": (Observation((error(0, 4, 1, "a defect: out of memory map"),)), "defect", 0, "a"),
    "a failure without words": (Observation(ends=(end(1, 4, 3),)), "bad_data", 1, "b"),
    "an unknown code": (Observation(ends=(end(1, 4, 117),)), "crash", 1, "b"),
    "the disk is full": (
        Observation((error(0, 4, 5, "step 3: no space left on the disk of RUN; free some", "no_space"),)),
        "full_disk",
        0,
        "a",
    ),
    "the disk is full and nobody can say so": (
        Observation((error(0, 4, 5, "OSError: write failed"),), hosts=hosts(a=HostState("a", run_free=0))),
        "full_disk",
        0,
        "a",
    ),
    "words alone name no cause": (Observation((error(0, 4, 5, f"{LOST}: no space left, nan"),)), "crash", 0, "a"),
    "a defect on a full disk": (
        Observation((error(0, 4, 1, "a defect"),), hosts=hosts(a=HostState("a", run_free=0))),
        "defect",
        0,
        "a",
    ),
    "shared memory is full": (Observation(ends=(end(0, 4, -signal.SIGBUS),)), "crash", 0, "a"),
    "a host is gone": (
        Observation(
            victims(0, at=31),
            (end(0, 31, 5), end(1, 30, 255)),
            hosts(b=HostState("b", lost_at=30)),
        ),
        "lost_node",
        None,
        "b",
    ),
    "two hosts are gone one after the other": (
        Observation(hosts=(HostState("a", lost_at=31), HostState("b", lost_at=30))),
        "lost_node",
        None,
        "b",
    ),
    "a host goes after a rank failed": (
        Observation((error(0, 5, 5, NAN, "non_finite"),), hosts=hosts(b=HostState("b", lost_at=60))),
        "non_finite",
        0,
        "a",
    ),
    "ranks lose each other": (
        Observation(victims(0, 1), (end(0, 11, 5), end(1, 11, 5)), hosts()),
        "network",
        0,
        "a",
    ),
    "the gang hangs": (
        Observation(ends=(end(0, 95, KILL, True), end(1, 95, KILL, True)), hosts=hosts(), hang=HANG),
        "hang",
        1,
        "b",
    ),
    "it hangs though nobody is to blame": (
        Observation(hang=Hang(90, "save", 7, 4000, 3600, None, None)),
        "hang",
        None,
        None,
    ),
    "it hangs because a host is gone": (
        Observation(hosts=hosts(a=HostState("a", lost_at=20)), hang=HANG),
        "lost_node",
        None,
        "a",
    ),
    "preempted": (Observation(ends=(end(0, 1, 75), end(1, 1, 75)), asked=signal.SIGTERM), "preemption", None, None),
    "preempted by SIGUSR1": (Observation(ends=(end(0, 1, 75),), asked=signal.SIGUSR1), "preemption", None, None),
    "preempted before a rank could answer": (
        Observation(ends=(end(0, 1, TERM), end(1, 1, 5)), errors=(lost(1, 1),), asked=signal.SIGTERM),
        "preemption",
        None,
        None,
    ),
    "interrupted": (Observation(ends=(end(0, 1, 75),), asked=INT), "interrupt", None, None),
    "a rank was asked directly": (Observation(ends=(end(0, 1, 75), end(1, 1, 75))), "preemption", 0, "a"),
    "asked in the last step": (
        Observation(
            ends=(end(0, 1, 0), end(1, 1, 0)),
            hosts=hosts(a=HostState("a", ranks=(0,)), b=HostState("b", ranks=(1,))),
            asked=signal.SIGTERM,
        ),
        None,
        None,
        None,
    ),
    "asked when one of two has ended": (
        Observation(
            ends=(end(0, 1, 0),),
            hosts=hosts(a=HostState("a", ranks=(0,)), b=HostState("b", ranks=(1,))),
            asked=signal.SIGTERM,
        ),
        "preemption",
        None,
        None,
    ),
    "asked before any rank was there": (Observation(hosts=hosts(), asked=INT), "interrupt", None, None),
    "a host of the evaluator alone is gone": (
        Observation(victims(0, at=40), (end(0, 40, 5),), hosts(b=HostState("b", lost_at=30, ranks=()))),
        "network",
        0,
        "a",
    ),
    "a host is gone when all is done": (
        Observation(ends=(end(0, 30, 0), end(1, 30, 0)), hosts=hosts(b=HostState("b", lost_at=50, ranks=(1,)))),
        None,
        None,
        None,
    ),
    "a host is gone long after its rank failed": (
        Observation(ends=(end(1, 30, KILL),), hosts=hosts(b=HostState("b", lost_at=50, ranks=(1,)))),
        "crash",
        1,
        "b",
    ),
    "a host is gone and one of its ranks was ended before": (
        Observation(ends=(end(1, 30, KILL, True),), hosts=hosts(b=HostState("b", lost_at=50, ranks=(1, 3)))),
        "lost_node",
        None,
        "b",
    ),
    "a rank fails as its host goes": (
        Observation(victims(0), (end(1, 10, KILL),), hosts(b=HostState("b", lost_at=11, ranks=(1,)))),
        "lost_node",
        None,
        "b",
    ),
    "it fails while it stops": (
        Observation(
            (error(0, 4, 5, "no space left", "no_space"),), (end(0, 4, 5), end(1, 5, 75)), asked=signal.SIGTERM
        ),
        "full_disk",
        0,
        "a",
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_cause_of(name: str) -> None:
    seen, kind, rank, host = SITUATIONS[name]
    cause = cause_of(seen)
    if kind is None:
        assert cause is None
        return
    assert cause is not None
    assert (cause.kind, cause.rank, cause.host) == (kind, rank, host)
    assert (cause.exit_code, cause.advice) == (EXIT_CODES[kind], ADVICE[kind])
    assert cause.text
    assert "\n" not in cause.text


def test_every_kind_has_a_situation_a_code_and_advice() -> None:
    kinds = set(get_args(Kind))
    assert {kind for _, kind, _, _ in SITUATIONS.values()} - {None} == kinds
    assert set(EXIT_CODES) == set(ADVICE) == kinds
    assert set(EXIT_CODES.values()) == {1, 2, 3, 4, 5, 75, 130}


def test_the_words_that_name_the_culprit() -> None:
    def text(name: str) -> str:
        cause = cause_of(SITUATIONS[name][0])
        assert cause is not None
        return cause.text

    assert text("the gang hangs") == "rank 1 on b does not get on: at step 7, a step for 80 s, expected 60 s"
    assert text("it hangs though nobody is to blame").startswith("no rank gets on: at step 7, save for")
    assert text("a host is gone") == "b is gone"
    assert "SIGSEGV" in text("a segmentation fault")
    assert "signal 50" in text("a real-time signal")


def test_the_step_is_that_of_the_failure() -> None:
    steps = {name: cause_of(SITUATIONS[name][0]) for name in ("a loss is not finite", "the gang hangs", "a defect")}
    assert [cause and cause.step for cause in steps.values()] == [8, 7, None]


def test_a_rank_that_knows_its_cause_keeps_its_exit_code() -> None:
    """A cache on a full disk ends a run with the code of bad data, and is a full disk all the same."""
    cause = cause_of(Observation((error(0, 4, 3, "cache: disk full", "no_space"),)))
    assert cause is not None
    assert (cause.kind, cause.exit_code, cause.advice) == ("full_disk", 3, ADVICE["full_disk"])


@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.floats(0, 100), st.sampled_from([0, 1, 2, 3, 4, 5, 75, 130, -9, -11])),
        max_size=8,
    ),
    st.sampled_from([None, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]),
)
def test_victims_never_hide_the_first_failure(ends: list[tuple[int, float, int]], asked: int | None) -> None:
    """Whatever else ended, and however many lost the others, the first real failure is the cause."""
    first = error(9, -50.0, 3, "x.tar: truncated")
    seen = Observation(
        errors=(first, *(lost(rank, at) for rank, at, _ in ends)),
        ends=tuple(end(rank, at, code) for rank, at, code in ends),
        asked=asked,
    )
    cause = cause_of(seen)
    assert cause is not None
    assert (cause.kind, cause.rank, cause.text) == ("bad_data", 9, "x.tar: truncated")
