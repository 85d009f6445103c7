"""A slab is lent again when the last tensor of its batch is gone, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards import loader
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import Window, eval_batches
from vitgraft.data_shards.slabs import Slab, Slabs, slab_to_write

SHAPE = (2, 3, 4)


def written(slabs: Slabs, value: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    slab = slabs.lend(shape)
    slab_to_write(slab.name, shape).fill_(value)
    return slabs.read(slab, shape)


def test_memory_comes_back_only_with_the_last_tensor() -> None:
    slabs = Slabs()
    first, second = written(slabs, 1), written(slabs, 2)
    part, address = first[1, 1:], first.data_ptr()
    del first
    third = written(slabs, 3)
    assert part.flatten().tolist() == [1.0] * 8
    assert second.unique().tolist() == [2]
    assert third.data_ptr() != address
    del part
    assert written(slabs, 4).data_ptr() == address


def test_a_graph_keeps_what_its_backward_pass_needs() -> None:
    slabs = Slabs()
    weight = torch.ones(4, requires_grad=True)
    loss = (written(slabs, 5) * weight).sum()
    written(slabs, 6)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [30.0] * 4


def test_a_larger_batch_has_a_larger_slab_and_a_smaller_one_does_with_it() -> None:
    slabs = Slabs()
    written(slabs, 1, (1, 3, 4))
    large = written(slabs, 2, (5, 3, 4))
    address = large.data_ptr()
    del large
    small = written(slabs, 3, (1, 3, 4))
    assert (small.data_ptr(), small.unique().tolist(), tuple(small.shape)) == (address, [3], (1, 3, 4))


@pytest.mark.slow
def test_another_process_writes_into_it() -> None:
    slab = Slab(4 * 24)
    script = (
        "from vitgraft.data_shards.slabs import SlabName, slab_to_write\n"
        f"slab_to_write({slab.name!r}, {SHAPE}).fill_(7)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert slab.floats(SHAPE)[0].unique().tolist() == [7]


def test_a_descriptor_that_was_given_up_is_closed_and_its_number_means_another_slab_later() -> None:
    before = len(os.listdir("/proc/self/fd"))
    names = []
    for value in range(3):
        slab = Slab(96)
        names.append(slab.name)
        slab_to_write(slab.name, SHAPE).fill_(value)
        assert slab.floats(SHAPE)[0].unique().tolist() == [value]
        del slab
    assert len({name.path for name in names}) == 1
    assert len(set(names)) == 3
    # The mappings stay, in which nobody writes any more; each holds a descriptor of its own.
    assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.slow
def test_a_loader_lends_no_more_than_its_window_and_the_batch_in_use(
    packed: dict[str, Path], configure: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Counted(Slab):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            made.append(size)

    monkeypatch.setattr("vitgraft.data_shards.slabs.Slab", Counted)
    config = configure(packed["detection"], workers=2, prefetch=2)
    dataset = PackedDataset(packed["detection"], config, "detection", train=False)
    alone = PackedDataset(packed["detection"], configure(packed["detection"]), "detection", train=False)
    expected = [batch.images.clone() for batch in eval_batches(alone, range(22), 1)]
    for batch, images in zip(eval_batches(dataset, range(22), 1), expected, strict=True):
        assert torch.equal(batch.images, images)
    assert len(made) <= 2 * 2 + 1
    # Whoever keeps batches keeps their memory.
    kept = list(eval_batches(dataset, range(22), 1))
    assert all(torch.equal(batch.images, images) for batch, images in zip(kept, expected, strict=True))


def test_what_is_small_goes_through_the_pipe_and_what_is_large_does_not(
    packed: dict[str, Path], configure: Callable[..., DataConfig]
) -> None:
    dataset = PackedDataset(packed["detection"], configure(packed["detection"]), "detection")
    batch = dataset.train_batch(dataset.plan(0).entries(0, 3))
    parcel = loader._Parcel.pack(batch)
    assert len(parcel.batch.images) == 0
    assert isinstance(parcel.batch.targets["masks"], Tensor)
    assert not isinstance(parcel.batch.sizes, Tensor)
    found = parcel.unpack(batch.images)
    assert not isinstance(found, loader.EvalItem)
    assert torch.equal(found.sizes, batch.sizes)
    assert torch.equal(found.weights, batch.weights)
    assert found.entries == batch.entries
    for mine, its in zip(found.targets, batch.targets, strict=True):
        assert {key: value.tolist() for key, value in mine.items()} == {k: v.tolist() for k, v in its.items()}


def test_a_window_without_processes_lends_nothing(
    packed: dict[str, Path], configure: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitgraft.data_shards.slabs.Slab", None)
    dataset = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic", train=False)
    assert len(list(Window(dataset).run([[0], [1]]))) == 2
