"""The rank that all wait for is the one whose own time stands out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from own_time_ranks import AFTER_S, BEFORE_S, STEPS, rank_main

from vitgraft.trainer.own_time import DeviceClock, HostClock, clock_for, spread


def test_waiting_for_a_slow_rank_is_not_own_time(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path), 2), nprocs=2)
    fast, slow = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # The first meeting has no earlier step's rest before it.
    assert BEFORE_S <= slow[0] < BEFORE_S + AFTER_S
    for quick, late in list(zip(fast, slow, strict=True))[1:]:
        assert late >= BEFORE_S + AFTER_S
        assert quick < late / 2
    assert len(slow) == STEPS


def test_the_clock_stands_still_between_stop_and_start() -> None:
    clock = HostClock()
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
    clock.start()
    time.sleep(0.02)
    clock.stop()
    time.sleep(0.2)
    clock.start()
    clock.start()  # another micro-step: the clock runs on
    assert 0.02 <= clock.meet() < 0.15
    assert clock.meet() < 0.02


def test_the_device_clock_tells_spans_once_they_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now, reached = 0.0, 0.0

    class Event:
        """A device that has got as far as ``reached``."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def query(self) -> bool:
            return self.at <= reached

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = DeviceClock()
    assert isinstance(clock_for(torch.device("cuda")), DeviceClock)
    told = []
    # Data and forward pass take 2 s, what follows 5 s; the device is one micro-step behind.
    for step in range(4):
        clock.start()
        now += 2.0 + step
        clock.start()  # its data is there: the clock runs on
        told.append(clock.meet())
        reached = now
        now += 5.0
        clock.stop()
    assert told == [0.0, 2.0, 3.0, 4.0]
    reached = -1.0
    clock.start()
    now += 1.0
    assert clock.meet() == 0.0
    reached = now
    assert clock.meet() == 5.0 + 1.0
    assert clock.meet() == 0.0


def test_spread() -> None:
    assert spread([1.0, 5.0]) == (1.0, 5.0, 1)
    assert spread([2.0, 1.0, 9.0, 3.0]) == (2.0, 9.0, 2)
    assert spread([4.0]) == (4.0, 4.0, 0)
