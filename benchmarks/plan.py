"""The plan of a huge data set: time and memory to start, or to resume anywhere, in an epoch of 10^8 samples.

Each case opens the plan afresh, in a process forked for it, and asks for the first batch of one rank of 256 at a
global batch of 4096: at the start of the epoch, at 90 % of it, and so for a mixture and for the largest tars that may
be indexed, each of which is shuffled by itself. The last case is a whole start: it reads and checks the manifest,
compares the sizes of all 2 x 10^5 files (sparse ones here) and resumes at 90 %; a rank does that once, and more than
half of the time is the file system's. Memory is by how much the process grows at its peak. There is no peer: the bounds
in the table are what the project promises.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from common.measure import machine, write
from rich.console import Console
from rich.table import Table

from vitgraft.data_shards.manifest import MANIFEST, Shard, dump_manifest, make_manifest, read_manifest
from vitgraft.data_shards.mixture import Part, mixture_entries, plan_epoch
from vitgraft.data_shards.plan import MicroBatch, micro_batches, steps_per_epoch
from vitgraft.data_shards.tar_scan import MAX_SAMPLES

SHARDS, PER_SHARD, ROUNDS = 100_000, 1000, 5
GLOBAL_BATCH, RANK, WORLD, SEED = 4096, 200, 256, 0
BOUND_SECONDS, BOUND_MEGABYTES = 1.0, 300.0
START = "whole start: manifest, sizes of all files, first batch at 90 %"

Source = tuple[str, int, int, Fraction]
"""Name, shards, samples in each, visits of each sample."""

WHOLE = [("a", SHARDS, PER_SHARD, Fraction(1))]
MIXTURE = [
    ("a", SHARDS * 6 // 10, PER_SHARD, Fraction(1)),
    ("b", SHARDS * 3 // 10, PER_SHARD, Fraction(5, 2)),
    ("c", SHARDS // 10, PER_SHARD, Fraction(1, 4)),
]
LARGEST = [("a", SHARDS * PER_SHARD // MAX_SAMPLES, MAX_SAMPLES, Fraction(1))]
CASES: dict[str, tuple[list[Source], float]] = {
    "start of an epoch": (WHOLE, 0.0),
    "resume at 90 %": (WHOLE, 0.9),
    "resume at 90 %, mixture of three": (MIXTURE, 0.9),
    "resume at 90 %, tars of 2 x 10^6": (LARGEST, 0.9),
}


def first_batch(sources: list[Source], at: float) -> tuple[MicroBatch, int]:
    """The first micro-batch of one rank at a fraction of the epoch, from nothing; and the entries of the epoch."""
    return cut_first(
        [Part(hashlib.sha256(name.encode()).hexdigest(), [size] * shards, w) for name, shards, size, w in sources], at
    )


def cut_first(parts: list[Part], at: float) -> tuple[MicroBatch, int]:
    """The same for parts of known fingerprint."""
    size = mixture_entries(parts)
    step = int(steps_per_epoch(size, GLOBAL_BATCH) * at)
    cut = micro_batches(
        lambda epoch: plan_epoch(parts, SEED, epoch),
        epoch_size=size,
        first_step=step,
        last_step=step + 1,
        global_batch=GLOBAL_BATCH,
        accumulation=1,
        rank=RANK,
        world=WORLD,
    )
    return next(cut), size


def megabytes() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_case(name: str) -> dict[str, float]:
    """Seconds and megabytes of one case, in this process."""
    sources, at = CASES[name]
    before, started = megabytes(), time.perf_counter()
    micro, size = first_batch(sources, at)
    seconds = time.perf_counter() - started
    if len(micro.entries) != GLOBAL_BATCH // WORLD:
        raise RuntimeError(f"{name}: {len(micro.entries)} entries instead of {GLOBAL_BATCH // WORLD}")
    return {"seconds": seconds, "megabytes": megabytes() - before, "entries": size}


def measure_start(folder: Path) -> dict[str, float]:
    """Seconds and megabytes of a start from the files on disk, in this process."""
    before, started = megabytes(), time.perf_counter()
    manifest = read_manifest(folder)
    micro, size = cut_first([Part(manifest.fingerprint, manifest.shard_sizes)], 0.9)
    seconds = time.perf_counter() - started
    if len(micro.entries) != GLOBAL_BATCH // WORLD:
        raise RuntimeError(f"{START}: {len(micro.entries)} entries instead of {GLOBAL_BATCH // WORLD}")
    return {"seconds": seconds, "megabytes": megabytes() - before, "entries": size}


def alone(function: Callable[[Any], Any], argument: Any) -> Any:
    """What a function returns in a process forked for it, which has no memory left over from another case."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, (argument,))


def write_data(folder: Path) -> None:
    """A folder with a manifest and files of the sizes that it states, which take no room."""
    shards = [
        Shard(
            name=f"shard-{number:06d}.tar",
            samples=PER_SHARD,
            bytes=PER_SHARD * 100_000,
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
            index_sha256=hashlib.sha256(b"i" + str(number).encode()).hexdigest(),
        )
        for number in range(SHARDS)
    ]
    for shard in shards:
        for name, size in ((shard.name, shard.bytes), (shard.index_name, shard.index_bytes)):
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.truncate(descriptor, size)
            os.close(descriptor)
    (folder / MANIFEST).write_text(dump_manifest(make_manifest("detection", ["object"], None, shards, {})))


def summarise(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The content of results/plan.json."""
    cases = {
        name: {
            "entries": int(found[0]["entries"]),
            "seconds": {
                "min": min(one["seconds"] for one in found),
                "median": statistics.median(one["seconds"] for one in found),
                "max": max(one["seconds"] for one in found),
            },
            "megabytes": max(one["megabytes"] for one in found),
        }
        for name, found in rounds.items()
    }
    return {
        "what": "from nothing to the first batch of one rank, in a process of its own",
        "shards": SHARDS,
        "samples": SHARDS * PER_SHARD,
        "rounds": ROUNDS,
        "bound": {"seconds": BOUND_SECONDS, "megabytes": BOUND_MEGABYTES},
        "cases": cases,
        "kept": all(
            cases[name]["seconds"]["max"] < BOUND_SECONDS and cases[name]["megabytes"] < BOUND_MEGABYTES
            for name in CASES
        ),
        **machine("numpy", "pydantic"),
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"The plan of {summary['samples']:.0e} samples in {summary['shards']:.0e} shards")
    for column in ("what", "entries", "seconds", "max", "memory, MB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, case in summary["cases"].items():
        seconds = case["seconds"]
        cells = [f"{seconds['median']:.3f}", f"{seconds['max']:.3f}", f"{case['megabytes']:.0f}"]
        table.add_row(name, f"{case['entries']:,}", *cells)
    table.add_row("bound for the plan", "", "", f"{BOUND_SECONDS:.3f}", f"{BOUND_MEGABYTES:.0f}")
    Console().print(table)


def main() -> int:
    """Measure, print and write; 1 when a bound is not kept."""
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone(write_data, folder)
        for _ in range(ROUNDS):
            for name in CASES:
                rounds.setdefault(name, []).append(alone(measure_case, name))
            rounds.setdefault(START, []).append(alone(measure_start, folder))
    summary = summarise(rounds)
    show(summary)
    write("plan", summary)
    return 0 if summary["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
