"""The order of samples: exactly once, the same at every world, reachable from anywhere."""

from __future__ import annotations

import hashlib
import itertools
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitgraft.configs.errors import ConfigError
from vitgraft.data_shards import plan as plan_module
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.plan import (
    SHARDS_PER_BLOCK,
    EpochPlan,
    MicroBatch,
    data_state,
    micro_batches,
    permutation,
    samples_before,
    splitmix64,
    steps_per_epoch,
)

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def cut(
    plan: EpochPlan, first: int, last: int, batch: int, acc: int, rank: int, world: int, paired: bool = False
) -> list[MicroBatch]:
    def plans(epoch: int) -> EpochPlan:
        return EpochPlan("f", plan._sizes.tolist(), 5, epoch, plan.repeats)

    return list(
        micro_batches(
            plans,
            epoch_size=len(plan),
            first_step=first,
            last_step=last,
            global_batch=batch,
            accumulation=acc,
            rank=rank,
            world=world,
            paired=paired,
        )
    )


@given(SIZES, st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_each_sample_and_repetition_once(sizes: list[int], epoch: int, repeats: int, shuffle: bool) -> None:
    plan = EpochPlan("f", sizes, 1, epoch, repeats, shuffle)
    entries = plan.entries(0, len(plan))
    expected = {(sample, repetition) for sample in range(sum(sizes)) for repetition in range(repeats)}
    assert len(entries) == len(expected)
    assert {(entry.sample, entry.repetition) for entry in entries} == expected
    assert [(entry.epoch, entry.position) for entry in entries] == [(epoch, i) for i in range(len(plan))]


@given(SIZES, st.data())
def test_any_stretch_can_be_read_alone(sizes: list[int], data: st.DataObject) -> None:
    plan = EpochPlan("f", sizes, 1, 0, 2)
    start = data.draw(st.integers(0, len(plan)))
    stop = data.draw(st.integers(start, len(plan)))
    assert EpochPlan("f", sizes, 1, 0, 2).entries(start, stop) == plan.entries(0, len(plan))[start:stop]


def test_seed_epoch_and_fingerprint_each_decide_the_order() -> None:
    def order(fingerprint: str = "f", seed: int = 0, epoch: int = 0) -> list[int]:
        plan = EpochPlan(fingerprint, [50, 50], seed, epoch)
        return [entry.sample for entry in plan.entries(0, 100)]

    assert order() == order()
    assert len({tuple(o) for o in (order(), order("g"), order(seed=1), order(epoch=1))}) == 4
    assert sorted(order()) != order()


def test_without_shuffling_samples_come_as_packed() -> None:
    plan = EpochPlan("f", [3, 4], 0, 2, shuffle=False)
    assert [entry.sample for entry in plan.entries(0, 7)] == list(range(7))


def test_splitmix64_gives_the_published_numbers() -> None:
    """The generator's first two outputs for seed 1234567 (its state grows by the golden gamma)."""
    state = np.asarray([1234567, 1234567 + 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert splitmix64(state).tolist() == [6457827717110365317, 3203168211198807973]


def test_order_never_drifts() -> None:
    """Resuming a run after an upgrade relies on these very numbers."""
    plan = EpochPlan("0" * 64, [5, 7, 4], seed=3, epoch=2, repeats=2)
    samples = [(entry.sample, entry.repetition) for entry in plan.entries(0, 8)]
    assert samples == GOLDEN
    assert permutation(42, 8).tolist() == GOLDEN_PERMUTATION


def test_order_of_several_blocks_never_drifts() -> None:
    """Three blocks and a short pass; no block is so large that its samples are bounded."""
    plan = EpochPlan("0" * 64, [1000] * 40 + [7] * 3, seed=3, epoch=2, repeats=Fraction(5, 2))
    columns = [column.astype("<i8").tobytes() for column in plan.numbers(0, len(plan))]
    assert hashlib.sha256(b"".join(columns)).hexdigest() == GOLDEN_BLOCKS


GOLDEN_BLOCKS = "c9a6c783242bc50fdd75ab21dadfed54363c17a24cc6549977b98e489ca0d4ec"
GOLDEN = [(8, 0), (4, 0), (2, 0), (13, 0), (0, 0), (9, 0), (11, 0), (3, 0)]
GOLDEN_PERMUTATION = [2, 6, 3, 0, 7, 1, 4, 5]


def test_a_stretch_touches_few_shards_though_all_are_shuffled() -> None:
    plan = EpochPlan("f", [100] * 320, 0, 0)
    window = [entry.sample // 100 for entry in plan.entries(3200, 4800)]
    assert len(set(window)) == 16
    # Shuffled inside the block, not shard after shard.
    assert sum(a == b for a, b in itertools.pairwise(window)) < len(window) / 4


@given(SIZES, st.integers(1, 2))
def test_a_shard_is_needed_in_one_stretch_of_the_epoch_together_with_few_others(sizes: list[int], repeats: int) -> None:
    """The stretch is its block's: at most 16 shards, which come nowhere else in the epoch."""
    plan = EpochPlan("f", sizes, 1, 0, repeats)
    shards = np.repeat(np.arange(len(sizes)), sizes)
    order = [int(shards[entry.sample]) for entry in plan.entries(0, len(plan))]
    places: dict[int, list[int]] = {}
    for position, shard in enumerate(order):
        places.setdefault(shard, []).append(position)
    blocks: dict[int, set[int]] = {}
    for shard, found in places.items():
        block = int(np.searchsorted(plan._bounds, found[0], side="right"))
        assert int(np.searchsorted(plan._bounds, found[-1], side="right")) == block
        blocks.setdefault(block, set()).add(shard)
    assert max(map(len, blocks.values())) <= SHARDS_PER_BLOCK
    # So any stretch of the epoch that is no longer than a block needs the shards of two.
    assert sum(map(len, blocks.values())) == len(sizes)


@given(SIZES, st.integers(1, 60), st.booleans())
def test_a_block_has_few_samples_unless_of_one_shard(sizes: list[int], bound: int, shuffle: bool) -> None:
    plain = EpochPlan("f", sizes, 1, 0, 2, shuffle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SAMPLES_PER_BLOCK", bound)
        plan = EpochPlan("f", sizes, 1, 0, 2, shuffle)
    counts = [sum(sizes[shard] for shard in block) for block in plan._blocks]
    assert all(count <= bound or len(block) == 1 for count, block in zip(counts, plan._blocks, strict=True))
    # The same shards in the same order, and all entries.
    assert np.array_equal(np.concatenate(plan._blocks), np.concatenate(plain._blocks))
    found, expected = (Counter(zip(*map(np.ndarray.tolist, p.numbers(0, len(p))), strict=True)) for p in (plan, plain))
    assert found == expected
    if max(sum(sizes[shard] for shard in block) for block in plain._blocks) <= bound:
        assert plan.entries(0, len(plan)) == plain.entries(0, len(plan))


def test_large_shards_are_shuffled_a_few_at_a_time() -> None:
    """Twenty shards of half a million: ten of them at once would take 370 MB."""
    found, plan = allocated([500_000] * 20, 1, 0.5)
    assert [len(block) for block in plan._blocks] == [4, 3, 3] * 2
    assert found < 100 << 20


def test_small_sets_are_shuffled_as_a_whole() -> None:
    plan = EpochPlan("f", [10] * 16, 0, 0)
    first_half = [entry.sample // 10 for entry in plan.entries(0, 80)]
    assert len(set(first_half)) == 16


def test_repetitions_of_a_sample_are_spread() -> None:
    plan = EpochPlan("f", [64], 0, 0, repeats=3)
    places: dict[int, list[int]] = {}
    for entry in plan.entries(0, len(plan)):
        places.setdefault(entry.sample, []).append(entry.position // 64)
    assert all(passes == [0, 1, 2] for passes in places.values())


def test_opening_a_plan_does_not_materialise_the_epoch() -> None:
    plan = EpochPlan("f", [1_000_000] * 100_000, 0, 0)
    assert len(plan) == 10**11
    assert not plan._cache


def allocated(sizes: list[int], repeats: Fraction | int, at: float) -> tuple[int, EpochPlan]:
    """Bytes at the peak of opening a plan and asking for 64 entries somewhere in it."""
    tracemalloc.start()
    try:
        plan = EpochPlan("f", sizes, 0, 3, repeats)
        start = int((len(plan) - 64) * at)
        assert len(plan.entries(start, start + 64)) == 64
        return tracemalloc.get_traced_memory()[1], plan
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("repeats", [1, 30, Fraction(5, 2)])
@pytest.mark.parametrize("at", [0.0, 0.9, 1.0])
def test_starting_anywhere_costs_memory_by_the_shard_and_for_one_block(repeats: Fraction | int, at: float) -> None:
    """Ten million samples in 10^4 shards; an array of them would take 80 MB."""
    found, plan = allocated([1000] * 10_000, repeats, at)
    # Two where the entries lie on both sides of a border.
    assert len(plan._cache) <= 2
    assert found < 100 * 10_000 + 150 * SHARDS_PER_BLOCK * 1000


def test_opening_costs_nothing_by_the_sample() -> None:
    def opened(size: int) -> int:
        tracemalloc.start()
        try:
            EpochPlan("f", [size] * 10_000, 0, 0, Fraction(3, 2))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert opened(100_000) < 1.1 * opened(10)
    # Each of these is a block of its own.
    assert opened(2_000_000) < 400 * 10_000


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 8), (5, 4)])
def test_positions_outside_are_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        EpochPlan("f", [3, 4], 0, 0).entries(start, stop)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 2), st.sampled_from([(8, 1), (8, 2), (12, 3), (6, 1)]))
def test_every_world_sees_the_same_steps_and_all_entries(
    sizes: list[int], repeats: int, shape: tuple[int, int]
) -> None:
    batch, acc = shape
    plan = EpochPlan("f", sizes, 5, 0, repeats)
    steps = steps_per_epoch(len(plan), batch)
    micros: list[dict[tuple[int, int], list[Entry]]] = []
    for world in (w for w in range(1, 9) if batch // acc % w == 0):
        seen: dict[tuple[int, int], list[Entry]] = {}
        for rank in range(world):
            for micro in cut(plan, 0, steps, batch, acc, rank, world):
                seen.setdefault((micro.step, micro.micro), []).extend(micro.entries)
                assert len(micro.entries) <= batch // acc // world
        everything = [entry for entries in seen.values() for entry in entries]
        assert Counter(everything) == Counter(plan.entries(0, len(plan)))
        micros.append(seen)
    assert all(seen == micros[0] for seen in micros)


@pytest.mark.parametrize("paired", [False, True])
def test_slots_go_by_accumulation_first_then_by_rank(paired: bool) -> None:
    """The formula of the docstring, slot by slot, on a short last step."""
    plan = EpochPlan("f", [29], 5, 0)
    batch, acc, world = 12, 2, 3
    found = {}
    for rank in range(world):
        for micro in cut(plan, 2, 3, batch, acc, rank, world, paired):
            found[micro.micro, rank] = list(micro.entries)
            assert (micro.micro_count, micro.step_count) == ((5, 5) if micro.micro == 0 else (0, 5))
    expected: dict[tuple[int, int], list[Entry]] = {(m, r): [] for m in range(acc) for r in range(world)}
    entries = plan.entries(24, 29)
    for slot, entry in enumerate(entries if paired else sorted(entries, key=lambda entry: entry.sample)):
        expected[slot // 6, slot % 6 // 2].append(entry)
    assert found == expected


def readers_of_shards(plan: EpochPlan, size: int, batch: int, world: int, paired: bool = False) -> dict[int, set[int]]:
    """Which ranks need each shard in an epoch; all shards are of one size."""
    found: dict[int, set[int]] = {}
    for rank in range(world):
        for micro in cut(plan, 0, steps_per_epoch(len(plan), batch), batch, 1, rank, world, paired):
            for entry in micro.entries:
                found.setdefault(entry.sample // size, set()).add(rank)
    return found


@pytest.mark.parametrize(("world", "batch", "mean", "most"), [(8, 256, 2, 2), (8, 64, 3, 5), (32, 512, 4, 6)])
def test_few_ranks_need_a_shard(world: int, batch: int, mean: float, most: int) -> None:
    """Sixty-four shards of 128; cut in the order of the epoch, each is needed by every rank."""
    plan = EpochPlan("f", [128] * 64, 5, 0)
    counts = [len(ranks) for ranks in readers_of_shards(plan, 128, batch, world).values()]
    assert len(counts) == 64
    assert sum(counts) / 64 <= mean
    assert max(counts) <= most
    paired = readers_of_shards(plan, 128, batch, world, paired=True)
    assert sum(map(len, paired.values())) / 64 > 0.9 * world


def test_nodes_of_eight_share_few_shards() -> None:
    """At 64 ranks on 8 nodes and 2 entries for each rank and step, a shard goes to two or three nodes."""
    plan = EpochPlan("f", [256] * 64, 5, 0)
    found = readers_of_shards(plan, 256, 128, 64)
    nodes = [len({rank // 8 for rank in ranks}) for ranks in found.values()]
    assert sum(nodes) / 64 < 2.5
    assert max(nodes) <= 3


def test_a_rank_reads_forwards_in_a_micro_step() -> None:
    plan = EpochPlan("f", [50] * 20, 5, 0, 2)
    for micro in cut(plan, 0, 30, 64, 2, 1, 4):
        samples = [entry.sample for entry in micro.entries]
        assert samples == sorted(samples)


def test_partners_stay_in_one_batch_when_entries_are_paired() -> None:
    """Position and position ^ 1, wherever a rank's share is even."""
    plan = EpochPlan("f", [50] * 20, 5, 0)
    for rank in range(4):
        for micro in cut(plan, 0, 15, 64, 2, rank, 4, paired=True):
            positions = {entry.position for entry in micro.entries}
            assert positions == {position ^ 1 for position in positions}


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 12))
def test_starting_at_any_step_gives_the_tail(sizes: list[int], first: int) -> None:
    plan = EpochPlan("f", sizes, 5, 0)
    whole = cut(plan, 0, 20, 8, 2, 1, 4)
    assert cut(plan, first, 20, 8, 2, 1, 4) == [micro for micro in whole if micro.step >= first]
    assert {micro.epoch for micro in whole} == set(range(19 // steps_per_epoch(len(plan), 8) + 1))


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 60))
def test_cursor_counts_what_was_consumed(size: int, batch: int, step: int) -> None:
    plan = EpochPlan("f", [size], 5, 0)
    consumed = sum(micro.step_count for micro in cut(plan, 0, step, batch, 1, 0, 1))
    assert samples_before(step, size, batch) == consumed
    state = data_state(step, fingerprint="f", seed=5, epoch_size=size, global_batch=batch)
    assert state["epoch"] * size + state["cursor"] == consumed
    assert 0 <= state["cursor"] < size


def test_a_world_that_cannot_carry_the_batch_is_told_which_can() -> None:
    with pytest.raises(ConfigError, match=r"a world of 4 .* possible worlds: 1, 2, 3, 6$"):
        cut(EpochPlan("f", [5], 5, 0), 0, 1, 12, 2, 0, 4)
