"""Bytes-only reading: vitgraft's ShardReader in an epoch's order against WebDataset and mosaicml-streaming.

All read every sample of a data set of small JPEG images from the page cache, in one process and without decoding;
mosaicml-streaming reads the same samples from shards of its own format. They take turns within a round; the figures are
medians of the ratios within a round. In every round the samples that each reader delivers are compared. The bounds are
what the project promises: four times plain WebDataset, and not behind mosaicml-streaming.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from common.images import pack
from common.measure import Reader, Run, judged, machine, ratios, show, spread, take_turns, write
from common.mosaic import HOW, Mosaic, interpreter
from common.pixels import time_bytes

from vitgraft.data_shards.cache import FileCache
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.plan import EpochPlan
from vitgraft.data_shards.stream import ShardReader

SAMPLES, PER_SHARD, SIDE, ROUNDS = 2000, 250, 256, 7
OURS = "vitgraft, shuffled epoch"
BOUNDS = {
    "webdataset, in order": 4.0,
    "webdataset, shuffled": 4.0,
    "mosaicml-streaming, shuffled epoch": 1.0,
    "mosaicml-streaming, shuffled by index": 1.0,
}

Sample = tuple[bytes, bytes]


def ours(folder: Path | str, cache: FileCache | None, epoch: int) -> Iterator[Sample]:
    """Every sample in the order of the epoch's plan, opened afresh."""
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest, cache)
    plan = EpochPlan(manifest.fingerprint, manifest.shard_sizes, seed=0, epoch=epoch)
    for entry in plan.entries(0, len(plan)):
        members = reader.read(entry.sample).members
        yield members["jpg"], members["json"]


def peer(folder: Path, buffer: int, epoch: int) -> Iterator[Sample]:
    """Every sample by WebDataset, shards and samples shuffled in a buffer when ``buffer`` is not 0."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    shardshuffle = len(urls) if buffer else False
    data: Any = webdataset.WebDataset(urls, shardshuffle=shardshuffle, seed=epoch)
    for sample in data.shuffle(buffer) if buffer else data:
        yield sample["jpg"], sample["json"]


def timed(samples: Callable[[int], Iterator[Sample]], number: int) -> Run:
    """One round of a reader in this process."""
    return Run(*time_bytes(samples(number)))


def main() -> int:
    """Measure, print and write; 1 when a bound is not kept."""
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = temporary / "data"
        manifest = pack(folder, SAMPLES, PER_SHARD, (SIDE, SIDE))
        cache = FileCache(temporary / "cache", 1 << 30)
        readers: dict[str, Reader] = {
            OURS: partial(timed, partial(ours, folder, None)),
            "vitgraft, through the cache of a URL": partial(timed, partial(ours, folder.as_uri(), cache)),
            "webdataset, in order": partial(timed, partial(peer, folder, 0)),
            "webdataset, shuffled": partial(timed, partial(peer, folder, 1000)),
        }
        python = interpreter()
        if python is not None:
            mosaic = stack.enter_context(Mosaic(python, folder, temporary / "mds"))
            readers["mosaicml-streaming, shuffled epoch"] = partial(mosaic.read, decode=False, by_index=False)
            readers["mosaicml-streaming, shuffled by index"] = partial(mosaic.read, decode=False, by_index=True)
        rates = take_turns(readers, ROUNDS)
    ratio = ratios(rates, OURS)
    bounds = {"ratio": judged(ratio, BOUNDS)}
    summary = {
        "what": "samples per second, bytes only, one process, page cache warm; ratio: vitgraft / peer, by round",
        "rounds": ROUNDS,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes_per_sample": int(manifest.shards.bytes.sum()) // manifest.samples,
        "bounds": bounds,
        "kept": all(bound["kept"] for bound in bounds["ratio"].values()),
        "ratio": ratio,
        "samples_per_second": {name: spread(values) for name, values in rates.items()},
        "same_samples": True,
        **machine("webdataset", "numpy"),
    }
    title = f"Reading {summary['samples']} samples of {summary['bytes_per_sample']} bytes, median of rounds"
    show(title, summary, {"ratio": "vitgraft / it"}, None if python else HOW)
    write("reading", summary)
    return 0 if summary["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
