"""Rows of metrics.jsonl: whole lines only, exact losses, and the attempt that counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitgraft.trainer.monitor import Monitor, StepRow
from vitgraft.trainer.monitor_files import audited_history, drop_torn_line


def row_of(step: int, attempt: int, loss: float = 0.1) -> StepRow:
    return StepRow(
        step=step,
        samples=4 * step,
        epoch=0,
        loss=loss,
        losses={"box": loss / 2, "mask": loss / 2},
        lr=1e-3,
        grad_norm=1.5,
        images_per_second=8.0,
        data_wait_s=0.1,
        checkpoint_stall_s=0.0,
        memory=1 << 20,
        attempt=attempt,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"step": 1}\n', b'{"step": 1}\n'),
        (b'{"step": 1}\n{"st', b'{"step": 1}\n'),
        (b'{"step": 1}\n{"step": 2}', b'{"step": 1}\n'),
        (b'{"st', b""),
        (b'{"a": "\xc3', b""),
    ],
)
def test_a_torn_last_line_is_dropped_and_nothing_else(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    drop_torn_line(path)
    assert path.read_bytes() == after


def test_no_file_is_no_torn_line(tmp_path: Path) -> None:
    drop_torn_line(tmp_path / "metrics.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_last_attempts_row_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    pairs = [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (4, 2), (3, 3)]
    path.write_text("".join(json.dumps({"step": step, "attempt": attempt}) + "\n" for step, attempt in pairs))
    history = audited_history(path)
    assert {step: row["attempt"] for step, row in history.items()} == {1: 1, 2: 1, 3: 3, 4: 2}
    # The attempt decides, not the place in the file.
    path.write_text("".join(json.dumps({"step": step, "attempt": attempt}) + "\n" for step, attempt in pairs[::-1]))
    assert audited_history(path) == history


def test_a_row_holds_the_exact_bits_of_its_loss() -> None:
    loss = 0.1 + 0.2
    row = json.loads(json.dumps(row_of(7, 2, loss).as_json()))
    assert float.fromhex(row["loss_hex"]) == loss
    assert (row["step"], row["samples"], row["attempt"], row["losses"]) == (
        7,
        28,
        2,
        {"box": loss / 2, "mask": loss / 2},
    )


def test_a_second_attempt_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    for attempt, steps in ((1, (1, 2, 3)), (2, (3, 4))):
        monitor = Monitor(tmp_path, steps[0] - 1)
        for step in steps:
            monitor.step(row_of(step, attempt, loss=step + attempt / 10))
        monitor.close()
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 9')
    drop_torn_line(tmp_path / "metrics.jsonl")
    history = audited_history(tmp_path / "metrics.jsonl")
    assert {step: row["loss"] for step, row in history.items()} == {1: 1.1, 2: 2.1, 3: 3.2, 4: 4.2}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
