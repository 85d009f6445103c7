"""The first batch after a resume at 90 % of an epoch against the first at its start.

Each opens the data set afresh, from the manifest on, and makes one batch; files come from the page cache. WebDataset
keeps no place in an epoch, so that it goes on by reading what was read before. The cases take turns within a round; the
figures are medians of the ratios within a round. At each place both must read the samples that are due there.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset
from common.images import pack
from common.measure import Run, machine, spread, take_turns, write
from common.pixels import BATCH, SIZE, decoded
from rich.console import Console
from rich.table import Table

from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import train_batches
from vitgraft.data_shards.plan import micro_batches, steps_per_epoch

SAMPLES, PER_SHARD, ROUNDS = 3200, 50, 15
LATE, BOUND = 0.9, 1.5


def ours(folder: Path, at: float, number: int) -> Run:
    """The batch of vitgraft's plan at a fraction of an epoch."""
    started = time.perf_counter()
    tree = {"train": {"path": str(folder)}, "image_size": list(SIZE), "workers": 0}
    dataset = PackedDataset(folder, DataConfig.model_validate(tree), "image")
    step = int(at * steps_per_epoch(dataset.epoch_size, BATCH))
    cut = micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=step,
        last_step=step + 1,
        global_batch=BATCH,
        accumulation=1,
        rank=0,
        world=1,
    )
    _, batch = next(train_batches(dataset, cut))
    seconds = time.perf_counter() - started
    due = dataset.plan(0).entries(step * BATCH, (step + 1) * BATCH)
    if sorted(batch.entries) != due:
        raise RuntimeError(f"at {at}: not the entries that are due there")
    return Run(seconds, 1, "")


def peer(folder: Path, at: float, number: int) -> Run:
    """The batch of WebDataset's order at a fraction of an epoch."""
    started = time.perf_counter()
    data: Any = webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    first = int(at * SAMPLES) // BATCH * BATCH
    found = list(islice(data, first, first + BATCH))
    torch.stack([decoded(sample["jpg"]) for sample in found])
    seconds = time.perf_counter() - started
    if [int(sample["__key__"]) for sample in found] != list(range(first, first + BATCH)):
        raise RuntimeError(f"at {at}: not the samples that are due there")
    return Run(seconds, 1, "")


def main() -> int:
    """Measure, print and write; 1 when the bound is not kept."""
    torch.set_num_threads(1)
    cases = {"vitgraft": ours, "webdataset, in order": peer}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        manifest = pack(folder, SAMPLES, PER_SHARD, SIZE)
        readers = {(name, at): partial(case, folder, at) for name, case in cases.items() for at in (0.0, LATE)}
        rates = take_turns({f"{name} at {at:.0%}": reader for (name, at), reader in readers.items()}, ROUNDS)
    found = {}
    for name in cases:
        early, late = ([1 / rate for rate in rates[f"{name} at {at:.0%}"]] for at in (0.0, LATE))
        found[name] = {
            "seconds_at_start": spread(early),
            "seconds_at_90": spread(late),
            "ratio": spread([b / a for a, b in zip(early, late, strict=True)]),
        }
    summary = {
        "what": "seconds from opening the data set to its first batch; ratio: at 90 % of the epoch / at its start",
        "rounds": ROUNDS,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "batch": BATCH,
        "bound": BOUND,
        "kept": found["vitgraft"]["ratio"]["median"] <= BOUND,
        "cases": found,
        **machine("webdataset", "torch"),
    }
    table = Table(title=f"The first batch of {BATCH} in an epoch of {SAMPLES} samples, median of rounds")
    for column in ("reader", "at 0 %, ms", "at 90 %, ms", "ratio", "min", "max"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, case in found.items():
        times = [f"{1000 * case[key]['median']:.1f}" for key in ("seconds_at_start", "seconds_at_90")]
        table.add_row(name, *times, *(f"{case['ratio'][key]:.2f}" for key in ("median", "min", "max")))
    table.add_row("bound", "", "", f"{BOUND:.2f}", "", "")
    Console(width=120).print(table)
    write("resume", summary)
    return 0 if summary["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
