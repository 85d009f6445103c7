"""Work in several processes gives what it gives in one, and ends with the one that asked for it."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import packing_items
import pytest

from vitgraft.configs.errors import DataError
from vitgraft.data_shards import parallel
from vitgraft.data_shards.pack.label_report import SIZES, LabelFault
from vitgraft.data_shards.parallel import outcomes
from vitgraft.data_shards.report import verify


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes for the smallest work."""
    monkeypatch.setattr(parallel, "PATIENCE_S", 0.0)


def workers() -> list[Any]:
    return [process for process in multiprocessing.active_children() if "ForkServer" in type(process).__name__]


@pytest.mark.parametrize(("jobs", "chunk"), [(1, 1), (3, 1), (3, 4), (2, 100)])
def test_outcomes_come_in_order_and_faults_at_their_place(jobs: int, chunk: int) -> None:
    found = list(outcomes(packing_items.square, range(20), jobs, chunk))
    assert [outcome.value for outcome in found] == [None if n in (13, 17) else n * n for n in range(20)]
    with pytest.raises(LabelFault, match="13 is no number") as fault:
        found[13].get()
    assert fault.value.kind == SIZES
    with pytest.raises(ValueError, match="a mistake") as mistake:
        found[17].get()
    assert "packing_items.py" in mistake.value.__notes__[0]
    assert not workers()


def test_several_processes_work_and_end_with_the_generator() -> None:
    with contextlib.closing(outcomes(packing_items.sleep, [0.1] * 4 + [600.0] * 4, 3)) as found:
        assert len({next(found).get() for _ in range(4)}) > 1
        assert len(workers()) == 3
        started = time.monotonic()
    assert not workers()
    assert time.monotonic() - started < 30


def test_short_work_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE_S", 60.0)
    pids = {outcome.get() for outcome in outcomes(packing_items.own_pid, range(5), 4)}
    assert pids == {multiprocessing.current_process().pid}


@pytest.mark.parametrize("items", [[5], list(range(12))])
def test_a_killed_process_is_one_line(items: Sequence[int]) -> None:
    with pytest.raises(DataError, match=r"a worker process died \(exit code -9\), .* with fewer --jobs$"):
        list(outcomes(packing_items.kill_if, items, 2))
    assert not workers()


def test_nothing_is_nothing() -> None:
    assert list(outcomes(packing_items.square, [], 4)) == []


def test_verify_finds_the_same_damage_in_any_number_of_processes(packed: dict[str, Path], tmp_path: Path) -> None:
    """Bytes of a JPEG and of a label map are changed, so that only decoding tells which samples are bad."""
    for kind in ("semantic", "detection", "video"):
        folder = tmp_path / kind
        shutil.copytree(packed[kind], folder)
        for number in (0, 2):
            tar = folder / f"shard-{number:06d}.tar"
            data = bytearray(tar.read_bytes())
            middle = 512 + 700
            data[middle : middle + 200] = bytes(200)
            tar.write_bytes(data)
        one, three = verify(folder, jobs=1), verify(folder, jobs=3)
        assert (one.bad_files, one.bad_samples) == (three.bad_files, three.bad_samples)
        assert len(one.bad_files) == 2
        assert set(one.bad_samples) <= {"000000000", "000000020"}
    assert verify(packed["video"], jobs=3).ok
