"""Several packed data sets as one: one numbering of samples, one fingerprint, one order, one cursor.

Samples are numbered through, source after source. Each source keeps the order that it has alone (plan.py), and the
epoch merges these orders: it is cut into stretches of about a thousand entries, each stretch takes its share of every
source, and inside it the sources' turns are shuffled. So the composition of an epoch is exact, that of every part of it
is proportional, any position can be reached at once, and each source still needs few shards at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.hashing import seed_of, sha256_of
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.plan import EpochPlan, Integers, Plan, entries_of, epoch_entries, permutation
from vitgraft.data_shards.stream import RawSample, ShardReader

STRETCH = 1024
"""Approximate number of entries merged at a time."""
_CACHED_STRETCHES = 2


@dataclass(frozen=True)
class Part:
    """Source of a mixture, as its order depends on it. ``repeats``: visits of each sample in an epoch."""

    fingerprint: str
    shard_sizes: Sequence[int]
    repeats: Fraction | int = 1

    @property
    def samples(self) -> int:
        """Samples of the source."""
        return sum(self.shard_sizes)


def check_mixture(paths: Sequence[str], manifests: Sequence[Manifest], visits: Sequence[Fraction]) -> None:
    """Refuse sources that cannot be trained on together.

    Args:
        paths: what the recipe calls them.
        visits: of each sample of a source in an epoch.

    Raises:
        ConfigError: a source is listed twice, or its weight gives it no entry in an epoch.
        DataError: the sources differ in kind or classes.
    """
    for number, (path, manifest, mean) in enumerate(zip(paths, manifests, visits, strict=True)):
        first = manifests[0]
        if (manifest.kind, manifest.classes) != (first.kind, first.classes):
            raise DataError(
                f"data.train: {path} has another kind or other classes than {paths[0]} ({manifest.kind} with "
                f"{len(manifest.classes)}, {first.kind} with {len(first.classes)}); pack it with --classes {paths[0]}"
            )
        known = [other.fingerprint for other in manifests[:number]]
        if manifest.fingerprint in known:
            raise ConfigError(
                f"data.train: {path} holds the same data as {paths[known.index(manifest.fingerprint)]}; "
                "keep one and raise its weight"
            )
        if manifest.samples and not epoch_entries(manifest.samples, mean):
            raise ConfigError(
                f"data.train: {path}: weight {float(mean)} of {manifest.samples} samples is not one entry in an "
                "epoch; raise it or remove the source"
            )


def mixture_fingerprint(fingerprints: Sequence[str]) -> str:
    """Return the fingerprint of these sources in this order (SHA-256, hex); one source keeps its own."""
    return fingerprints[0] if len(fingerprints) == 1 else sha256_of({"mixture": list(fingerprints)})


def mixture_entries(parts: Sequence[Part]) -> int:
    """Return the number of entries of an epoch: the sum over the sources of samples times repeats, each rounded."""
    return sum(epoch_entries(part.samples, part.repeats) for part in parts)


def plan_epoch(parts: Sequence[Part], seed: int, epoch: int) -> Plan:
    """Return the order of one epoch over these sources; a single source keeps its order."""
    plans = [EpochPlan(part.fingerprint, part.shard_sizes, seed, epoch, part.repeats) for part in parts]
    return plans[0] if len(plans) == 1 else MixturePlan([part.fingerprint for part in parts], plans, seed)


class MixturePlan:
    """The entries of one epoch over several data sets, by position.

    Args:
        fingerprints: of the sources, in the order of the recipe.
        plans: their orders of one and the same epoch.
        seed: of the run.
    """

    def __init__(self, fingerprints: Sequence[str], plans: Sequence[EpochPlan], seed: int) -> None:
        self.epoch = plans[0].epoch
        self._plans = list(plans)
        self._identity = (mixture_fingerprint(fingerprints), seed, self.epoch)
        self._lengths = [len(plan) for plan in plans]
        self._offsets = np.cumsum([0] + [plan.samples for plan in plans]).tolist()
        self._stretches = -(-len(self) // STRETCH)
        self._cache: OrderedDict[int, tuple[Integers, Integers]] = OrderedDict()

    def __len__(self) -> int:
        return sum(self._lengths)

    def entries(self, start: int, stop: int) -> list[Entry]:
        """Return the entries at positions start..stop-1 (IndexError when any lies outside)."""
        return entries_of(self.epoch, range(start, stop), *self.numbers(start, stop))

    def numbers(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Return the samples and the repetitions at positions start..stop-1 (IndexError when any lies outside)."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start}..{stop} outside the epoch of {len(self)} entries")
        found = np.empty((2, stop - start), dtype=np.int64)
        position = start
        while position < stop:
            stretch = self._stretch_of(position)
            first = sum(self._shares(stretch))
            samples, repetitions = self._stretch(stretch)
            part = slice(position - first, min(stop - first, len(samples)))
            place = slice(position - start, position - start + part.stop - part.start)
            found[0, place], found[1, place] = samples[part], repetitions[part]
            position += part.stop - part.start
        return found[0], found[1]

    def _shares(self, stretch: int) -> list[int]:
        """Return the number of entries of each source before a stretch."""
        return [length * stretch // self._stretches for length in self._lengths]

    def _stretch_of(self, position: int) -> int:
        # Rounding down each share puts a stretch's start up to one entry for each source before this estimate.
        stretch = position * self._stretches // len(self)
        while sum(self._shares(stretch + 1)) <= position:
            stretch += 1
        return stretch

    def _stretch(self, stretch: int) -> tuple[Integers, Integers]:
        """Return the samples and repetitions of one stretch, in order."""
        if stretch in self._cache:
            self._cache.move_to_end(stretch)
            return self._cache[stretch]
        starts, stops = self._shares(stretch), self._shares(stretch + 1)
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        turns = np.repeat(np.arange(len(counts)), counts)
        turns = turns[permutation(seed_of("mixture", *self._identity, stretch), len(turns))]
        merged = np.empty(len(turns), dtype=np.int64), np.empty(len(turns), dtype=np.int64)
        for source, plan in enumerate(self._plans):
            samples, repetitions = plan.numbers(starts[source], stops[source])
            own = turns == source
            merged[0][own], merged[1][own] = samples + self._offsets[source], repetitions
        self._cache[stretch] = merged
        if len(self._cache) > _CACHED_STRETCHES:
            self._cache.popitem(last=False)
        return merged


class MixtureReader:
    """Samples of several packed data sets by their number in the mixture."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self.readers = list(readers)
        self._ends = np.cumsum([len(reader) for reader in readers])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def close(self) -> None:
        """Close the open shards of all sources; a later read opens them again."""
        for reader in self.readers:
            reader.close()

    def key(self, sample: int) -> str:
        """Return the source's folder and the key in it."""
        reader, local = self._find(sample)
        return f"{reader.folder}:{reader.key(local)}"

    def read(self, sample: int) -> RawSample:
        """Return the bytes of one sample.

        Raises:
            IndexError: no such sample.
            DataError: see :meth:`ShardReader.read`.
        """
        reader, local = self._find(sample)
        return reader.read(local)

    def _find(self, sample: int) -> tuple[ShardReader, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        source = int(np.searchsorted(self._ends, sample, side="right"))
        reader = self.readers[source]
        return reader, sample - (int(self._ends[source]) - len(reader))
