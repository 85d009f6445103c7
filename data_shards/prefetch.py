"""Fetch the shards that a run will read next while it reads the present ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

from vitgraft.configs.errors import ConfigError, VitgraftError
from vitgraft.data_shards.plan import SHARDS_PER_BLOCK, MicroBatch, Plan
from vitgraft.data_shards.stream import ShardReader

AHEAD = 2048
"""Entries that the fetcher looks ahead from the newest one that was asked for."""
_AT_A_TIME = SHARDS_PER_BLOCK + 1


def check_room(readers: Sequence[ShardReader]) -> None:
    """Refuse a cache in which the shards that are shuffled together do not fit: each read could be a transfer.

    Raises:
        ConfigError: ``data.cache.max_bytes`` is too small; says how much is needed.
    """
    needed = sum(
        sum(sorted((shard.bytes + shard.index_bytes for shard in reader.manifest.shards), reverse=True)[:_AT_A_TIME])
        for reader in readers
        if reader.remote
    )
    cache = next((reader.cache for reader in readers if reader.remote), None)
    if cache is not None and cache.max_bytes < needed:
        raise ConfigError(
            f"data.cache.max_bytes: {cache.max_bytes}, but the shards that are read at a time may have {needed} bytes; "
            "raise it or pack smaller shards"
        )


class Prefetcher:
    """Context manager around a rank's micro-batches; does nothing for data on local disks.

    One thread fetches one shard after another, in the order of the plan; the ranks of a node pass over what one of them
    is fetching, so they share the work. It looks ``AHEAD`` entries ahead, which bounds what it fetches too early, and
    never raises: whatever is wrong is found, and said, by the worker that reads.

    Args:
        readers: of the data set's sources, whose samples are numbered through.
        plans: the plan of an epoch, by its number; called in the thread.
    """

    def __init__(self, readers: Sequence[ShardReader], plans: Callable[[int], Plan]) -> None:
        self._readers, self._plans = readers, plans
        self._changed = threading.Condition()
        self._newest: tuple[int, int] | None = None
        self._needed = any(reader.remote for reader in readers)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        if self._needed:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not joined: a transfer may last, and the kernel frees its lock when this process ends.
        with self._changed:
            self._stopped.set()
            self._changed.notify()

    def watch(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The same micro-batches; notes how far the run has come."""
        for part in micro_batches:
            if part.entries:
                with self._changed:
                    self._newest = part.epoch, part.entries[-1].position
                    self._changed.notify()
            yield part

    def _run(self) -> None:
        done: tuple[int, int] | None = None
        plan: Plan | None = None
        while True:
            with self._changed:
                while not self._stopped.is_set() and self._newest == done:
                    self._changed.wait()
                if self._stopped.is_set() or self._newest is None:
                    return
                done = self._newest
            epoch, position = done
            if plan is None or plan.epoch != epoch:
                plan = self._plans(epoch)
            ahead = plan.entries(position, min(position + AHEAD, len(plan)))
            for reader, shard in dict.fromkeys(self._shard(entry.sample) for entry in ahead):
                if self._stopped.is_set():
                    return
                try:
                    self._readers[reader].prefetch(shard)
                except VitgraftError:
                    # The reader that needs it will say so.
                    continue

    def _shard(self, sample: int) -> tuple[int, int]:
        for number, reader in enumerate(self._readers):
            if sample < len(reader):
                return number, reader.shard_of(sample)
            sample -= len(reader)
        raise IndexError(f"no sample {sample}")
