"""Decode and resize: batches from vitgraft, in this process and from one loader process, against the decoder itself.

The bound is what one core does when the JPEGs are bytes in memory: decode, resize, normalise, stack (common/pixels.py).
WebDataset and mosaicml-streaming do the same work on what they read, in one process and from a worker process of
torch's DataLoader. All make batches of 16 of the same images, vitgraft's with metadata checked and randomness seeded
for each image; in every round the pixels of all images are compared, bit for bit. Rates are samples per second of a
core's time, those of the main and the worker process together where there are both. They take turns within a round; the
figures are medians of the ratios within a round. The bounds are on a loader process, with what the main process takes
besides: 95 % of the decoder itself, and not behind a peer's worker process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset
from common.images import pack
from common.measure import Reader, Run, judged, machine, ratios, show, spread, take_turns, write
from common.mosaic import HOW, Mosaic, interpreter
from common.pixels import BATCH, SIZE, decoded, time_batches, time_decoding, time_worker
from torch import Tensor
from torch.utils.data import DataLoader

from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import train_batches
from vitgraft.data_shards.plan import micro_batches

SAMPLES, PER_SHARD, STORED, ROUNDS = 192, 64, (384, 512), 7
OURS, WORKER, MEMORY = "vitgraft", "vitgraft, from a loader process", "the decoder on bytes in memory"
WEBDATASET, MOSAIC = "webdataset, from a DataLoader worker", "mosaicml-streaming, from a DataLoader worker"
BOUNDS = {MEMORY: 0.95, WEBDATASET: 1.0, MOSAIC: 1.0}


def config(folder: Path, workers: int) -> DataConfig:
    """Training with a plain resize to the canvas."""
    tree = {"train": {"path": str(folder)}, "image_size": list(SIZE), "workers": workers, "prefetch": 2}
    return DataConfig.model_validate(tree)


def epoch(dataset: PackedDataset, number: int) -> Iterator[Tensor]:
    """The batches of one epoch."""
    steps = SAMPLES // BATCH
    cut = micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=number * steps,
        last_step=(number + 1) * steps,
        global_batch=BATCH,
        accumulation=1,
        rank=0,
        world=1,
    )
    return (batch.images for _, batch in train_batches(dataset, cut))


def ours(dataset: PackedDataset, number: int) -> Run:
    """In this process."""
    return Run(*time_batches(epoch(dataset, number)))


def worker(dataset: PackedDataset, number: int) -> Run:
    """From a loader process."""
    return Run(*time_worker(epoch(dataset, number), SAMPLES // BATCH))


def webdataset_worker(folder: Path) -> Run:
    """By WebDataset in a worker process of torch's DataLoader."""
    data: Any = shards(folder).map(pixels)
    loader: DataLoader[Tensor] = DataLoader(data, batch_size=BATCH, num_workers=1, prefetch_factor=2)
    return Run(*time_worker(iter(loader), SAMPLES // BATCH))


def pixels(sample: dict[str, bytes]) -> Tensor:
    """Of WebDataset's sample."""
    return decoded(sample["jpg"])


def shards(folder: Path) -> Any:
    """By WebDataset, in order."""
    return webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)


def jpgs(folder: Path) -> Iterator[bytes]:
    """By WebDataset, in order."""
    return (sample["jpg"] for sample in shards(folder))


def main() -> int:
    """Measure, print and write; 1 when a bound is not kept."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = temporary / "data"
        manifest = pack(folder, SAMPLES, PER_SHARD, STORED)
        in_memory = list(jpgs(folder))
        readers: dict[str, Reader] = {
            OURS: partial(ours, PackedDataset(folder, config(folder, 0), "image")),
            WORKER: partial(worker, PackedDataset(folder, config(folder, 1), "image")),
            MEMORY: lambda _: Run(*time_decoding(iter(in_memory))),
            "webdataset, in order": lambda _: Run(*time_decoding(jpgs(folder))),
            WEBDATASET: lambda _: webdataset_worker(folder),
        }
        python = interpreter()
        if python is not None:
            mosaic = stack.enter_context(Mosaic(python, folder, temporary / "mds"))
            readers["mosaicml-streaming, shuffled epoch"] = partial(mosaic.read, decode=True, by_index=False)
            readers["mosaicml-streaming, shuffled by index"] = partial(mosaic.read, decode=True, by_index=True)
            readers[MOSAIC] = partial(mosaic.read, decode=True, worker=True)
        rates = take_turns(readers, ROUNDS)
    worker_ratio = ratios(rates, WORKER)
    bounds = {"worker_ratio": judged(worker_ratio, BOUNDS)}
    summary = {
        "what": "samples per core-second, JPEGs decoded, resized, normalised, batched; ratio: vitgraft / it, by round; "
        "worker_ratio: vitgraft from a loader process / it",
        "rounds": ROUNDS,
        "samples": manifest.samples,
        "stored": STORED,
        "resized": SIZE,
        "batch": BATCH,
        "bytes_per_sample": int(manifest.shards.bytes.sum()) // manifest.samples,
        "bounds": bounds,
        "kept": all(bound["kept"] for bound in bounds["worker_ratio"].values()),
        "ratio": ratios(rates, OURS),
        "worker_ratio": worker_ratio,
        "samples_per_second": {name: spread(values) for name, values in rates.items()},
        "same_pixels": True,
        **machine("webdataset", "torch", "torchvision", "pillow"),
    }
    show(
        f"Decoding {STORED[1]}x{STORED[0]} JPEGs to {SIZE[1]}x{SIZE[0]} on one core, median of rounds",
        summary,
        {"ratio": "vitgraft / it", "worker_ratio": "loader process / it"},
        None if python else HOW,
    )
    write("decoding", summary)
    return 0 if summary["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
