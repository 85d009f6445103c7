"""A rank that reads and keeps a ledger, without a model: what tests/faults/test_ledger.py starts and kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards import loader
from vitgraft.data_shards.batch import Batch
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import train_batches
from vitgraft.data_shards.plan import data_state, micro_batches

GLOBAL_BATCH, SEED = 12, 11


@dataclass(frozen=True)
class Job:
    """One attempt: ``first`` to ``last`` - 1 are its steps."""

    folder: Path
    config: DataConfig
    attempt: int
    world: int
    first: int
    last: int

    def ledger(self, rank: int) -> Path:
        """Lines of {step, entries}, one for each batch."""
        return self.folder / f"attempt-{self.attempt:04d}.rank-{rank}.jsonl"

    def cursor(self, rank: int) -> Path:
        """The data state behind the last batch that is in the ledger."""
        return self.folder / f"attempt-{self.attempt:04d}.rank-{rank}.cursor"


def checksums(batch: Batch) -> list[int]:
    """What became of each entry: a checksum over its image and target."""
    pairs = zip(batch.images, batch.targets, strict=True)
    return [zlib.crc32(image.numpy().tobytes() + target.numpy().tobytes()) for image, target in pairs]


def run_rank(job: Job, rank: int) -> None:
    """Read this rank's batches and note each, first in the ledger and then in the cursor, both synced to the disk; then
    wait to be killed."""
    loader.Window._start = _forked  # type: ignore[method-assign]
    dataset = PackedDataset(job.config.train, job.config, "semantic", seed=SEED)
    cut = micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=job.first,
        last_step=job.last,
        global_batch=GLOBAL_BATCH,
        accumulation=1,
        rank=rank,
        world=job.world,
    )
    with job.ledger(rank).open("w", encoding="utf-8") as stream:
        for micro, batch in train_batches(dataset, cut):
            sums = checksums(batch) if batch.entries else []
            row = {"step": micro.step, "entries": [[*e, s] for e, s in zip(batch.entries, sums, strict=True)]}
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            state = data_state(
                micro.step + 1,
                fingerprint=dataset.fingerprint,
                seed=SEED,
                epoch_size=dataset.epoch_size,
                global_batch=GLOBAL_BATCH,
            )
            _replace(job.cursor(rank), state)
            # So that kills fall between all of these, not only where most of the time is spent.
            time.sleep(0.004)
    while True:
        signal.pause()


def _forked(window: loader.Window) -> ProcessPoolExecutor:
    """The loader processes, forked: from a fork server of its own each rank of each attempt would import torch anew."""
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(window._workers, context, loader._start_worker, (window._dataset,))


def _replace(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(state))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
