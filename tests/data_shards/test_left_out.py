"""Entries that are left out because their loss was not finite: where they are, unread, at weight zero."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.batch import NOT_FINITE, Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import train_batches
from vitgraft.data_shards.plan import micro_batches

Configure = Callable[..., DataConfig]
OUT = frozenset({(0, 2), (0, 13), (1, 4)})


def batches(dataset: PackedDataset, rank: int, world: int) -> list[Any]:
    """Three steps of eight: one of the 22 entries' epochs."""
    cut = micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=0,
        last_step=3,
        global_batch=8,
        accumulation=1,
        rank=rank,
        world=world,
    )
    return [batch for _, batch in train_batches(dataset, cut)]


@pytest.fixture
def unreadable(packed: dict[str, Path], tmp_path: Path) -> Callable[[str, set[int]], Path]:
    """A data set in which some samples are damaged."""
    import numpy as np

    def make(kind: str, samples: set[int]) -> Path:
        folder = Path(shutil.copytree(packed[kind], tmp_path / kind))
        for sample in samples:
            shard, local = divmod(sample, 10)
            index = np.fromfile(folder / f"shard-{shard:06d}.idx", dtype="<u8")
            with (folder / f"shard-{shard:06d}.tar").open("r+b") as stream:
                stream.seek(int(index[local]) + 512)
                stream.write(b"\0" * 1000)
        return folder

    return make


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (4, 0)])
def test_they_keep_their_place_unread_in_every_world(
    packed: dict[str, Path], unreadable: Any, configure: Configure, world: int, workers: int
) -> None:
    """Their samples are damaged, under ``on_error: stop``: one that is read ends the test."""
    whole = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic", seed=4)
    order = whole.plan(0).entries(0, 22)
    folder = unreadable("semantic", {order[2].sample, order[13].sample})
    dataset = PackedDataset(folder, configure(folder, workers=workers), "semantic", seed=4)
    dataset.left_out = OUT
    found = []
    for rank in range(world):
        for good, batch in zip(batches(whole, rank, world), batches(dataset, rank, world), strict=True):
            assert batch.entries == good.entries
            out = torch.tensor([(entry.epoch, entry.position) in OUT for entry in batch.entries] or [False])
            assert torch.equal(batch.weights, torch.where(out, 0.0, good.weights))
            assert torch.equal(batch.images[~out], good.images[~out])
            assert torch.equal(batch.targets[~out], good.targets[~out])
            assert not batch.images[out].any()
            assert (batch.targets[out] == 255).all()
            found += batch.skipped
    assert sorted((skip.entry, skip.key, skip.reason) for skip in found) == [
        (order[position], f"{order[position].sample:09d}", NOT_FINITE) for position in (2, 13)
    ]


@pytest.mark.parametrize("kind", ["detection", "semantic", "video"])
def test_all_of_a_batch(packed: dict[str, Path], configure: Configure, kind: Any) -> None:
    """It is a batch of fillers."""
    dataset = PackedDataset(packed[kind], configure(packed[kind]), kind)
    entries = dataset.plan(0).entries(0, 3)
    dataset.left_out = frozenset((entry.epoch, entry.position) for entry in entries)
    batch, filler = dataset.train_batch(entries), dataset.train_batch([])
    assert batch.weights.tolist() == [0.0] * 3
    assert torch.equal(batch.images, filler.images.expand_as(batch.images))
    assert [skip.entry for skip in batch.skipped] == entries
    assert batch.entries == entries


def test_the_entry_is_left_out_and_not_its_sample(packed: dict[str, Path], configure: Configure) -> None:
    dataset = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic")
    dataset.left_out = frozenset({(0, 5)})
    batch = dataset.train_batch([Entry(0, 5, 7, 0), Entry(1, 5, 7, 0), Entry(0, 6, 7, 1)])
    assert batch.weights.tolist() == [0.0, 1.0, 1.0]


def test_its_partner_is_mixed_with_itself(packed: dict[str, Path], unreadable: Any, configure: Configure) -> None:
    changes: dict[str, Any] = {"transforms": [{"name": "resize"}, {"name": "mixup"}]}
    order = PackedDataset(packed["video"], configure(packed["video"]), "video").plan(0).entries(0, 2)
    folder = unreadable("video", {order[0].sample})
    dataset = PackedDataset(folder, configure(folder, **changes), "video")
    with pytest.raises(DataError):
        dataset.train_batch(order[1:])
    dataset.left_out = frozenset({(0, 0)})
    mixed = dataset.train_batch(order[1:])
    alone = PackedDataset(packed["video"], configure(packed["video"]), "video").train_batch(order[1:])
    torch.testing.assert_close(mixed.images, alone.images, rtol=1e-6, atol=1e-6)
    assert mixed.targets.argmax(1).tolist() == alone.targets.tolist()
    assert mixed.skipped == []
