"""Files of a run with bytes that nobody wrote: a start goes on, and whoever looks at the run sees what is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.data_shards.batch import NOT_FINITE
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.run_state import run_end
from vitgraft.launch.status import read_status
from vitgraft.launch.status_view import lines
from vitgraft.trainer.checkpoint.commit import check_owner, owning_attempt, read_record
from vitgraft.trainer.checkpoint.retention import figures_of, result_path
from vitgraft.trainer.monitor import attempts_table
from vitgraft.trainer.monitor_files import attempts, audited_history, drop_torn_line, read_rows
from vitgraft.trainer.skips import SkipLog, read_skipped

HUGE = "9" * 4000
NO_NUMBERS = [
    b"",
    b"\xff",
    b"x\n",
    b"-1\n",
    b"\xc2\xb2\n",
    HUGE.encode(),
    b"9" * 5000,
    b"1e3",
    b"0" * (1 << 20),
    b"1 2",
]


@pytest.mark.parametrize("said", NO_NUMBERS, ids=lambda said: repr(said[:8]))
def test_an_attempt_that_is_no_number_is_not_nobodys(tmp_path: Path, said: bytes) -> None:
    """Whoever writes for the run cannot tell that it owns it, and commits nothing; the next start takes it."""
    run, recipe = make_run(tmp_path)
    first = open_run(run, recipe, "auto")
    first.event("start", resume=None, world=1)
    write(run, 3, attempt=first.attempt)
    (run / "attempt").write_bytes(said)
    with pytest.raises(CheckpointError, match="is no number of an attempt, so nobody may commit"):
        owning_attempt(run)
    with pytest.raises(CheckpointError, match="nobody may commit"):
        check_owner(run, 1)
    with pytest.raises(CheckpointError, match="nobody may commit"):
        write(run, 6, attempt=1)
    first.next_attempt()
    assert (first.attempt, owning_attempt(run)) == (2, 2)
    (run / "attempt").write_bytes(said)
    first.close()
    handle = open_run(run, recipe, "auto")
    handle.close()
    assert owning_attempt(run) == handle.attempt >= 2
    assert handle.resume is not None


ODD_ROWS: list[bytes] = [
    b"\xff\xfe\n",
    b'{"event": "start", "attempt": "x", "time": 1, "world": 1}\n',
    b'{"event": "start", "attempt": 1e400, "time": 1, "world": 1}\n',
    b'{"event": "start", "attempt": NaN, "time": 1, "world": 1}\n',
    b'{"event": "start", "attempt": %s, "time": 1, "world": 1}\n' % HUGE.encode(),
    b'{"event": "start", "attempt": 1%s, "time": 1, "world": 1}\n' % (b"0" * 17),
    b'{"event": "start", "attempt": 3, "time": 1e300, "world": 1}\n',
    b'{"event": "start", "attempt": 3, "time": %s, "world": 1}\n' % HUGE.encode(),
    b'{"event": "end", "attempt": 1, "code": 1e400, "time": 1}\n',
    b'{"event": "end", "attempt": 1, "code": 5, "time": Infinity, "reason": "x"}\n',
    b'{"event": ["\\u001b[31m"], "time": "x", "text": "\\ud800\\u001b]0;title\\u0007"}\n',
    b"[" * 100_000 + b"\n",
    b"[1]\n",
    b'{"event": "end"',
]


@pytest.mark.parametrize("row", ODD_ROWS, ids=lambda row: repr(row[:60]))
def test_a_row_that_is_none_is_passed_over(tmp_path: Path, row: bytes) -> None:
    run, recipe = make_run(tmp_path)
    first = open_run(run, recipe, "auto")
    first.event("start", resume=None, world=1)
    write(run, 3)
    events = run / "events.jsonl"
    events.write_bytes((row + events.read_bytes() if row.endswith(b"\n") else events.read_bytes()) + row)
    for name in ("metrics.jsonl", "skipped.jsonl"):
        (run / name).write_bytes(row)
    first.close()
    found = read_rows(events)
    assert [start.number for start in attempts(found) if start.number == 1] == [1]
    attempts_table(found)
    run_end(found)
    text = "\n".join(lines(read_status(run)))
    assert text.replace("\n", "").isprintable()
    json.dumps(read_status(run).as_json(), allow_nan=False).encode()
    handle = open_run(run, recipe, "auto")
    assert handle.attempt >= (4 if b'"attempt": 3' in row else 2)
    assert handle.attempt < 6
    handle.event("start", resume=3, world=1)
    handle.close()
    assert [start.number for start in attempts(read_rows(events)) if start.world][-1] == handle.attempt
    SkipLog(run, "stop", 3, 2)
    assert read_skipped(run) == []
    assert audited_history(run / "metrics.jsonl") == {}


ODD_VALUES = [HUGE, "1e400", "NaN", "-1", "true", '"x"', "[]", "{}", "null", "-1e18"]


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: value[:8])
def test_numbers_that_are_none_are_shown_as_unknown(tmp_path: Path, value: str) -> None:
    run, _ = make_run(tmp_path)
    keys = ("step", "steps", "samples", "epoch", "loss", "lr", "grad_norm", "mfu", "memory", "time", "seconds")
    keys += ("images_per_second", "data_wait_s", "own_s_median", "own_s_max", "slowest_rank", "attempt")
    plain = dict.fromkeys(keys, 1) | {"steps": 9, "time": 1.7e9}
    text = ""
    for key in keys:
        for number in range(3):
            row = json.dumps(plain | {"step": number, key: "@"}).replace('"@"', value)
            text += row + "\n"
    (run / "metrics.jsonl").write_text(text)
    (run / "attempt").write_text("1\n")
    (run / "results" / "step-00000003.json").write_text(f'{{"step": {value}, "metrics": {{"mIoU": {value}}}}}')
    for _ in range(2):
        status = read_status(run)
        assert list(lines(status))
        json.dumps(status.as_json(), allow_nan=False)
        (run / "results" / "step-00000004.json").write_text(f'{{"step": 4, "metrics": {value}}}')
    figures = figures_of(run, [3, 4])
    assert figures.get(3, {}) in ({}, {"mIoU": -1.0}, {"mIoU": 1.0})


def test_the_clock_may_be_put_back(tmp_path: Path) -> None:
    """Rows of before count for the pace; a start after an end that lies ahead is a start all the same."""
    run, recipe = make_run(tmp_path)
    rows = [{"step": step, "steps": 9, "attempt": 1, "time": when} for step, when in enumerate([100, 101, 40, 41], 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    handle = open_run(run, recipe, "auto")
    for event in ("start", "end"):
        row = {"event": event, "attempt": 1, "time": 9e9, "world": 1, "code": 5, "reason": "x"}
        with (run / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    handle.close()
    status = read_status(run)
    assert (status.state, status.pace.seconds_per_step) == ("failed", pytest.approx(2 / 3))
    again = open_run(run, recipe, "auto")
    assert read_status(run).state == "running"
    again.close()


def test_no_file_of_a_run_blocks_who_looks_at_it(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    for name in ("events.jsonl", "metrics.jsonl", "attempt", "lock", "skipped.jsonl", "results/step-00000003.json"):
        os.mkfifo(run / name)
    os.mkfifo(run / "checkpoints" / "latest")
    os.mkfifo(run / "rank-00000.written.json")
    with pytest.raises(ConfigError, match=r"events\.jsonl: cannot be read: not a regular file"):
        read_status(run)
    assert read_record(run, 0, attempt=1, step=1, world=1) is None
    assert figures_of(run, [3]) == {}


def test_a_long_torn_line_is_cut_off_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    drop_torn_line(path)
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * 200_000)
    drop_torn_line(path)
    assert path.read_bytes() == b""
    drop_torn_line(tmp_path / "none")


def test_skipped_rows_that_lack_something_do_not_count(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"sample": 1, "step": 1, "attempt": 1, "reason": "broken"},
        {"sample": 2, "step": 1, "attempt": 1},
        {"sample": 3, "step": 1, "attempt": 1, "reason": NOT_FINITE},
        {"sample": "4", "step": 1, "attempt": 1, "reason": "x"},
        {"step": 1, "attempt": 1, "reason": "x"},
        [],
    ]
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert SkipLog(tmp_path, "stop", 3, 2).samples == {1, 2}


def test_results_name_a_step_without_figures(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    for content in (b"\xff", b"[" * 100_000, b'{"metrics": [1]}', b"[]", b'{"metrics": {"a": "b", "c": true}}'):
        result_path(run, 3).write_bytes(content)
        assert figures_of(run, [3]).get(3, {}) in ({}, {"c": 1.0})
