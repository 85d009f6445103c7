"""Loader processes change nothing: not the bytes, not the order, not even when they are killed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from vitgraft.configs.errors import DataError, TrainingError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards import loader
from vitgraft.data_shards.batch import Batch
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import eval_batches, train_batches
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.plan import MicroBatch, micro_batches

Configure = Callable[..., DataConfig]

RANDOM = [{"name": "scale_jitter", "min": 0.5, "max": 1.5}, {"name": "random_crop"}, {"name": "photometric"}]


def micros(dataset: PackedDataset, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
    return micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=first,
        last_step=last,
        global_batch=8,
        accumulation=2,
        rank=rank,
        world=world,
    )


def flat(batch: Batch) -> list[bytes]:
    targets = batch.targets if isinstance(batch.targets, list) else [{"all": batch.targets}]
    parts = [batch.images, batch.weights, *(value for target in targets for value in target.values())]
    return [part.numpy().tobytes() for part in parts]


def workers_of_this_process() -> list[psutil.Process]:
    """Loader processes: the children of the fork server, which stays."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.ppid() != os.getpid()]


def gone(count: int = 0) -> bool:
    deadline = time.monotonic() + 20
    while len(workers_of_this_process()) > count and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(workers_of_this_process()) <= count


def test_in_this_process(packed: dict[str, Path], configure: Configure) -> None:
    """A short last step at world 4: some ranks hold fillers, and each entry comes once."""
    dataset = PackedDataset(packed["detection"], configure(packed["detection"]), "detection")
    entries, fillers = [], 0
    for rank in range(4):
        for micro, batch in train_batches(dataset, micros(dataset, 0, 3, rank, 4)):
            assert batch.entries == list(micro.entries)
            entries += batch.entries
            fillers += not micro.entries
            assert float(batch.weights.sum()) == len(micro.entries)
    assert sorted(entry.sample for entry in entries) == list(range(22))
    assert fillers == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detection", "semantic", "video"])
def test_bytes_do_not_depend_on_workers_or_start(packed: dict[str, Path], configure: Configure, kind: Any) -> None:
    runs = []
    for workers, prefetch, first in ((0, 1, 0), (1, 4, 0), (2, 1, 0), (2, 2, 2)):
        config = configure(packed[kind], transforms=RANDOM, workers=workers, prefetch=prefetch)
        dataset = PackedDataset(packed[kind], config, kind, seed=7)
        pairs = list(train_batches(dataset, micros(dataset, first, 4)))
        assert [micro for micro, _ in pairs] == list(micros(dataset, first, 4))
        runs.append({(micro.step, micro.micro): flat(batch) for micro, batch in pairs})
    whole = runs[0]
    assert runs[1] == runs[2] == whole
    assert runs[3] == {key: value for key, value in whole.items() if key[0] >= 2}


@pytest.mark.slow
def test_killed_workers_are_replaced_without_a_trace(packed: dict[str, Path], configure: Configure) -> None:
    expected_config = configure(packed["semantic"], transforms=RANDOM)
    plain = PackedDataset(packed["semantic"], expected_config, "semantic")
    expected = [flat(batch) for _, batch in train_batches(plain, micros(plain, 0, 6))]
    config = configure(packed["semantic"], transforms=RANDOM, workers=2, prefetch=1)
    dataset = PackedDataset(packed["semantic"], config, "semantic")
    found = []
    for number, (_, batch) in enumerate(train_batches(dataset, micros(dataset, 0, 6))):
        found.append(flat(batch))
        if number in (1, 5):
            workers_of_this_process()[number % 2].kill()
    assert found == expected
    assert gone()


@pytest.mark.slow
def test_a_workers_death_comes_to_light_only_where_the_next_batch_is_asked_for(
    packed: dict[str, Path], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's DataLoader raises from a handler of SIGCHLD, wherever the training process happens to be."""
    handler = signal.getsignal(signal.SIGCHLD)
    config = configure(packed["semantic"], workers=2, prefetch=1)
    dataset = PackedDataset(packed["semantic"], config, "semantic")
    batches = train_batches(dataset, micros(dataset, 0, 6))
    next(batches)
    monkeypatch.setattr(loader, "MAX_REPLACEMENTS", 0)
    for process in workers_of_this_process():
        process.kill()
    assert gone()
    # A training step, in which nothing happens.
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        sum(range(1000))
    assert signal.getsignal(signal.SIGCHLD) == handler
    # One batch was ready.
    with pytest.raises(TrainingError, match="data workers died"):
        list(batches)


@pytest.mark.slow
def test_the_memory_of_the_workers_is_told_and_measured_seldom(
    packed: dict[str, Path], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PackedDataset(packed["semantic"], configure(packed["semantic"], workers=2, prefetch=1), "semantic")
    batches = train_batches(dataset, micros(dataset, 0, 6))
    monkeypatch.setattr(loader, "MEASURED_EVERY_S", 0.0)
    assert batches.memory() == 0
    next(batches)
    found, workers = batches.memory(), workers_of_this_process()
    assert len(workers) == 2
    # Pages that several processes share count in part for each.
    assert 2 << 20 < found < sum(worker.memory_info().rss for worker in workers)
    monkeypatch.setattr(loader, "MEASURED_EVERY_S", 3600.0)
    batches.memory()
    monkeypatch.setattr(loader, "_proportional_bytes", None)
    assert batches.memory() > 2 << 20
    batches.close()
    assert gone()


def test_without_workers_there_is_no_memory_to_tell(packed: dict[str, Path], configure: Configure) -> None:
    dataset = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic")
    batches = train_batches(dataset, micros(dataset, 0, 1))
    next(batches)
    assert batches.memory() == 0
    # A process that is gone has none.
    assert loader._proportional_bytes(2**22 + 1) == 0
    assert loader._proportional_bytes(os.getpid()) > 10 << 20


@pytest.mark.slow
def test_signals_to_workers_are_ignored(packed: dict[str, Path], configure: Configure) -> None:
    config = configure(packed["semantic"], workers=1, prefetch=1)
    dataset = PackedDataset(packed["semantic"], config, "semantic")
    batches = train_batches(dataset, micros(dataset, 0, 3))
    next(batches)
    before = workers_of_this_process()
    for process in before:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
    assert len(list(batches)) == 5
    assert before
    assert gone()


@pytest.mark.slow
def test_closing_early_ends_the_processes(packed: dict[str, Path], configure: Configure) -> None:
    config = configure(packed["detection"], workers=2)
    dataset = PackedDataset(packed["detection"], config, "detection", train=False)
    batches = eval_batches(dataset, range(22), 2)
    next(batches)
    assert len(workers_of_this_process()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert gone()


class _Bare(PackedDataset):
    """Stands for a data set in tests of the window alone."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.folder = config, Path("set")

    def images_shape(self, index: Any) -> tuple[int, ...]:
        return (len(index), 3, 8, 8)


def test_a_batch_that_always_kills_its_worker_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    starts = []

    class Pool:
        _processes = None

        def submit(self, *_: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool())
            return future

        def shutdown(self, **_: Any) -> None:
            pass

    config = DataConfig.model_validate({"train": {"path": "x"}, "image_size": [8, 8], "workers": 1})
    window = loader.Window(_Bare(config))
    monkeypatch.setattr(window, "_start", lambda: starts.append(1) or Pool())
    with pytest.raises(TrainingError, match=r"data workers died 3 times .* data\.workers or data\.prefetch lower"):
        list(window.run([[0], [1]]))
    assert len(starts) == 1 + loader.MAX_REPLACEMENTS


def test_a_batch_that_its_pool_has_forgotten_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython loses what is asked for in the very moment in which a pool breaks."""
    from concurrent.futures import Future

    class Pool:
        _processes: ClassVar[dict[int, Any]] = {}
        _broken = "a process died"
        _executor_manager_thread = threading.current_thread()

        def submit(self, *_: Any) -> Future[Any]:
            return Future()

        def shutdown(self, **_: Any) -> None:
            pass

    config = DataConfig.model_validate({"train": {"path": "x"}, "image_size": [8, 8], "workers": 1})
    window = loader.Window(_Bare(config))
    monkeypatch.setattr(loader, "LOOK_S", 0.01)
    monkeypatch.setattr(window, "_start", Pool)
    with pytest.raises(TrainingError, match="data workers died 3 times"):
        list(window.run([[0]]))


@pytest.mark.slow
def test_closing_ends_workers_that_wait_for_a_dead_one(packed: dict[str, Path], configure: Configure) -> None:
    """Idle ones take turns at the queue: the one that reads it holds its lock, and takes it along."""
    config = configure(packed["detection"], workers=3)
    dataset = PackedDataset(packed["detection"], config, "detection", train=False)
    batches = eval_batches(dataset, range(22), 1)
    next(batches)
    deadline = time.monotonic() + 20
    reading: list[psutil.Process] = []
    while not reading:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        idle = [(worker, Path(f"/proc/{worker.pid}/wchan").read_text()) for worker in workers_of_this_process()]
        reading = [worker for worker, where in idle if "pipe" in where] if len(idle) == 3 else []
    reading[0].kill()
    closing = threading.Thread(target=batches.close, daemon=True)  # type: ignore[attr-defined]
    closing.start()
    closing.join(20)
    hangs = closing.is_alive()
    for worker in workers_of_this_process():
        worker.kill()
    assert not hangs
    assert gone()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Six images of 8x8, of which the fourth is broken."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
    facts = {"file_name": "x.png", "height": 8, "width": 8, "annotations": []}
    with DatasetWriter(tmp_path / "set", "detection", ["a"], category_ids=[1]) as writer:
        for number in range(6):
            writer.add({"png": b"broken" if number == 3 else stream.getvalue()}, facts | {"image_id": number})
    return tmp_path / "set"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_arrive_as_one_line(damaged: Path, configure: Configure, workers: int) -> None:
    config = configure(damaged, workers=workers)
    train = PackedDataset(damaged, config, "detection")
    with pytest.raises(DataError, match=r"000000003 \(x\.png\): broken image") as caught:
        list(train_batches(train, micros(train, 0, 1)))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    dataset = PackedDataset(damaged, config, "detection", train=False)
    errors: list[tuple[int, str]] = []
    batches = list(eval_batches(dataset, range(6), 4, lambda *error: errors.append(error)))
    assert [batch.weights.tolist() for batch in batches] == [[1, 1, 1, 0], [1, 1]]
    assert [truth.key for batch in batches for truth in batch.truths] == [f"{i:09d}" for i in range(6)]
    assert [sample for sample, _ in errors] == [3]
    with pytest.raises(DataError, match="broken image"):
        list(eval_batches(dataset, range(6), 4))
    assert gone()


ORPHAN = """
import sys
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import eval_batches
if __name__ == "__main__":
    tree = {"train": {"path": sys.argv[1]}, "image_size": [64, 64], "workers": 2}
    dataset = PackedDataset(sys.argv[1], DataConfig.model_validate(tree), "video", train=False)
    batches = eval_batches(dataset, list(range(20)), 1)
    next(batches)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_no_worker_outlives_its_killed_rank(packed: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(ORPHAN)
    command = [sys.executable, str(script), str(packed["video"])]
    rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    family = psutil.Process(rank.pid).children(recursive=True)
    assert len(family) >= 3
    rank.kill()
    rank.wait()
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_batches_are_pinned_only_with_cuda(packed: dict[str, Path], configure: Configure) -> None:
    dataset = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic")
    _, batch = next(iter(train_batches(dataset, micros(dataset, 0, 1))))
    assert batch.images.is_pinned() == torch.cuda.is_available()
