"""Readers killed by SIGKILL at random moments, at changing world sizes: their ledger holds each entry exactly once."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ledger_ranks import GLOBAL_BATCH, SEED, Job, checksums, run_rank
from PIL import Image

from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.plan import steps_per_epoch

WORLDS = [1, 3, 2, 4]
STEPS, STEPS_OF_AN_ATTEMPT, PATIENCE_S = 24, 6, 60.0
"""So there are at least four attempts, one at each world size."""


def pack(folder: Path, samples: int, colour: int) -> Path:
    """Small images in shards of seven."""
    generator = np.random.default_rng(colour)
    with DatasetWriter(folder, "semantic", ["a", "b"], samples_per_shard=7) as writer:
        for number in range(samples):
            image, label = io.BytesIO(), io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(image, "PNG")
            Image.fromarray(generator.integers(0, 2, (16, 16), dtype=np.uint8)).save(label, "PNG")
            facts = {"file_name": f"{number}.png", "height": 16, "width": 16}
            writer.add({"png": image.getvalue(), "label.png": label.getvalue()}, facts)
    return folder


def start(job: Job) -> list[Any]:
    """The ranks of an attempt, each a process of its own."""
    context = multiprocessing.get_context("forkserver")
    # It imports torch once; the ranks then start in milliseconds.
    context.set_forkserver_preload(["vitgraft.data_shards.loader"])
    ranks = [context.Process(target=run_rank, args=(job, rank)) for rank in range(job.world)]
    for rank in ranks:
        rank.start()
    return ranks


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ledger; a kill may have torn the last."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def loaders(ranks: list[Any]) -> list[psutil.Process]:
    """The loader processes of all ranks."""
    return [child for rank in ranks for child in psutil.Process(rank.pid).children()]


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that ended may wait for init to notice."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill(job: Job, ranks: list[Any], generator: random.Random) -> int:
    """Kill all ranks, one after the other, once one of them has done a random number of batches; before that, where
    there are loader processes, up to two of these (a rank gives up at the third over one batch). How many it were."""
    watched, target = generator.randrange(job.world), generator.randint(0, job.last - job.first)
    deadline = time.monotonic() + PATIENCE_S
    killed = 0
    while len(rows(job.ledger(watched))) < target:
        assert time.monotonic() < deadline, "the ranks do not go on"
        assert all(rank.is_alive() for rank in ranks)
        if job.config.workers and killed < 2 and generator.random() < 0.1 and (found := loaders(ranks)):
            with contextlib.suppress(psutil.NoSuchProcess):
                generator.choice(found).kill()
                killed += 1
        time.sleep(0.001)
    left = loaders(ranks)
    for rank in generator.sample(ranks, len(ranks)):
        time.sleep(generator.uniform(0, 0.012))
        rank.kill()
    for rank in ranks:
        rank.join(PATIENCE_S)
        assert rank.exitcode == -9
    deadline = time.monotonic() + PATIENCE_S
    while any(map(lives, left)):
        assert time.monotonic() < deadline, "loader processes outlive their ranks"
        time.sleep(0.005)
    return killed


def first_step(job: Job, epoch_size: int) -> int:
    """Where the next attempt begins: what all ranks have done, by their cursor files alone."""
    reached = []
    for rank in range(job.world):
        path = job.cursor(rank)
        state = json.loads(path.read_text()) if path.is_file() else None
        per_epoch = steps_per_epoch(epoch_size, GLOBAL_BATCH)
        reached.append(job.first if state is None else state["epoch"] * per_epoch + state["cursor"] // GLOBAL_BATCH)
    return min(reached)


def audit(jobs: list[Job]) -> dict[int, list[tuple[int, ...]]]:
    """The entries of each step, by the last attempt that began at or before it."""
    history: dict[int, list[tuple[int, ...]]] = {}
    for job in jobs:
        history = {step: entries for step, entries in history.items() if step < job.first}
        for rank in range(job.world):
            for row in rows(job.ledger(rank)):
                history.setdefault(row["step"], []).extend(tuple(entry) for entry in row["entries"])
    return history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "seed", "workers"), [([1], 1, 0), ([1.5, 1], 2, 2)], ids=["one data set", "mixture, loader processes"]
)
def test_readers_killed_at_random_lose_nothing_and_repeat_nothing(
    tmp_path: Path, weights: list[float], seed: int, workers: int
) -> None:
    """41 samples, maybe half of them twice, and maybe 23 others; the last step of an epoch is short in both cases."""
    sources = [
        {"path": str(pack(tmp_path / str(number), samples, number)), "weight": weight}
        for number, (samples, weight) in enumerate(zip((41, 23), weights, strict=False))
    ]
    tree = {"train": sources, "image_size": [16, 16], "transforms": [{"name": "photometric"}]}
    tree |= {"workers": workers}
    config = DataConfig.model_validate(tree)
    dataset = PackedDataset(config.train, config, "semantic", seed=SEED)
    assert dataset.epoch_size == (41 if len(weights) == 1 else 62 + 23)
    last, per_epoch = STEPS, steps_per_epoch(dataset.epoch_size, GLOBAL_BATCH)
    assert last % per_epoch == 0
    generator = random.Random(seed)
    (tmp_path / "ledger").mkdir()
    jobs: list[Job] = []
    first = killed = 0
    while first < last:
        number = len(jobs)
        assert number < 80, "the run does not go on"
        world, stop = WORLDS[number % len(WORLDS)], min(last, first + STEPS_OF_AN_ATTEMPT)
        job = Job(tmp_path / "ledger", config, number, world, first, stop)
        jobs.append(job)
        killed += kill(job, start(job), generator)
        first = first_step(job, dataset.epoch_size)
    assert [job.world for job in jobs[: len(WORLDS)]] == WORLDS
    assert bool(killed) == bool(workers)

    history = audit(jobs)
    assert sorted(history) == list(range(last))
    for epoch in range(last // per_epoch):
        plan = dataset.plan(epoch)
        expected = plan.entries(0, len(plan))
        found = [entry for entries in history.values() for entry in entries if entry[0] == epoch]
        assert Counter(entry[:4] for entry in found) == Counter(tuple(entry) for entry in expected)
        visits = Counter(entry[2] for entry in found)
        assert sorted(visits) == list(range(len(dataset)))
        assert Counter(visits.values()) == ({1: 41} if len(weights) == 1 else {1: 43, 2: 21})
        # Each entry's bytes are those that it has in an unbroken run without workers.
        sums = dict(zip(expected, checksums(dataset.train_batch(expected)), strict=True))
        assert all(sums[Entry(*entry[:4])] == entry[4] for entry in found)
    for step, entries in history.items():
        assert len(entries) == (GLOBAL_BATCH if (step + 1) % per_epoch else dataset.epoch_size % GLOBAL_BATCH)
