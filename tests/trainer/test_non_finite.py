"""The record of losses that were not finite, and what is left out because of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema.data import SkipConfig
from vitgraft.data_shards.batch import NOT_FINITE, Entry, Skipped
from vitgraft.launch.replay import leave_out, read_non_finite
from vitgraft.trainer.non_finite import read_left_out, record_non_finite
from vitgraft.trainer.skips import SkipLog, read_skipped

A, B = Entry(0, 11, 7, 0), Entry(2, 5, 9, 1)


def record(run: Path, attempt: int, step: int, *entries: Entry) -> None:
    found = [(entry, f"{entry.sample:09d}") for entry in entries]
    record_non_finite(run, attempt=attempt, step=step, losses=["mask"], entries=found)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_the_ranks_write_the_supervisor_reads(tmp_path: Path) -> None:
    assert read_non_finite(tmp_path, 1) is None
    record(tmp_path, 1, 3, A)
    record(tmp_path, 2, 3, A, B)
    assert rows(tmp_path / "non_finite.jsonl")[1] == {
        "attempt": 2,
        "step": 3,
        "losses": ["mask"],
        "entries": [[0, 11, 7, 0, "000000007"], [2, 5, 9, 1, "000000009"]],
    }
    assert read_non_finite(tmp_path, 1) == (3, frozenset({"0:11"}))
    assert read_non_finite(tmp_path, 2) == (3, frozenset({"0:11", "2:5"}))
    assert read_non_finite(tmp_path, 3) is None


def test_torn_and_foreign_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "non_finite.jsonl"
    record(tmp_path, 1, 3, A)
    foreign = [[], {"attempt": 1}, {"attempt": 1, "step": None, "entries": []}, {"attempt": 1, "step": 4, "entries": 5}]
    with path.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in foreign)
        stream.write('{"attempt": 1, "step": 4, "ent')
    assert read_non_finite(tmp_path, 1) == (3, frozenset({"0:11"}))
    # What a kill left half-written does not spoil the next row.
    record(tmp_path, 2, 5, B)
    assert read_non_finite(tmp_path, 2) == (5, frozenset({"2:5"}))


def test_what_the_supervisor_leaves_out_the_ranks_read(tmp_path: Path) -> None:
    assert read_left_out(tmp_path) == frozenset()
    leave_out(tmp_path, {"2:5", "0:11"}, step=3, attempt=2)
    assert read_left_out(tmp_path) == {(0, 11), (2, 5)}
    # Again, with one more: only that is new. Nothing new: no row.
    leave_out(tmp_path, {"2:5", "3:0"}, step=9, attempt=4)
    leave_out(tmp_path, {"2:5"}, step=9, attempt=5)
    assert rows(tmp_path / "left_out.jsonl") == [
        {"attempt": 2, "step": 3, "entries": [[0, 11], [2, 5]]},
        {"attempt": 4, "step": 9, "entries": [[3, 0]]},
    ]
    with (tmp_path / "left_out.jsonl").open("a") as stream:
        stream.write('{"attempt": 6, "entries": [[7')
    assert read_left_out(tmp_path) == {(0, 11), (2, 5), (3, 0)}


@pytest.mark.parametrize("entries", [None, 3, [3], [["0", 1]], [[0, -1]], [[0, 1, 2]], [[True, 1]]])
def test_a_row_that_names_no_entries_is_refused(tmp_path: Path, entries: object) -> None:
    """Passed over, it would train on what somebody meant to leave out."""
    (tmp_path / "left_out.jsonl").write_text(json.dumps({"entries": entries}) + "\n")
    with pytest.raises(DataError, match=r"left_out\.jsonl: .*expected entries as a list of \[epoch, position\]"):
        read_left_out(tmp_path)


def test_a_supervisor_reads_them_without_torch() -> None:
    script = "import sys, vitgraft.launch.replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_what_was_left_out_for_its_loss_is_recorded_but_costs_no_budget(tmp_path: Path) -> None:
    sound, damaged = Skipped(A, "000000007", NOT_FINITE), Skipped(B, "000000009", "x.tar: broken image")
    log = SkipLog(tmp_path, SkipConfig(skip=1), 0, attempt=1)
    log.record(3, [sound])
    log.record(4, [sound, damaged])
    assert [(row["sample"], row["reason"]) for row in read_skipped(tmp_path)] == [
        (7, NOT_FINITE),
        (7, NOT_FINITE),
        (9, "x.tar: broken image"),
    ]
    assert SkipLog(tmp_path, SkipConfig(skip=1), 4, attempt=2).samples == {9}
    # Under ``stop`` there is no budget at all, and what an earlier policy skipped is no reason to end now.
    SkipLog(tmp_path, "stop", 4, attempt=3).record(5, [sound])
