"""The order of samples: pure functions of (data fingerprint, seed, epoch), the same at every world size.

An epoch is a list of entries (sample, repetition). It is never held in memory: shards are permuted and grouped into
blocks of some sixteen, fewer where they are large, and a block is shuffled when a position inside it is asked for. So
opening costs O(shards), any position can be reached at once, and a stretch of the epoch touches few files. mixture.py:
several data sets in one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.hashing import seed_of
from vitgraft.configs.worlds import check_world
from vitgraft.data_shards.batch import Entry

SHARDS_PER_BLOCK = 16
SAMPLES_PER_BLOCK = 1 << 21
"""At most, unless a single shard has more: to shuffle them takes some 0.3 seconds and 80 MB."""
_CACHED_PASSES = 2

Integers = npt.NDArray[np.int64]


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele, Lea & Flood, OOPSLA 2014) of each uint64: a bijection that scrambles well."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permutation(key: int, length: int) -> Integers:
    """A permutation of 0..length-1 decided by ``key`` alone, whatever the version of numpy.

    Its random generators may change their streams; sorting hashes cannot.
    """
    with np.errstate(over="ignore"):
        hashes = splitmix64(splitmix64(np.arange(length, dtype=np.uint64)) ^ np.uint64(key))
    # No two are equal, as both steps are bijections: so every way of sorting gives the same.
    return np.argsort(hashes).astype(np.int64)


class Plan(Protocol):
    """The entries of one epoch, by position: what cutting into batches needs of an order."""

    @property
    def epoch(self) -> int:
        """Which epoch this is."""

    def __len__(self) -> int: ...

    def entries(self, start: int, stop: int) -> list[Entry]:
        """The entries at positions start..stop-1 (IndexError when any lies outside)."""

    def numbers(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """The same as two arrays: their samples and their repetitions."""


def epoch_entries(samples: int, repeats: Fraction | int) -> int:
    """Entries of an epoch over so many samples: samples times repeats, halves rounded up."""
    return math.floor(samples * repeats + Fraction(1, 2))


class EpochPlan:
    """The entries of one epoch over one data set, by position.

    Each (sample, repetition) has exactly one position. All repetitions of a sample lie in one block, one in each pass
    over it, so that they are spread and their shard is opened once. Where ``repeats`` is no whole number, a block's
    last pass ends early, after its share of the samples: a subset that the shuffling draws anew in every epoch.

    Args:
        fingerprint: of the packed data set.
        shard_sizes: samples of each shard.
        seed, epoch: decide the order together with the fingerprint.
        repeats: visits of each sample in an epoch; 5/2: two visits of each, a third of half of them.
        shuffle: false: samples in the order of packing.

    Raises:
        ConfigError: ``repeats`` is not positive.
    """

    def __init__(
        self,
        fingerprint: str,
        shard_sizes: Sequence[int],
        seed: int,
        epoch: int,
        repeats: Fraction | int = 1,
        shuffle: bool = True,
    ) -> None:
        if repeats <= 0:
            raise ConfigError(f"data.train: {repeats} visits of each sample in an epoch; give more than 0")
        self.epoch, self.repeats, self.shuffle = epoch, repeats, shuffle
        self._identity = (fingerprint, seed, epoch)
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        count = len(sizes)
        order = permutation(seed_of("shards", *self._identity), count) if shuffle else np.arange(count, dtype=np.int64)
        # Equal blocks: a short last one would be shuffled less than the others.
        blocks = np.array_split(order, max(1, -(-count // SHARDS_PER_BLOCK)))
        self._blocks = [part for block in blocks for part in _bounded(block, sizes)]
        samples, passes = int(self._starts[-1]), math.floor(repeats)
        extra = epoch_entries(samples, repeats) - passes * samples
        # Of each block: its samples, and where its entries begin and end in the epoch.
        self._counts: list[int] = [int(sizes[block].sum()) for block in self._blocks]
        before = np.concatenate([[0], np.cumsum(self._counts)]).tolist()
        # Cumulative shares of the short pass, so that they add up to ``extra``.
        self._bounds = np.asarray([n * passes + (n * extra // samples if extra else 0) for n in before], dtype=np.int64)
        self._cache: OrderedDict[tuple[int, int], Integers] = OrderedDict()

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def samples(self) -> int:
        """Samples of the data set."""
        return int(self._starts[-1])

    def entry(self, position: int) -> Entry:
        """The entry at ``position`` (0 to len - 1; IndexError otherwise)."""
        return self.entries(position, position + 1)[0]

    def entries(self, start: int, stop: int) -> list[Entry]:
        """The entries at positions start..stop-1 (IndexError when any lies outside)."""
        return entries_of(self.epoch, range(start, stop), *self.numbers(start, stop))

    def numbers(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """The samples and the repetitions at positions start..stop-1 (IndexError when any lies outside)."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start}..{stop} outside the epoch of {len(self)} entries")
        samples, repetitions = np.empty(stop - start, dtype=np.int64), np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            block = int(np.searchsorted(self._bounds, position, side="right")) - 1
            repetition, first = divmod(position - int(self._bounds[block]), self._counts[block])
            upto = min(stop, int(self._bounds[block + 1]))
            part = self._pass(block, repetition)[first : first + upto - position]
            place = slice(position - start, position - start + len(part))
            samples[place], repetitions[place] = part, repetition
            position += len(part)
        return samples, repetitions

    def _pass(self, block: int, repetition: int) -> Integers:
        """The samples of one block in the order of one pass over it; a short pass ends somewhere inside."""
        key = block, repetition
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        ranges = [np.arange(self._starts[s], self._starts[s] + self._sizes[s]) for s in self._blocks[block].tolist()]
        samples = np.concatenate(ranges)
        if self.shuffle:
            samples = samples[permutation(seed_of("block", *self._identity, block, repetition), len(samples))]
        self._cache[key] = samples
        if len(self._cache) > _CACHED_PASSES:
            self._cache.popitem(last=False)
        return samples


def _bounded(block: Integers, sizes: Integers) -> list[Integers]:
    """The block, or its shards in smaller ones of about the same size, that have no more samples than a block may."""
    samples = int(sizes[block].sum())
    if samples <= SAMPLES_PER_BLOCK or len(block) == 1:
        return [block]
    parts = np.array_split(block, min(len(block), -(-samples // SAMPLES_PER_BLOCK)))
    return [smaller for part in parts for smaller in _bounded(part, sizes)]


def entries_of(epoch: int, positions: Iterable[int], samples: Integers, repetitions: Integers) -> list[Entry]:
    """Entries from their columns."""
    rows = zip(positions, samples.tolist(), repetitions.tolist(), strict=True)
    return [Entry(epoch, position, sample, repetition) for position, sample, repetition in rows]


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share of one micro-step.

    ``entries``: this rank's, by sample; empty: the rank runs a zero-weight filler. ``micro_count``: entries of the
    micro-step over all ranks. ``step_count``: entries of the step over all ranks and micro-steps.
    """

    step: int
    micro: int
    epoch: int
    entries: tuple[Entry, ...]
    micro_count: int
    step_count: int


def steps_per_epoch(epoch_size: int, global_batch: int) -> int:
    """Steps of an epoch; the last may be short."""
    return -(-epoch_size // global_batch)


def samples_before(step: int, epoch_size: int, global_batch: int) -> int:
    """Entries consumed by all steps before ``step``, over all epochs."""
    epoch, within = divmod(step, steps_per_epoch(epoch_size, global_batch))
    return epoch * epoch_size + within * global_batch


def data_state(step: int, *, fingerprint: str, seed: int, epoch_size: int, global_batch: int) -> dict[str, Any]:
    """Everything a resumed run must know about data before ``step``: {fingerprint, seed, epoch, cursor}.

    ``cursor`` is the position in ``epoch`` of the next entry. The same at every world size and worker count.
    """
    epoch, within = divmod(step, steps_per_epoch(epoch_size, global_batch))
    return {"fingerprint": fingerprint, "seed": seed, "epoch": epoch, "cursor": within * global_batch}


def micro_batches(
    plans: Callable[[int], Plan],
    *,
    epoch_size: int,
    first_step: int,
    last_step: int,
    global_batch: int,
    accumulation: int,
    rank: int,
    world: int,
    paired: bool = False,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the steps first_step..last_step-1.

    A step's G slots are the next G positions of the epoch; slot i belongs to micro-step i // (G / accumulation). The
    entries of a micro-step are then sorted by sample, and cut into equal parts for the ranks. So a micro-step holds the
    same entries at every world size, while a rank, which reads about the same part of every micro-step, keeps to the
    same one or two of a block's shards, and its node to few. Positions stay those of the epoch. An epoch's last step
    may leave its later slots empty.

    The partner with which an entry may be mixed is its neighbour in the epoch (mixing.py): any sample of the block, and
    so most often another rank's. Each would be read and decoded twice, from whatever shard. ``paired`` therefore keeps
    the order of the epoch, where the two stay side by side, at the price that every rank reads all shards of a block.

    Args:
        plans: the plan of an epoch, by its number.
        epoch_size: entries of an epoch (``len`` of every plan).
        paired: whether entries are mixed with their partners.

    Raises:
        ConfigError: the world cannot carry the global batch; lists the worlds that can.
    """
    check_world(global_batch, accumulation, world)
    if epoch_size < 1:
        raise ConfigError("the data set is empty; pack at least one sample")

    # Apart, so that the refusals above come at the call and not at the first batch.
    def cut() -> Iterator[MicroBatch]:
        per_epoch = steps_per_epoch(epoch_size, global_batch)
        per_micro = global_batch // accumulation
        per_rank = per_micro // world
        plan: Plan | None = None
        for step in range(first_step, last_step):
            epoch, within = divmod(step, per_epoch)
            if plan is None or plan.epoch != epoch:
                plan = plans(epoch)
            start = within * global_batch
            valid = min(global_batch, epoch_size - start)
            for micro in range(accumulation):
                first = min(micro * per_micro, valid)
                count = min(valid - first, per_micro)
                share = slice(min(rank * per_rank, count), min((rank + 1) * per_rank, count))
                yield MicroBatch(
                    step=step,
                    micro=micro,
                    epoch=epoch,
                    entries=tuple(_share(plan, start + first, count, share, paired)),
                    micro_count=count,
                    step_count=valid,
                )

    return cut()


def _share(plan: Plan, start: int, count: int, share: slice, paired: bool) -> list[Entry]:
    """A part of the ``count`` entries from position ``start`` on, by sample (``paired``: by position)."""
    if paired or share.start == share.stop:
        return plan.entries(start + share.start, start + share.stop)
    samples, repetitions = plan.numbers(start, start + count)
    # Stable, so that it is the same on every processor: a sample's repetitions may meet in a micro-step.
    mine = np.argsort(samples, kind="stable")[share]
    return entries_of(plan.epoch, (start + mine).tolist(), samples[mine], repetitions[mine])
