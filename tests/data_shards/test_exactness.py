"""Nothing lost, nothing twice, nothing different: whatever is killed, wherever it goes on, however it is spread."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import train_batches
from vitgraft.data_shards.mixture import Part, mixture_entries, mixture_fingerprint, plan_epoch
from vitgraft.data_shards.plan import Plan, data_state, micro_batches, steps_per_epoch
from vitgraft.data_shards.stream import RawSample, ShardReader

Configure = Callable[..., DataConfig]
Ledger = dict[int, list[Entry]]

WORLDS = {(12, 1): (1, 2, 3, 4, 6, 12), (12, 2): (1, 2, 3, 6), (8, 2): (1, 2, 4)}


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, ...]:
    repeats = st.one_of(st.integers(1, 2), st.fractions(Fraction(1, 2), 3, max_denominator=9))
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=25)
    return tuple(Part(f"source {i}", tuple(draw(sizes)), draw(repeats)) for i in range(draw(st.integers(1, 3))))


def expected_visits(parts: Sequence[Part]) -> tuple[Counter[int], int]:
    """How often each sample comes at least in an epoch, and how many samples come once more."""
    samples = [int(part.repeats) for part in parts for _ in range(part.samples)]
    return Counter(dict(enumerate(samples))), mixture_entries(parts) - sum(samples)


class Run:
    """A run over data that is killed and goes on: its checkpoints' data states and its ranks' ledgers."""

    def __init__(self, parts: tuple[Part, ...], seed: int, shape: tuple[int, int]) -> None:
        self.parts, self.seed, (self.batch, self.accumulation) = parts, seed, shape
        self.size = mixture_entries(parts)
        self.plans: Callable[[int], Plan] = cache(lambda epoch: plan_epoch(parts, seed, epoch))
        self.saved = self.state(0)
        self.ledger: Ledger = {}

    def state(self, step: int) -> dict[str, Any]:
        fingerprint = mixture_fingerprint([part.fingerprint for part in self.parts])
        return data_state(step, fingerprint=fingerprint, seed=self.seed, epoch_size=self.size, global_batch=self.batch)

    def first_step(self) -> int:
        """From the saved state alone, as nothing else outlives a kill."""
        per_epoch = steps_per_epoch(self.size, self.batch)
        return int(self.saved["epoch"]) * per_epoch + int(self.saved["cursor"]) // self.batch

    def attempt(self, world: int, last: int, done: Sequence[int], every: int) -> None:
        """Go on at this world size until the ranks are killed after so many steps each, with a checkpoint every so many
        steps that all of them have done."""
        first = self.first_step()
        # What is done after the checkpoint counts no more: the next attempt does it again.
        self.ledger = {step: rows for step, rows in self.ledger.items() if step < first}
        for rank in range(world):
            killed = min(last, first + done[rank % len(done)])
            cut = micro_batches(
                self.plans,
                epoch_size=self.size,
                first_step=first,
                last_step=last,
                global_batch=self.batch,
                accumulation=self.accumulation,
                rank=rank,
                world=world,
            )
            for micro in cut:
                if micro.step >= killed:
                    break
                self.ledger.setdefault(micro.step, []).extend(micro.entries)
        reached = min(last, first + min(done[rank % len(done)] for rank in range(world)))
        if reached == last:
            self.saved = self.state(last)
        elif reached // every * every > first:
            self.saved = self.state(reached // every * every)


@settings(max_examples=80, deadline=None)
@given(parts(), st.integers(0, 99), st.sampled_from(list(WORLDS)), st.integers(1, 3), st.integers(1, 7), st.data())
def test_kills_and_other_worlds_lose_nothing_and_repeat_nothing(
    parts: tuple[Part, ...], seed: int, shape: tuple[int, int], epochs: int, every: int, data: st.DataObject
) -> None:
    unbroken, run = Run(parts, seed, shape), Run(parts, seed, shape)
    last = epochs * steps_per_epoch(run.size, shape[0])
    unbroken.attempt(1, last, [last], last)
    worlds = st.sampled_from(WORLDS[shape])
    for _ in range(data.draw(st.integers(1, 8))):
        done = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=4))
        run.attempt(data.draw(worlds), last, done, every)
    run.attempt(data.draw(worlds), last, [last], last)

    whole, more = expected_visits(parts)
    for epoch in range(epochs):
        entries = [entry for rows in run.ledger.values() for entry in rows if entry.epoch == epoch]
        visits = Counter(entry.sample for entry in entries)
        extra = visits - whole
        assert visits - extra == +whole
        assert set(extra.values()) <= {1}
        assert extra.total() == more
        assert sorted(entry.position for entry in entries) == list(range(run.size))
    assert {step: sorted(rows) for step, rows in run.ledger.items()} == {
        step: sorted(rows) for step, rows in unbroken.ledger.items()
    }


@given(parts(), st.sampled_from(list(WORLDS)), st.integers(0, 60))
def test_the_state_is_enough_to_go_on(parts: tuple[Part, ...], shape: tuple[int, int], step: int) -> None:
    run = Run(parts, 3, shape)
    run.saved = run.state(step)
    assert run.first_step() == step
    assert set(run.saved) == {"fingerprint", "seed", "epoch", "cursor"}


RANDOM = [
    {"name": "scale_jitter", "min": 0.5, "max": 1.5},
    {"name": "random_crop"},
    {"name": "horizontal_flip"},
    {"name": "photometric"},
]


def pixels(dataset: PackedDataset, entries: Sequence[Entry]) -> dict[Entry, bytes]:
    """What each entry of a batch becomes."""
    batch = dataset.train_batch(entries)
    return {
        entry: batch.images[i].numpy().tobytes() + batch.targets[i].numpy().tobytes() + bytes(batch.sizes[i].tolist())
        for i, entry in enumerate(batch.entries)
    }


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(12)), st.lists(st.integers(1, 11), max_size=4), st.integers(0, 2**32))
def test_an_entry_becomes_the_same_whoever_makes_it_after_whatever(
    packed: dict[str, Path], configure: Configure, order: list[int], cuts: list[int], noise: int
) -> None:
    """Workers differ in what they did before and in what else is in their batch; neither may show."""
    source = {"path": str(packed["semantic"]), "repeats": 2}
    dataset = PackedDataset(
        packed["semantic"], configure(packed["semantic"], train=source, transforms=RANDOM), "semantic"
    )
    entries = dataset.plan(1).entries(16, 28)
    expected = {entry: value for entry in entries for entry, value in pixels(dataset, [entry]).items()}
    assert len(set(expected.values())) == 12
    shuffled = [entries[i] for i in order]
    bounds = [0, *sorted(set(cuts)), 12]
    torch.manual_seed(noise)
    np.random.seed(noise % 2**32)
    found: dict[Entry, bytes] = {}
    for start, stop in itertools.pairwise(bounds):
        found |= pixels(dataset, shuffled[start:stop])
    assert found == expected


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_bytes_are_the_same_at_every_worker_count_world_and_start(
    packed: dict[str, Path], configure: Configure, workers: int, prefetch: int, first: int, world: int
) -> None:
    def entries(workers: int, prefetch: int, first: int, world: int) -> dict[Entry, bytes]:
        config = configure(packed["semantic"], transforms=RANDOM, workers=workers, prefetch=prefetch)
        dataset = PackedDataset(packed["semantic"], config, "semantic", seed=5)
        found = {}
        for rank in range(world):
            cut = micro_batches(
                dataset.plan,
                epoch_size=dataset.epoch_size,
                first_step=first,
                last_step=4,
                global_batch=8,
                accumulation=2,
                rank=rank,
                world=world,
            )
            for _, batch in train_batches(dataset, cut):
                for i, entry in enumerate(batch.entries):
                    found[entry] = batch.images[i].numpy().tobytes() + batch.targets[i].numpy().tobytes()
        return found

    whole = entries(0, 1, 0, 1)
    start = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic", seed=5).plan(0).entries(0, 22)
    skipped = set(start[: 8 * first])
    assert entries(workers, prefetch, first, world) == {
        entry: value for entry, value in whole.items() if entry not in skipped
    }


@pytest.mark.parametrize("first", [0, 2, 9])
def test_going_on_anywhere_reads_only_what_it_returns(
    packed: dict[str, Path], configure: Configure, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    read: list[int] = []
    original = ShardReader.read

    def counting(reader: ShardReader, sample: int) -> RawSample:
        read.append(sample)
        return original(reader, sample)

    monkeypatch.setattr(ShardReader, "read", counting)
    dataset = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic")
    cut = micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=first,
        last_step=12,
        global_batch=8,
        accumulation=1,
        rank=1,
        world=2,
    )
    batches = train_batches(dataset, cut)
    for _ in range(3):
        before = len(read)
        _, batch = next(batches)
        assert read[before:] == [entry.sample for entry in batch.entries]
