"""Recovery over single situations, and over random campaigns: it ends, and never starts what must not be started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitgraft.configs.worlds import possible_worlds
from vitgraft.launch.causes import ADVICE, EXIT_CODES
from vitgraft.launch.hosts import Host
from vitgraft.launch.observations import Cause, Failure, Kind
from vitgraft.launch.recovery import (
    HOST_FAULTS,
    NO_RESTART,
    Policy,
    Restart,
    Stop,
    decide,
    left_out,
    non_finite_verdict,
    open_fault,
    place,
    restarts_in_vain,
)

HOSTS = [Host("a", 4), Host("b", 4), Host("s", 4, spare=True)]
ALL = {"a", "b", "s"}
WORLDS = [1, 2, 4, 8]
BOTH = {"a": 4, "b": 4}


def failure(
    kind: Kind, host: str | None = None, *, checkpoint: int = 0, step: int | None = None, entries: Sequence[str] = ()
) -> Failure:
    cause = Cause(kind, EXIT_CODES[kind], f"it was a {kind}", ADVICE[kind], None, host)
    return Failure(cause, checkpoint, step, frozenset(entries), BOTH)


def then(record: list[Failure], answering: set[str] = ALL, policy: Policy | None = None) -> Restart | Stop:
    return decide(record, HOSTS, answering, WORLDS, policy or Policy())


def restart(*arguments: Any, **options: Any) -> Restart:
    decision = then(*arguments, **options)
    assert isinstance(decision, Restart), decision
    return decision


def stop(*arguments: Any, **options: Any) -> Stop:
    decision = then(*arguments, **options)
    assert isinstance(decision, Stop), decision
    return decision


def test_the_first_failure_is_followed_by_a_restart_at_once() -> None:
    assert restart([failure("crash", "a", step=7)]) == Restart(0.0, BOTH)


@pytest.mark.parametrize("kind", sorted(NO_RESTART))
def test_what_a_restart_cannot_heal_stops_at_once(kind: Kind) -> None:
    found = stop([failure(kind, "a")])
    assert found.exit_code == EXIT_CODES[kind]
    assert ADVICE[kind] in found.text


@pytest.mark.parametrize("kind", ["defect", "device_memory"])
def test_what_comes_back_at_the_same_step_is_no_accident(kind: Kind) -> None:
    assert restart([failure(kind, step=7)])
    assert stop([failure(kind, step=7), failure(kind, step=7)]).exit_code == EXIT_CODES[kind]
    assert restart([failure(kind, step=7), failure(kind, step=8)])
    assert restart([failure(kind, step=None), failure(kind, step=None)])


def test_restarts_without_progress_are_counted_and_slowed_down() -> None:
    record: list[Failure] = []
    delays = []
    for _ in range(4):
        record.append(failure("network", checkpoint=30))
        delays.append(then(record))
    assert [d.delay_s for d in delays[:3] if isinstance(d, Restart)] == [0.0, 5.0, 10.0]
    assert delays[3] == Stop(6, "3 restarts brought no newer checkpoint; the last end: it was a network")
    # A newer checkpoint is progress.
    record[-1] = failure("network", checkpoint=33)
    assert restart(record).delay_s == 0.0
    assert restarts_in_vain(record) == 0


def test_a_host_that_fails_twice_is_left_out_and_a_spare_comes_in() -> None:
    record = [failure("crash", "b", checkpoint=1), failure("hang", "b", checkpoint=2)]
    assert restart(record[:1]).ranks == BOTH
    found = restart(record)
    assert found.ranks == {"a": 4, "s": 4}
    assert "b is left out: it failed again and again" in found.notes
    assert "s takes part" in found.notes


def test_a_healed_host_comes_back_at_the_next_restart_and_is_on_probation() -> None:
    record = [
        failure("crash", "b", checkpoint=1),
        failure("crash", "b", checkpoint=2),
        failure("network", checkpoint=3),
    ]
    assert restart(record).ranks == BOTH
    assert restart(record, {"a", "s"}).ranks == {"a": 4, "s": 4}
    record.append(failure("crash", "b", checkpoint=4))
    assert restart(record).ranks == {"a": 4, "s": 4}


def test_a_lost_host_is_not_waited_for() -> None:
    lost = [failure("lost_node", "b")]
    assert restart(lost, {"a", "s"}).ranks == {"a": 4, "s": 4}
    found = restart(lost, {"a"})
    assert found.ranks == {"a": 4}
    assert "4 ranks instead of 8" in found.notes
    assert stop(lost, set()).exit_code == 5


@pytest.mark.parametrize(
    ("usable", "worlds", "ranks"),
    [
        ({"a", "b", "s"}, [8], {"a": 4, "b": 4}),
        ({"b", "s"}, [8], {"b": 4, "s": 4}),
        ({"a", "b"}, [1, 2, 3, 6], {"a": 4, "b": 2}),
        ({"a"}, [8], None),
        ({"a"}, [16, 3], {"a": 3}),
        ({"s"}, [1, 4], {"s": 4}),
        (set(), [1], None),
        ({"a", "b", "s"}, [12], None),  # a spare replaces, it does not enlarge
    ],
)
def test_places(usable: set[str], worlds: list[int], ranks: dict[str, int] | None) -> None:
    assert place(HOSTS, usable, worlds) == ranks


def test_a_loss_that_is_not_finite_is_replayed_first() -> None:
    first = failure("non_finite", step=7, entries=["x"])
    again = failure("non_finite", step=7, entries=["x"])
    assert restart([first]).skip == frozenset()
    assert non_finite_verdict([first]) is None
    # The same samples: the data. Stop, or leave them out, as the recipe says.
    assert non_finite_verdict([first, again]) == "data"
    assert "it is the data" in stop([first, again]).text
    skipping = Policy(non_finite="skip")
    found = restart([first, again], policy=skipping)
    assert found.skip == {"x"}
    assert "left out: x" in found.notes[0]
    # What is left out stays out, and more may come to it.
    more = [failure("non_finite", checkpoint=9, step=12, entries=["y", "z"]) for _ in range(2)]
    assert restart([first, again, more[0]], policy=skipping).skip == {"x"}
    assert restart([first, again, *more], policy=skipping).skip == {"x", "y", "z"}
    # It did not come back: a passing fault.
    other = failure("crash", "a", checkpoint=0, step=9)
    assert non_finite_verdict([first, other]) == "passing"
    assert non_finite_verdict([first, failure("crash", "a", checkpoint=7)]) == "passing"
    # That is known then, and not found again at every failure.
    assert non_finite_verdict([first, other, other]) is None
    # Newer checkpoints that do not reach its step say nothing.
    assert non_finite_verdict([first, failure("crash", "a", checkpoint=6)]) is None
    # The replay has not got there: nothing is known.
    assert non_finite_verdict([first, failure("crash", "a", step=5)]) is None
    assert restart([first, failure("non_finite", step=8, entries=["q"])]).skip == frozenset()


def test_what_ends_the_replay_before_its_step_does_not_hide_the_data() -> None:
    first, again = (failure("non_finite", step=7, entries=["x"]) for _ in range(2))
    early, late = failure("crash", "a", step=5), failure("crash", "a", step=9)
    assert non_finite_verdict([first, early, again]) == "data"
    assert "it is the data" in stop([first, early, again]).text
    assert restart([first, early, again], policy=Policy(non_finite="skip")).skip == {"x"}
    # It had passed in between, so the samples alone are not the reason.
    assert non_finite_verdict([first, late, again]) is None
    # What was found to be the data is over: that it does not come back is no news.
    assert non_finite_verdict([first, again, late]) is None
    assert open_fault([first, early]) is first
    assert open_fault([first, late]) is None
    assert open_fault([first, again]) is None


def test_a_loss_that_was_not_finite_under_an_earlier_supervisor_counts() -> None:
    earlier, again = (failure("non_finite", step=7, entries=["x"]) for _ in range(2))
    assert non_finite_verdict([again], earlier) == "data"
    skipping = Policy(non_finite="skip")
    found = decide([again], HOSTS, ALL, WORLDS, skipping, earlier)
    assert isinstance(found, Restart)
    assert found.skip == {"x"}
    assert isinstance(decide([again], HOSTS, ALL, WORLDS, Policy(), earlier), Stop)
    assert non_finite_verdict([failure("crash", "a", step=9)], earlier) == "passing"
    # Its restarts are not this supervisor's.
    first = decide([failure("network")], HOSTS, ALL, WORLDS, Policy(max_restarts=1), earlier)
    assert isinstance(first, Restart)
    assert first.delay_s == 0.0


def test_another_world_puts_others_beside_the_culprit() -> None:
    """A rank names its share of a step: what both attempts name is the data, the rest is bystanders."""
    record = [failure("non_finite", step=7, entries=names) for names in ("wx", "xy")]
    assert non_finite_verdict(record) == "data"
    found = restart(record, policy=Policy(non_finite="skip"))
    assert found.skip == {"x"}
    assert found.notes[0].endswith("left out: x")
    assert non_finite_verdict([record[0], failure("non_finite", step=7, entries="yz")]) is None
    # On a full disk nobody could say which samples they were.
    assert non_finite_verdict([failure("non_finite", step=7)] * 2) is None


@pytest.mark.parametrize("kind", sorted(set(get_args(Kind)) - NO_RESTART))
def test_where_no_restart_is_allowed_the_cause_is_the_end(kind: Kind) -> None:
    found = stop([failure(kind, "a", step=7, entries="x")], policy=Policy(max_restarts=0))
    assert found == Stop(EXIT_CODES[kind], f"it was a {kind}; {ADVICE[kind]}")


def test_a_host_without_which_nothing_goes_on_is_not_left_out() -> None:
    record = [failure("crash", "a", checkpoint=3, step=7) for _ in range(4)]
    one, policy = [Host("a", 4)], Policy(max_restarts=3)
    for count in range(1, 4):
        found = decide(record[:count], one, {"a"}, WORLDS, policy)
        assert isinstance(found, Restart), found
        assert found.ranks == {"a": 4}
        assert not any("left out" in note for note in found.notes)
    last = decide(record, one, {"a"}, WORLDS, policy)
    assert isinstance(last, Stop)
    assert last.exit_code == 6
    # Nor where the others are gone, or are too small for any world.
    assert restart(record[:2], {"a"}).ranks == {"a": 4}
    small = decide(record[:2], [*one, Host("c", 1)], {"a", "c"}, [4], policy)
    assert isinstance(small, Restart)
    assert small.ranks == {"a": 4}


KINDS = [kind for kind in get_args(Kind) if kind not in NO_RESTART]
faults = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([None, 0, 1, 2, 3]),
    st.booleans(),  # a newer checkpoint was committed before it
    st.integers(0, 3),
    st.sets(st.sampled_from("xyz"), min_size=1),
    st.sets(st.integers(0, 4)),  # hosts that do not answer
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 16),
    st.integers(1, 3),
    st.sampled_from(["stop", "skip"]),
    st.lists(faults, max_size=40),
)
def test_campaigns(sizes: Any, batch: int, failures: int, non_finite: Any, campaign: list[Any]) -> None:
    hosts = [Host(f"h{number}", slots, spare) for number, (slots, spare) in enumerate(sizes)]
    worlds = possible_worlds(batch, 1)
    policy = Policy(max_restarts=3, host_failures=failures, non_finite=non_finite)
    names = {host.name for host in hosts}
    slots = {host.name: host.slots for host in hosts}
    primary = sum(host.slots for host in hosts if not host.spare)
    ranks = place(hosts, names, worlds)
    record: list[Failure] = []
    checkpoint = in_vain = 0
    for kind, blamed, progress, step, entries, silent in campaign:
        if ranks is None:
            break
        # Only a host that takes part can fail.
        host = None if blamed is None else list(ranks)[blamed % len(ranks)]
        checkpoint += progress
        in_vain = 0 if progress or not record else in_vain + 1
        cause = Cause(kind, EXIT_CODES[kind], kind, ADVICE[kind], None, host)
        record.append(Failure(cause, checkpoint, checkpoint + step, frozenset(entries), ranks))
        answering = names - {f"h{number}" for number in silent}
        decision = decide(record, hosts, answering, worlds, policy)
        assert decision == decide(list(record), hosts, answering, worlds, policy)
        if isinstance(decision, Stop):
            assert decision.exit_code in (1, 5, 6)
            assert (decision.exit_code != 6) or in_vain == policy.max_restarts
            break
        # Bounded without progress, and never all at once.
        assert in_vain < policy.max_restarts
        assert 0 <= decision.delay_s <= policy.longest_delay_s
        assert (decision.delay_s == 0) == (in_vain == 0)
        # A possible world, on hosts that answer, within their slots.
        assert sum(decision.ranks.values()) in worlds
        assert sum(decision.ranks.values()) <= primary
        assert set(decision.ranks) <= answering
        assert all(0 < count <= slots[name] for name, count in decision.ranks.items())
        # Who has just been left out takes no part, unless nothing goes on without; no other usable host is kept out.
        out = left_out(record, policy)
        assert not out & set(decision.ranks) or place(hosts, answering - out, worlds) is None
        blamed_now = {host} if kind in HOST_FAULTS and host is not None else set()
        assert out <= blamed_now
        times = sum(f.cause.host == host and f.cause.kind in HOST_FAULTS for f in record)
        if blamed_now and times >= failures:
            assert out == blamed_now
        assert decision.skip <= {entry for f in record if f.cause.kind == "non_finite" for entry in f.entries}
        assert non_finite == "skip" or not decision.skip
        ranks = decision.ranks
