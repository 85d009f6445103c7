"""What comes over a connection is bounded, and nonsense in it is passed over."""

from __future__ import annotations

import os
import time

import pytest

from vitgraft.launch import wire as module
from vitgraft.launch.messages import of_agents, of_roles
from vitgraft.launch.wire import Wire


@pytest.mark.parametrize(
    "nonsense",
    [
        b"[" * 100_000,
        b'{"a": ' * 50_000,
        b"\xff\xfe\x00",
        b"9" * 5000,
        b'{"say": ' + b"9" * 5000 + b"}",
        b"Last login: Mon",
        b"[1, 2]",
        b"",
    ],
    ids=range(8),
)
def test_a_line_that_is_no_message_is_passed_over(nonsense: bytes) -> None:
    read, write = os.pipe()
    wire = Wire(read, write)
    messages, sent = [], nonsense + b'\n{"say": "begun"}\n'
    while sent:
        sent = sent[os.write(write, sent[:60_000]) :]
        messages += wire.receive()
    assert messages == [{"say": "begun"}]
    wire.close()


def test_a_line_without_an_end_closes_the_connection() -> None:
    read, write = os.pipe()
    wire = Wire(read, write)
    for _ in range(module.MAX_MESSAGE // 60_000 + 2):
        if not wire.closed:
            os.write(write, b" " * 60_000)
        assert wire.receive() == []
    assert wire.closed
    assert len(wire._came) == 0
    wire.close()


def test_one_that_speaks_without_a_pause_keeps_nobody_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    message = b'{"say": "begun"}\n'
    monkeypatch.setattr(os, "read", lambda *_: message * 3000)
    read, write = os.pipe()
    wire = Wire(read, write)
    begun = time.monotonic()
    assert 0 < len(wire.receive()) <= 2 * module._AT_ONCE // len(message)
    assert time.monotonic() - begun < 20
    wire.close()


def test_file_names_that_are_no_text_get_through() -> None:
    read, write = os.pipe()
    wire = Wire(read, write)
    wire.send({"say": "refused", "text": "a\udcff"})
    assert wire.receive() == [{"say": "refused", "text": "a\udcff"}]
    wire.close()


@pytest.mark.parametrize(
    "message",
    [
        {"say": "alive", "ranks": {"0": {"phase": "step"}}, "memory_kills": 0, "free": None},
        {"say": "alive", "ranks": {"x": {}}, "memory_kills": 0, "free": None},
        {"say": "end", "rank": "0", "code": 0, "by_us": False},
        {"say": "event", "name": "straggler", "facts": {"host": "another"}},
        {"say": "relay", "rank": 0, "message": {"kind": "error", "code": 5}},
        {"say": "asked", "signal": 1 << 70},
        {"say": ["alive"]},
        {"ask": "begun"},
        {},
    ],
)
def test_what_no_agent_says_is_passed_over(message: dict[str, object]) -> None:
    assert of_agents([message, {"say": "begun"}]) == [{"say": "begun"}]


def test_what_no_rank_says_is_passed_over() -> None:
    note = {"kind": "note", "text": "a"}
    nan = {"kind": "state", "phase": "step", "step": 1, "age": float("nan"), "longest": {}, "own": []}
    assert of_roles([{"kind": "progress", "label": "a"}, nan, note, {"kind": "no"}]) == [note]
    losing = {"kind": "progress", "label": "a", "done": 1, "total": 2, "facts": {"loss": float("nan"), "speed": "1/s"}}
    assert of_roles([losing]) == [losing]
