"""mosaicml-streaming as a peer, in whatever interpreter has it: commands come as lines of JSON, answers go likewise."""

from __future__ import annotations

import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from pixels import BATCH, decoded, time_bytes, time_decoding, time_worker
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch import Tensor
from torch.utils.data import DataLoader

Sample = tuple[bytes, bytes]


def convert(folder: Path, out: Path) -> None:
    """Write the samples of our tars as MDS shards of about the same size."""
    tars = sorted(folder.glob("*.tar"))
    columns = {"jpg": "bytes", "json": "bytes"}
    with MDSWriter(out=str(out), columns=columns, size_limit=max(tar.stat().st_size for tar in tars)) as writer:
        for path in tars:
            sample: dict[str, bytes] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    sample[member.name.partition(".")[2]] = stream.read()
                    if len(sample) == len(columns):
                        writer.write(sample)
                        sample = {}


def shuffled(data: StreamingDataset, number: int, by_index: bool) -> Iterator[Sample]:
    """Every sample, in the order of the data set's next epoch or in any by index."""
    if by_index:
        order = random.Random(number).sample(range(len(data)), len(data))
        return ((sample["jpg"], sample["json"]) for sample in map(data.__getitem__, order))
    return ((sample["jpg"], sample["json"]) for sample in data)


class Decoded(StreamingDataset):
    """Pixels; a DataLoader's worker makes them."""

    def __getitem__(self, at: int) -> Tensor:
        return decoded(super().__getitem__(at)["jpg"])


def main() -> None:
    """Arguments: the folder of tars, and an empty one to write in."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    convert(folder, out)
    clean_stale_shared_memory()
    # By default it looks a few batches ahead and sleeps in between: some four times slower on local shards.
    options = {
        "local": str(out),
        "shuffle": True,
        "batch_size": BATCH,
        "predownload": 1 << 20,
        "num_canonical_nodes": 1,
    }
    data = StreamingDataset(**options)
    pixels: StreamingDataset | None = None
    print(json.dumps({"samples": len(data)}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["worker"]:
            pixels = pixels or Decoded(**options)
            batches = DataLoader(pixels, batch_size=BATCH, num_workers=1, prefetch_factor=2)
            print(json.dumps(time_worker(iter(batches), len(data) // BATCH)), flush=True)
            continue
        samples = shuffled(data, command["round"], command["by_index"])
        work = time_decoding(jpg for jpg, _ in samples) if command["decode"] else time_bytes(samples)
        print(json.dumps(work), flush=True)


if __name__ == "__main__":
    main()
