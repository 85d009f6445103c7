"""Rows of metrics.jsonl: whole lines only, exact losses, and the attempt that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitgraft.trainer.monitor import Monitor, StepRow, attempts_table
from vitgraft.trainer.monitor_files import Attempt, attempts, audited_history, drop_torn_line, read_rows


def row_of(step: int, attempt: int, loss: float = 0.1) -> StepRow:
    return StepRow(
        step=step,
        steps=20,
        samples=4 * step,
        epoch=0,
        loss=loss,
        losses={"box": loss / 2, "mask": loss / 2},
        lr=1e-3,
        grad_norm=1.5,
        seconds=0.5,
        images_per_second=8.0,
        mfu=None if attempt == 1 else 0.25,
        own_s_median=0.25,
        own_s_max=0.5,
        slowest_rank=1,
        data_wait_s=0.1,
        checkpoint_stall_s=0.0,
        memory=1 << 20,
        loader_memory=1 << 19,
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


def board(run: Path) -> Any:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_the_curves_of_a_restarted_run(tmp_path: Path) -> None:
    events = [START | {"attempt": 1}, END | {"attempt": 1}, START | {"attempt": 2, "resume": 2}]
    for attempt, steps in ((1, (1, 2, 3)), (2, (3, 4))):
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events[: 2 * attempt - 1]))
        monitor = Monitor(tmp_path, steps[0] - 1)
        for step in steps:
            monitor.step(row_of(step, attempt, loss=step + attempt / 10))
        monitor.close()
    shown = board(tmp_path)
    curves = row_of(1, 2).curves()
    assert set(shown.Tags()["scalars"]) == set(curves)
    assert {"speed/mfu", "speed/step_s", "ranks/own_s_max", "ranks/slowest", "memory/peak_bytes"} <= set(curves)
    for tag in set(curves) - {"speed/mfu"}:
        assert [point.step for point in shown.Scalars(tag)] == [1, 2, 3, 4]
    # What the second attempt did again is drawn once, as it did it; there was no MFU in the first.
    assert [point.value for point in shown.Scalars("train/loss")] == pytest.approx([1.1, 2.1, 3.2, 4.2])
    assert [point.step for point in shown.Scalars("speed/mfu")] == [3, 4]
    texts = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("run/attempts/text_summary")]
    assert len(texts) == 2
    assert "exit 5: full disk" in texts[1]
    assert "exit 5: full disk" not in texts[0]


def test_every_rank_has_a_curve_of_its_own_time(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0)
    for step in (1, 2):
        monitor.step(row_of(step, 1), [0.25, 0.5 * step])
    monitor.close()
    shown = board(tmp_path)
    assert [tag for tag in shown.Tags()["scalars"] if "own_s/" in tag] == ["ranks/own_s/00", "ranks/own_s/01"]
    assert [(point.step, point.value) for point in shown.Scalars("ranks/own_s/01")] == [(1, 0.5), (2, 1.0)]
    assert shown.Tags()["histograms"] == []
    assert "own_s" not in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])


def test_many_ranks_share_a_histogram(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0)
    monitor.step(row_of(1, 1), [0.25] * 64 + [2.0])
    monitor.close()
    shown = board(tmp_path)
    assert [tag for tag in shown.Tags()["scalars"] if "own_s/" in tag] == []
    (point,) = shown.Histograms("ranks/own_s")
    found = point.histogram_value
    assert (point.step, found.num, found.min, found.max) == (1, 65, 0.25, 2.0)


START = {"time": 1.0, "event": "start", "resume": None, "world": 2}
END = {"time": 9.0, "event": "end", "code": 5, "reason": "full disk"}


def test_attempts_are_read_from_whatever_is_there() -> None:
    events = [
        START | {"attempt": 1},
        {"time": 2.0, "event": "checkpointer_restart", "attempt": 1},
        END | {"attempt": 1},
        END | {"attempt": 7},
        {"event": "start"},
        START | {"attempt": "x"},
        START | {"attempt": 2, "resume": 40, "world": 3},
    ]
    found = attempts(events)
    assert found == [Attempt(1, 1.0, 0, 2, 5, "full disk", 9.0), Attempt(2, 1.0, 40, 3)]
    table = attempts_table(events)
    assert table.count("\n") == 3
    assert "| 1 |" in table
    assert "| 40 | 3 |  |" in table
    assert attempts([]) == []


def test_a_file_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(100)) + '{"n": 100')
    assert [row["n"] for row in read_rows(path)] == list(range(100))
    assert [row["n"] for row in read_rows(path, 1 << 20)] == list(range(100))
    for size in range(9, 60):
        last = [row["n"] for row in read_rows(path, size)]
        assert last == list(range(100 - len(last), 100))
        assert len(last) == (size - 10) // 10 if size >= 10 else last == []
