"""Deadlines fit what the run has shown; hangs and stragglers are told apart, and the right rank is named."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraft.launch.deadlines import (
    ENOUGH,
    FACTOR,
    FLOOR_S,
    SILENCE_S,
    SLOW_FACTOR,
    SLOW_STEPS,
    START_SILENT_S,
    STOPPED_S,
    UNLEARNED_S,
    Deadlines,
    deadline,
    find_hang,
    find_stragglers,
)
from vitgraft.launch.observations import Phase, RankState

PHASES = get_args(Phase)
LIMITS: dict[Phase, float] = {"start": 100, "first_step": 100, "step": 50, "save": 200, "evaluate": 300}
ROUNDING = 1 + 1e-12
seconds = st.floats(0, 1e4, allow_nan=False)
phases = st.sampled_from(PHASES)


@given(phases, st.lists(seconds, min_size=ENOUGH, max_size=400))
def test_a_learned_limit_is_no_shorter_than_what_comes_again_and_again(phase: Phase, durations: list[float]) -> None:
    limit = deadline(phase, durations)
    recent = sorted(durations[-256:])
    assert limit >= FLOOR_S[phase]
    assert limit >= 2 * recent[-2]
    assert limit <= max(FLOOR_S[phase], FACTOR * recent[-1]) * ROUNDING
    assert deadline(phase, durations, fixed=7.0) == 7.0


@given(phases, st.lists(st.floats(0.1, 10), min_size=2 * ENOUGH, max_size=100), st.floats(2e3, 1e6))
def test_one_outlier_hardly_moves_it(phase: Phase, durations: list[float], outlier: float) -> None:
    limit = deadline(phase, [*durations, outlier])
    assert limit <= max(FLOOR_S[phase], FACTOR * max(durations)) * ROUNDING
    assert limit < outlier


@given(phases, st.lists(seconds, max_size=ENOUGH - 1))
def test_little_experience_gives_long_limits(phase: Phase, durations: list[float]) -> None:
    limit = deadline(phase, durations)
    assert limit >= UNLEARNED_S[phase] >= FLOOR_S[phase]
    assert all(limit >= FACTOR * duration for duration in durations)


@given(phases, st.lists(st.floats(80, 4e3), min_size=ENOUGH, max_size=50), st.floats(1, 10))
def test_a_slower_run_gets_longer_limits(phase: Phase, durations: list[float], factor: float) -> None:
    assert deadline(phase, [factor * value for value in durations]) * ROUNDING >= deadline(phase, durations)


def test_copies_into_memory_teach_nothing_about_the_disk() -> None:
    """A run whose saves took a moment waits for its disk behind the last one."""
    assert deadline("save", [0.2] * 50) == 1800.0
    assert deadline("evaluate", [0.2] * 50) == 300.0
    assert deadline("save", [600.0] * 50) == 3000.0


def test_what_another_world_has_taught_is_forgotten() -> None:
    deadlines = Deadlines({"save": 7.0})
    for _ in range(ENOUGH):
        deadlines.learn("step", 200.0)
    assert deadlines.limits()["step"] == 1000.0
    deadlines.forget()
    assert deadlines.limits() == {**UNLEARNED_S, "save": 7.0}


def ranks_of(*facts: tuple[Phase, int, float, float]) -> list[RankState]:
    """(phase, step, since, heard) of each rank; two on a host."""
    return [RankState(rank, f"h{rank // 2}", *fact) for rank, fact in enumerate(facts)]


states = st.tuples(phases, st.integers(0, 9), st.floats(0, 1e3), st.floats(0, 1e3))


@given(st.lists(states, max_size=6), st.floats(0, 2e3))
def test_a_gang_hangs_when_all_have_overstayed_or_one_is_silent(
    facts: list[tuple[Phase, int, float, float]], now: float
) -> None:
    ranks = ranks_of(*facts)
    hang = find_hang(ranks, LIMITS, now)
    overstayed = bool(ranks) and all(now - rank.since > LIMITS[rank.phase] for rank in ranks)
    silent = any(now - rank.heard > (START_SILENT_S if rank.phase == "start" else STOPPED_S) for rank in ranks)
    assert (hang is not None) == (overstayed or silent)
    if hang is not None:
        assert hang.seconds > hang.limit
        blamed = [rank for rank in ranks if rank.rank == hang.rank]
        assert [rank.host for rank in blamed] == ([] if hang.rank is None else [hang.host])
        quiet = [rank.heard for rank in ranks if now - rank.heard > SILENCE_S]
        if quiet:
            assert blamed[0].heard == min(quiet)


NOW = 1000.0


@pytest.mark.parametrize(
    ("facts", "blamed"),
    [
        # All work.
        ([("step", 7, 990, 999), ("step", 7, 980, 999)], "nobody"),
        # One waits for the other, which saves: that may take longer.
        ([("step", 7, 900, 999), ("save", 7, 900, 999)], "nobody"),
        ([("step", 7, 700, 999), ("save", 7, 700, 999)], 0),
        # SIGSTOP: silent, and its peers wait; found before the phase's limit.
        ([("step", 7, 930, 999), ("step", 7, 930, 935)], 1),
        ([("save", 7, 930, 999), ("save", 7, 930, 935)], 1),
        ([("save", 7, 930, 999), ("save", 7, 930, 945)], "nobody"),
        # A rank lives but does not come to the step's end; its peers are in the next.
        ([("step", 8, 940, 999), ("step", 7, 930, 999), ("step", 8, 940, 999)], 1),
        # A link is down: all wait alike.
        ([("step", 7, 930, 999), ("step", 7, 931, 999)], None),
        # One of many never starts.
        ([("first_step", 0, 800, 999), ("start", 0, 800, 999), ("first_step", 0, 800, 999)], 1),
    ],
)
def test_who_holds_the_others_up(facts: list[tuple[Phase, int, float, float]], blamed: object) -> None:
    hang = find_hang(ranks_of(*facts), LIMITS, NOW)
    assert ("nobody" if hang is None else hang.rank) == blamed


@given(
    st.lists(st.floats(0.9, 1.1), min_size=2, max_size=8),
    st.integers(0, 7),
    st.floats(2.0, 50.0),
    st.integers(SLOW_STEPS, 60),
)
def test_a_rank_that_is_slow_all_the_time_is_named_alone(
    usual: list[float], rank: int, factor: float, steps: int
) -> None:
    rank %= len(usual)
    row = [value * (factor if number == rank else 1) for number, value in enumerate(usual)]
    (found,) = find_stragglers([row] * steps)
    assert found.rank == rank
    assert found.ratio > SLOW_FACTOR
    assert found.seconds == row[rank]
    assert find_stragglers([row] * (SLOW_STEPS - 1)) == []


@given(st.lists(st.lists(st.floats(0.0, 1.45), min_size=4, max_size=4), max_size=60))
def test_like_ranks_are_not_named(noise: list[list[float]]) -> None:
    assert find_stragglers([[1.0 + 0.3 * value for value in row] for row in noise]) == []


def test_what_is_slow_now_and_then_is_no_straggler() -> None:
    quiet, late = [1.0, 1.0, 1.0], [1.0, 9.0, 1.0]
    assert find_stragglers([quiet, late] * SLOW_STEPS) == []
    assert [found.rank for found in find_stragglers([quiet] * 90 + [late] * SLOW_STEPS)] == [1]
    # Milliseconds are noise, whatever their ratio; another world starts anew.
    assert find_stragglers([[0.001, 0.009]] * SLOW_STEPS) == []
    assert find_stragglers([late] * SLOW_STEPS + [[1.0, 9.0]]) == []
    assert find_stragglers([[1.0]] * SLOW_STEPS) == []
    assert [found.rank for found in find_stragglers([[1.0, 4.0, 1.0, 8.0, 1.0]] * SLOW_STEPS)] == [3, 1]
