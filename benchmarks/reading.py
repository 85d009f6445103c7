"""Bytes-only reading: vitgraft's ShardReader in an epoch's order against WebDataset over the same shards.

All read every sample of a data set of small JPEG images from the page cache, in one process and without decoding. They
take turns within a round, each round beginning with another one, so that whatever else the machine does falls on all of
them; the figures are medians of the ratios within a round. In every round the samples that each reader delivers are
compared as a multiset of their bytes.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.plan import EpochPlan
from vitgraft.data_shards.stream import ShardReader

SAMPLES, PER_SHARD, SIDE, ROUNDS = 2000, 250, 256, 9
OURS = "vitgraft, shuffled epoch"
PEERS = {"webdataset, in order": 0, "webdataset, shuffled": 1000}
RESULTS = Path(__file__).resolve().parent / "results" / "reading.json"

Sample = tuple[bytes, bytes]
Reader = Callable[[int], Iterator[Sample]]


def pack(out: Path) -> Manifest:
    """A data set of JPEG images of some 25 KB each, from a fixed seed."""
    generator = np.random.default_rng(0)
    with DatasetWriter(out, "detection", ["object"], samples_per_shard=PER_SHARD) as writer:
        for _ in range(SAMPLES):
            coarse = Image.fromarray(generator.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8))
            stream = io.BytesIO()
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
            writer.add({"jpg": stream.getvalue()}, {"height": SIDE, "width": SIDE, "annotations": []})
    return writer.result()


def ours(folder: Path, epoch: int) -> Iterator[Sample]:
    """Every sample in the order of the epoch's plan, opened afresh."""
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest)
    plan = EpochPlan(manifest.fingerprint, manifest.shard_sizes, seed=0, epoch=epoch)
    for entry in plan.entries(0, len(plan)):
        members = reader.read(entry.sample).members
        yield members["jpg"], members["json"]


def peer(folder: Path, epoch: int, buffer: int) -> Iterator[Sample]:
    """Every sample by WebDataset, shards and samples shuffled in a buffer when ``buffer`` is not 0."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    shardshuffle = len(urls) if buffer else False
    data: Any = webdataset.WebDataset(urls, shardshuffle=shardshuffle, seed=epoch)
    for sample in data.shuffle(buffer) if buffer else data:
        yield sample["jpg"], sample["json"]


def digest(samples: list[Sample]) -> collections.Counter[bytes]:
    """The samples as a multiset."""
    return collections.Counter(hashlib.sha256(jpg + b"\0" + text).digest() for jpg, text in samples)


def measure(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    """Samples per second of each reader in each round; a first round warms the page cache and does not count.

    Raises:
        RuntimeError: two readers delivered different samples.
    """
    rates: dict[str, list[float]] = {name: [] for name in readers}
    expected = None
    for number in range(rounds + 1):
        turn = number % len(readers)
        for name, reader in [*readers.items()][turn:] + [*readers.items()][:turn]:
            started = time.perf_counter()
            samples = list(reader(number))
            seconds = time.perf_counter() - started
            found = digest(samples)
            expected = found if expected is None else expected
            if found != expected or len(samples) != SAMPLES:
                raise RuntimeError(f"round {number}: {name} did not deliver the samples of the others")
            if number:
                rates[name].append(len(samples) / seconds)
    return rates


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def summarise(rates: dict[str, list[float]], manifest: Manifest) -> dict[str, Any]:
    """The content of results/reading.json."""
    ratios = {
        name: spread([mine / other for mine, other in zip(rates[OURS], rates[name], strict=True)]) for name in PEERS
    }
    size = sum(shard.bytes for shard in manifest.shards)
    return {
        "what": "samples per second, bytes only, one process, page cache warm; ratio: vitgraft / peer, by round",
        "rounds": ROUNDS,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes_per_sample": size // manifest.samples,
        "ratio": ratios,
        "samples_per_second": {name: spread(values) for name, values in rates.items()},
        "same_samples": True,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("vitgraft", "webdataset", "numpy")},
        },
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(
        title=f"Reading {summary['samples']} samples of {summary['bytes_per_sample']} bytes, median of rounds"
    )
    for column in ("reader", "samples/s", "vitgraft / peer", "min", "max"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, rate in summary["samples_per_second"].items():
        ratio = summary["ratio"].get(name)
        cells = [f"{ratio[key]:.2f}" for key in ("median", "min", "max")] if ratio else ["", "", ""]
        table.add_row(name, f"{rate['median']:,.0f}", *cells)
    Console().print(table)


def main() -> int:
    """Measure, print and write."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        manifest = pack(folder)
        readers: dict[str, Reader] = {OURS: partial(ours, folder)}
        for name, buffer in PEERS.items():
            readers[name] = partial(peer, folder, buffer=buffer)
        summary = summarise(measure(readers, ROUNDS), manifest)
    show(summary)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
