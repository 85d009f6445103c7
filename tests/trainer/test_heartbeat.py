"""What a rank's signs of life say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from vitgraft.trainer import heartbeat
from vitgraft.trainer.heartbeat import ROWS, Heart
from vitgraft.trainer.report import Reporter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)


def test_phases_that_are_over_are_told_once_with_the_longest_time_of_each(pipe: tuple[int, int]) -> None:
    heart = Heart(Reporter(pipe[1]))
    assert heart.message()["phase"] == "start"
    heart.enter("first_step", 1)
    heart.enter("step", 2)
    heart.enter("step", 3)
    message: dict[str, Any] = heart.message()
    assert (message["phase"], message["step"]) == ("step", 3)
    assert set(message["longest"]) == {"start", "first_step", "step"}
    assert 0 <= message["longest"]["step"] <= message["longest"]["start"] + message["longest"]["step"]
    assert heart.message()["longest"] == {}


def test_more_rows_than_a_line_carries_are_not_sent(pipe: tuple[int, int]) -> None:
    heart = Heart(Reporter(pipe[1]))
    heart.message()
    for number in range(ROWS + 5):
        heart.own_seconds([float(number)])
    assert heart.message()["own"] == [[float(number)] for number in range(5, ROWS + 5)]


def test_it_beats_while_the_loop_is_busy(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    Heart(Reporter(pipe[1]))
    with os.fdopen(os.dup(pipe[0])) as lines:
        beats = [json.loads(lines.readline()) for _ in range(3)]
    assert [(beat["kind"], beat["phase"]) for beat in beats] == [("state", "start")] * 3
    assert beats[0]["age"] <= beats[2]["age"]
