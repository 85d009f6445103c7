"""Fetch the shards that a run will read next while it reads the present ones."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import numpy as np

from vitgraft.configs.errors import ConfigError, VitgraftError
from vitgraft.data_shards.plan import SHARDS_PER_BLOCK, MicroBatch
from vitgraft.data_shards.stream import ShardReader

AHEAD = 512
"""How many of its own entries a rank's fetcher looks ahead from what its workers were asked for."""
_AT_A_TIME = 2 * SHARDS_PER_BLOCK
"""The shards of the block that is being read, and those of the next, which are fetched meanwhile."""


def check_room(readers: Sequence[ShardReader]) -> None:
    """Refuse a cache in which the shards of two blocks do not fit: each read could be a transfer.

    Raises:
        ConfigError: ``data.cache.max_bytes`` is too small; says how much is needed.
    """
    shards = [reader.manifest.shards for reader in readers if reader.remote]
    # A machine may run all ranks, which together read all shards of a block.
    needed = sum(sum(np.sort(part.bytes + part.index_bytes)[-_AT_A_TIME:].tolist()) for part in shards)
    cache = next((reader.cache for reader in readers if reader.remote), None)
    if cache is not None and cache.max_bytes < needed:
        raise ConfigError(
            f"data.cache.max_bytes: {cache.max_bytes}, but the shards that are read at a time may have {needed} bytes; "
            "raise it or pack smaller shards"
        )


class Prefetcher:
    """Context manager around a rank's micro-batches; does nothing for data on local disks.

    One thread fetches one shard after another in the order in which this rank needs them, and no others; the ranks of a
    node pass over what one of them is fetching, so they share the work. It looks ``AHEAD`` entries ahead, which bounds
    what it fetches too early, and never raises: whatever is wrong is found, and said, by the worker that reads.

    Args:
        readers: of the data set's sources, whose samples are numbered through.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = readers
        self._ends = np.cumsum([len(reader) for reader in readers]).tolist()
        self._remote = any(reader.remote for reader in readers)
        # (reader, shard), and how often the entries ahead need each; None ends the thread.
        self._wanted: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._ahead: Counter[tuple[int, int]] = Counter()
        self._thread = Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        if self._remote:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not joined: a transfer may last, and the kernel frees its lock when this process ends.
        self._ahead.clear()
        self._wanted.put(None)

    def watch(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The same micro-batches; has those that come next fetched meanwhile."""
        if not self._remote:
            yield from micro_batches
            return
        waiting: deque[MicroBatch] = deque()
        entries = 0
        for part in micro_batches:
            waiting.append(part)
            entries += len(part.entries)
            for shard in self._shards(part):
                if not self._ahead[shard]:
                    self._wanted.put(shard)
                self._ahead[shard] += 1
            # A rank may have fillers alone.
            while entries - len(waiting[0].entries) >= AHEAD or len(waiting) > AHEAD:
                entries -= len(waiting[0].entries)
                yield self._passed(waiting.popleft())
        while waiting:
            yield self._passed(waiting.popleft())

    def _passed(self, part: MicroBatch) -> MicroBatch:
        for shard in self._shards(part):
            self._ahead[shard] -= 1
            if not self._ahead[shard]:
                del self._ahead[shard]
        return part

    def _shards(self, part: MicroBatch) -> list[tuple[int, int]]:
        """The shards of a micro-batch, each as often as it is needed."""
        found = []
        for entry in part.entries:
            number = bisect_right(self._ends, entry.sample)
            reader = self._readers[number]
            found.append((number, reader.shard_of(entry.sample - self._ends[number] + len(reader))))
        return found

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            # What the run has overtaken is left alone: it is here, or its worker is fetching it.
            if self._ahead[wanted] > 0:
                reader, shard = wanted
                try:
                    self._readers[reader].prefetch(shard)
                except VitgraftError:
                    # The reader that needs it will say so.
                    continue
