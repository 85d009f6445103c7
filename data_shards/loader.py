"""Batches prefetched by loader processes, in order, also when a process dies.

A window of requests slides over a process pool. Torch's DataLoader is not used because a worker that is killed makes it
raise in the middle of whatever the training process is doing; here the pool is replaced and the window asked again, and
since a batch is a pure function of its entries nothing changes. So a worker's death comes to light where the next batch
is asked for, and nowhere else.

Memory is bounded: of ``workers`` x ``prefetch`` batches each is ready, being made or still to be made; one more is in
use. A worker besides holds its own copy of the libraries' data, and of the data set what the manifest says and the
offsets of the shards that it read last. :meth:`TrainBatches.memory` tells what that comes to.

Workers come from a fork server: forking the training
process itself, with the threads of DeepSpeed, gloo and CUDA, could copy a lock that is never released.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from vitgraft.configs.errors import DataError, TrainingError, VitgraftError
from vitgraft.data_shards.batch import Batch
from vitgraft.data_shards.dataset import EvalItem, PackedDataset
from vitgraft.data_shards.plan import MicroBatch
from vitgraft.data_shards.prefetch import Prefetcher
from vitgraft.data_shards.slabs import Slab, SlabName, Slabs, slab_to_write

MAX_REPLACEMENTS = 3
"""Number of replacements of the pool for the same batch before giving up."""

LOOK_S = 1.0
"""While a batch is waited for, the pool is looked at so often."""
MEASURED_EVERY_S = 10.0
"""The kernel walks through all pages of a process to tell its memory, which takes some milliseconds."""

SMALL = 1 << 10
"""Bytes of a tensor that goes through the pipe: all of a batch's stay far below what a pipe takes at once (64 KiB)."""

Index = MicroBatch | Sequence[int]

_ELSEWHERE = torch.empty(0)
"""Stands for images that are in a slab."""

_dataset: PackedDataset | None = None


@dataclass
class _Parcel:
    """A result on its way between processes; its images are in a slab.

    What else is large is in few tensors, each of which takes a file descriptor, shared memory and a connection. They do
    not go through the pipe: a worker killed in the middle of a long write would leave its reader waiting for the rest.
    What is small does, as an array.
    """

    batch: Batch
    counts: list[int] | None = None
    errors: list[tuple[int, str]] | None = None
    truths: Tensor | None = None

    @classmethod
    def pack(cls, result: Batch | EvalItem) -> _Parcel:
        batch = result.batch if isinstance(result, EvalItem) else result
        batch, counts = replace(batch, images=_ELSEWHERE), None
        if isinstance(batch.targets, list):
            joined = {key: torch.cat([target[key] for target in batch.targets]) for key in batch.targets[0]}
            counts = [len(target["labels"]) for target in batch.targets]
            batch = replace(batch, targets=joined)
        batch = batch.map(lambda tensor: tensor.numpy() if tensor.nbytes <= SMALL else tensor)
        if not isinstance(result, EvalItem):
            return cls(batch, counts)
        truths = torch.frombuffer(bytearray(pickle.dumps(batch.truths)), dtype=torch.uint8)
        return cls(replace(batch, truths=[]), counts, result.errors, truths)

    def unpack(self, images: Tensor) -> Batch | EvalItem:
        batch = self.batch.map(lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
        batch = replace(batch, images=images)
        if self.counts is not None:
            parts = {key: value.split(self.counts) for key, value in batch.targets.items()}
            batch = replace(batch, targets=[{key: parts[key][i] for key in parts} for i in range(len(self.counts))])
        if self.truths is None:
            return batch
        # Written by our own worker a moment ago; no file is read here.
        truths = pickle.loads(self.truths.numpy().tobytes())
        return EvalItem(replace(batch, truths=truths), self.errors or [])


def _start_worker(dataset: PackedDataset) -> None:
    """Initialise a worker."""
    global _dataset
    # Graceful stops go to the rank, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_rank, daemon=True).start()
    _dataset = dataset


def _end_with_rank() -> None:
    """End this worker when its rank has ended, for any reason.

    The kernel's own signal at a parent's death would not do: the parent is the fork server, which stays as long as any
    of its children lives. The sentinel is a pipe that only the rank holds open.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None
    connection.wait([rank.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _work(index: Index, slab: SlabName) -> _Parcel:
    assert _dataset is not None
    return _Parcel.pack(_dataset.produce(index, slab_to_write(slab, _dataset.images_shape(index))))


class _Asked(NamedTuple):
    """A result that a worker makes, and the slab for its images."""

    wanted: Index
    slab: Slab
    result: Future[_Parcel]


class Window:
    """Results of ``dataset.produce`` for a sequence of indices, in order, prepared ahead in ``workers`` processes."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset
        self._workers = dataset.config.workers
        self._ahead = max(1, self._workers * dataset.config.prefetch)
        self._pool: ProcessPoolExecutor | None = None
        self._slabs = Slabs()

    def run(self, indices: Iterable[Index]) -> Generator[tuple[Index, Batch | EvalItem], None, None]:
        """Yield (index, result) pairs; closing the generator ends the processes.

        Raises:
            DataError: a sample of a training batch cannot be read.
            TrainingError: workers keep dying over the same batch.
        """
        if not self._workers:
            for index in indices:
                yield index, self._dataset.produce(index)
            return
        source = iter(indices)
        pending: deque[_Asked] = deque()
        try:
            while True:
                for index in islice(source, self._ahead - len(pending)):
                    pending.append(self._ask(index, self._slabs.lend(self._dataset.images_shape(index))))
                if not pending:
                    return
                result = self._first(pending)
                yield pending.popleft().wanted, result
        finally:
            self._end()

    def memory(self) -> int:
        """Return the current bytes of all loader processes; shared memory counts once. 0 without any, and where
        /proc is not Linux's."""
        processes = {} if self._pool is None else self._pool._processes or {}
        return sum(map(_proportional_bytes, list(processes)))

    def _first(self, pending: deque[_Asked]) -> Batch | EvalItem:
        for _ in range(MAX_REPLACEMENTS):
            index, slab, result = pending[0]
            try:
                parcel = self._wait(result)
                return parcel.unpack(self._slabs.read(slab, self._dataset.images_shape(index)))
            except BrokenProcessPool:
                # Nobody writes in the slabs any more when this returns.
                self._end()
                again = [self._ask(asked.wanted, asked.slab) for asked in pending]
                pending.clear()
                pending.extend(again)
            except VitgraftError as error:
                # Without the worker's traceback: the line says what is wrong with the data.
                raise error from None
            except RuntimeError as error:
                if "shared memory" not in str(error):
                    raise
                # Labels come through torch's own shared memory, which is files there.
                raise TrainingError(
                    "no room in /dev/shm for the batches of data workers; enlarge it (containers: --shm-size), or set "
                    "data.workers or data.prefetch lower",
                    cause="host_memory",
                ) from None
        raise TrainingError(
            f"{self._dataset.folder}: data workers died {MAX_REPLACEMENTS} times over the same batch, most likely for "
            "lack of memory (also in /dev/shm); set data.workers or data.prefetch lower"
        )

    def _wait(self, result: Future[_Parcel]) -> _Parcel:
        """Wait for a result. A pool that breaks during the submission can lose the task, and its thread end."""
        while True:
            try:
                return result.result(LOOK_S)
            except TimeoutError:
                if result.done():
                    return result.result()
                assert self._pool is not None
                thread: Any = self._pool._executor_manager_thread
                if self._pool._broken or not thread.is_alive():
                    raise BrokenProcessPool from None

    def _ask(self, index: Index, slab: Slab) -> _Asked:
        if self._pool is None:
            self._pool = self._start()
        try:
            result = self._pool.submit(_work, index, slab.name)
        except BrokenProcessPool:
            self._end()
            self._pool = self._start()
            result = self._pool.submit(_work, index, slab.name)
        return _Asked(index, slab, result)

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        # The server imports torch and this package once; its workers then start in milliseconds.
        context.set_forkserver_preload([__name__])
        return ProcessPoolExecutor(self._workers, context, _start_worker, (self._dataset,))

    def _end(self) -> None:
        """Kill the workers during their work: after the death of one, others may wait for ever, and their results are
        discarded."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((pool._processes or {}).values())
        for process in processes:
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        for process in processes:
            process.join()


def _pinned(batch: Batch) -> Batch:
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _proportional_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        # It ended, or the system has no such file.
        return 0
    found = re.search(r"^Pss:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


class TrainBatches(Iterator[tuple[MicroBatch, Batch]]):
    """See :func:`train_batches`."""

    def __init__(self, dataset: PackedDataset, micro_batches: Iterable[MicroBatch]) -> None:
        self._window = Window(dataset)
        self._batches = _prepared(dataset, self._window, micro_batches)
        self._memory, self._measure_at = 0, 0.0

    def __next__(self) -> tuple[MicroBatch, Batch]:
        return next(self._batches)

    def close(self) -> None:
        """End the processes."""
        self._batches.close()

    def memory(self) -> int:
        """Return the bytes of this rank's loader processes; cached for some seconds, so calls are cheap."""
        now = time.monotonic()
        if now >= self._measure_at:
            self._memory, self._measure_at = self._window.memory(), now + MEASURED_EVERY_S
        return self._memory


def _prepared(
    dataset: PackedDataset, window: Window, micro_batches: Iterable[MicroBatch]
) -> Generator[tuple[MicroBatch, Batch], None, None]:
    with Prefetcher(dataset.readers) as ahead:
        for index, result in window.run(ahead.watch(micro_batches)):
            yield cast(MicroBatch, index), _pinned(cast(Batch, result))


def train_batches(dataset: PackedDataset, micro_batches: Iterable[MicroBatch]) -> TrainBatches:
    """Return batches of training in the order of ``micro_batches``, in pinned memory where there is CUDA.

    ``close()`` ends the loader's processes.

    Raises:
        DataError: a sample cannot be read and the recipe does not let it be skipped; names shard and sample.
        TrainingError: loader processes keep dying.
    """
    return TrainBatches(dataset, micro_batches)


def eval_batches(
    dataset: PackedDataset,
    indices: Sequence[int],
    batch_size: int,
    on_error: Callable[[int, str], None] | None = None,
) -> Iterator[Batch]:
    """Yield batches of evaluation with ground truth, in the order of ``indices``; targets where the data set has them.

    Args:
        on_error: called with (sample, one-line reason) for every sample that cannot be read, before its batch is
            yielded. Such a sample has weight 0 in it; ``None``: the first one raises.

    Raises:
        DataError: a sample cannot be read and there is no ``on_error``.
        TrainingError: loader processes keep dying.
    """
    chunks = (list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size))
    for _, result in Window(dataset).run(chunks):
        item = cast(EvalItem, result)
        for sample, message in item.errors:
            if on_error is None:
                raise DataError(message)
            on_error(sample, message)
        yield _pinned(item.batch)
