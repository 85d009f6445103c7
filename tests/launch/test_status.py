"""``vitgraft status`` over run directories made by hand: every state, and files that were cut or never written."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import executable, vitgraft, wait_until

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.units import duration
from vitgraft.launch.run_state import run_end
from vitgraft.launch.status import Pace, Status, eta, pace_of, read_status
from vitgraft.launch.status_view import event_text, lines
from vitgraft.trainer.monitor_files import read_rows

HOST = os.uname().nodename
NOW = 2_000_000.0


def write_rows(path: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def start(attempt: int, when: float, resume: int | None = None) -> dict[str, Any]:
    return {"time": when, "event": "start", "attempt": attempt, "resume": resume, "world": 4, "device": "cpu"}


def end(attempt: int, when: float, code: int, reason: str = "why", kind: str | None = "crash") -> dict[str, Any]:
    """``kind``: that of an attempt's failure; ``None``: it is the run's end."""
    facts = {"time": when, "event": "end", "attempt": attempt, "code": code, "reason": reason}
    return facts if kind is None else facts | {"kind": kind}


def row(step: int, attempt: int = 1, **facts: Any) -> dict[str, Any]:
    """A row of 2 s, written every 5 s."""
    return {
        "step": step,
        "steps": 100,
        "samples": 8 * step,
        "epoch": step // 10,
        "loss": 1 / step,
        "lr": 0.1,
        "grad_norm": 2.0,
        "seconds": 2.0,
        "images_per_second": 4.0,
        "mfu": 0.25,
        "own_s_median": 1.0,
        "own_s_max": 1.5,
        "slowest_rank": 3,
        "data_wait_s": 0.5,
        "checkpoint_stall_s": 0.0,
        "memory": 1 << 30,
        "attempt": attempt,
        "time": NOW - 500 + 5.0 * step,
    } | facts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps that was killed in its 40th, and nobody noticed."""
    path = tmp_path / "first"
    for folder in ("logs", "results", "checkpoints/step-00000030", "checkpoints/step-00000035.tmp"):
        (path / folder).mkdir(parents=True)
    (path / "config.yaml").write_text("name: digits\ntrain:\n  epochs: 10\n  steps: null\n")
    (path / "lock").write_text(f"pid 999999999 on {HOST}\n")
    (path / "attempt").write_text("1\n")
    write_rows(path / "events.jsonl", [start(1, NOW - 600)])
    write_rows(path / "metrics.jsonl", [row(step) for step in range(1, 41)])
    manifest = {"step": 30, "created": NOW - 90}
    (path / "checkpoints/step-00000030/manifest.json").write_text(json.dumps(manifest))
    (path / "results/step-00000020.json").write_text(json.dumps({"step": 20, "metrics": {"mIoU": 0.5, "x": None}}))
    (path / "results/step-00000030.json").write_text('{"step": 30, "met')
    for name in ("trainer-0.a.1", "trainer-1.a.1", "trainer-2.b.lan.1", "checkpointer.a.1", "trainer-0.a.7", "notes"):
        (path / f"logs/{name}.log").touch()
    (path / "logs/agent.10.0.0.1.log").touch()
    return path


def owned(run: Path) -> Any:
    """As the launcher holds the lock file open, with its number in it."""
    stream = (run / "lock").open("a+")
    stream.truncate(0)
    stream.write(f"pid {os.getpid()} on {HOST}\n")
    stream.flush()
    return stream


def test_the_facts_of_a_run(run: Path) -> None:
    status = read_status(run, NOW)
    assert (status.name, status.attempt, status.restarts, status.world, status.device) == ("digits", 1, 0, 4, "cpu")
    assert (status.step, status.steps, status.epoch, status.epochs, status.samples) == (40, 100, 4, 10, 320)
    assert (status.loss, status.lr, status.grad_norm, status.mfu, status.memory) == (0.025, 0.1, 2.0, 0.25, 1 << 30)
    assert (status.row_age_s, status.checkpoint_step, status.checkpoint_age_s) == (300.0, 30, 90.0)
    assert (status.evaluation_step, status.evaluation) == (20, {"mIoU": 0.5})
    assert status.pace == Pace(5.0, 4.0, 0.25, 0.0, 1.0, 1.5, 3, 1.0)
    assert [(r.role, r.host, r.processes) for r in status.roles] == [
        ("checkpointer", "a", 1),
        ("trainer", "a", 2),
        ("trainer", "b.lan", 1),
    ]
    text = "\n".join(lines(status))
    for said in ("dead", "40 of 100", "40.0 %", "epoch 5 of 10", "data wait 25.0 %", "slowest × 1.50", "rank 3"):
        assert said in text
    assert "ETA" not in text


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (75, "stopped"), (130, "stopped"), (5, "failed"), (1, "failed")]
)
def test_a_run_that_ended(run: Path, code: int, state: str) -> None:
    write_rows(run / "events.jsonl", [start(1, NOW - 600), end(1, NOW - 10, code, "step 7: not finite")])
    os.utime(run / "lock", (NOW - 600, NOW - 600))
    status = read_status(run, NOW)
    assert (status.state, status.exit_code, status.reason, status.eta_s) == (state, code, "step 7: not finite", None)
    # A process that made several runs one after another lives on when this one has ended.
    with owned(run), (run / "events.jsonl").open("a") as stream:
        os.utime(run / "lock", (NOW - 600, NOW - 600))
        if state == "failed":
            stream.write(json.dumps({"time": NOW - 9, "event": "give_up", "attempt": 1, "code": code}) + "\n")
            stream.flush()
        assert (read_status(run, NOW).state, read_status(run, NOW).exit_code) == (state, code)


def event(name: str) -> dict[str, Any]:
    return {"time": NOW - 9, "event": name, "attempt": 1}


@pytest.mark.parametrize(
    ("after", "held", "elsewhere", "left"),
    [
        # It connects again or examines hosts; it pauses; it was asked to stop and will say so.
        ([], "running", "failed", "failed"),
        (["host_back", "host_unfit"], "running", "failed", "failed"),
        (["host_back", "restart"], "running", "running", "failed"),
        (["restart", "stop_asked"], "running", "running", "failed"),
    ],
)
def test_between_two_attempts(run: Path, after: list[str], held: str, elsewhere: str, left: str) -> None:
    # What came before the end says nothing about it.
    rows = [start(1, NOW - 600), event("stop_asked"), end(1, NOW - 10, 5), *map(event, after)]
    write_rows(run / "events.jsonl", rows)
    assert read_status(run, NOW).state == left
    with owned(run):
        os.utime(run / "lock", (NOW - 600, NOW - 600))
        status = read_status(run, NOW)
        assert (status.state, status.exit_code) == (held, 5 if held == "failed" else None)
        assert status.reason == ("why" if held == "failed" else "starting again")
    (run / "lock").write_text("pid 1 on some-other-host\n")
    os.utime(run / "lock", (NOW - 600, NOW - 600))
    status = read_status(run, NOW)
    assert status.state == elsewhere
    assert ("starting again, as far as" in (status.reason or "")) == (elsewhere == "running")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Asked to stop while it backed off: what ends the command is not what ended the attempt.
        ([end(1, 2.0, 5), event("restart"), event("stop_asked"), end(1, 3.0, 75, "x", None)], ("stopped", "x", 75)),
        # Nothing left to start from.
        ([end(1, 2.0, 5), event("restart"), end(2, 3.0, 4, "no checkpoint", None)], ("failed", "no checkpoint", 4)),
        ([end(1, 2.0, 5), {**event("give_up"), "code": 6, "text": "spent"}], ("failed", "spent", 6)),
        ([end(1, 2.0, 5), {**event("give_up"), "code": 5}], ("failed", "why", 5)),
    ],
)
def test_the_last_word_counts(run: Path, rows: list[dict[str, Any]], expected: tuple[str, str, int]) -> None:
    write_rows(run / "events.jsonl", [start(1, 1.0), *rows])
    os.utime(run / "lock", (1.0, 1.0))
    with owned(run):
        os.utime(run / "lock", (1.0, 1.0))
        held = read_status(run, NOW)
    left = read_status(run, NOW)
    for status in (held, left):
        assert (status.state, status.reason, status.exit_code) == expected


def test_a_command_that_ended_before_its_first_attempt(run: Path) -> None:
    write_rows(run / "events.jsonl", [event("stop_asked"), end(1, NOW - 5, 2, "b: another torch", None)])
    assert (read_status(run, NOW).state, read_status(run, NOW).exit_code) == ("failed", 2)


def test_what_a_supervisor_says_whose_run_another_has_taken_does_not_count(run: Path) -> None:
    """Where locks do not reach across hosts it notices late; the run goes on."""
    late = [{**event("give_up"), "code": 5, "text": "spent"}, end(1, NOW - 4, 2, "another supervisor owns it", None)]
    write_rows(run / "events.jsonl", [start(1, NOW - 600), start(2, NOW - 60), *late])
    assert run_end(read_rows(run / "events.jsonl")) is None
    with owned(run):
        assert read_status(run, NOW).state == "running"
    write_rows(run / "events.jsonl", [start(1, NOW - 600), start(2, NOW - 60), end(2, NOW - 9, 0), *late])
    assert read_status(run, NOW).state == "finished"


def test_a_run_is_running_while_its_owner_has_the_lock_open(run: Path) -> None:
    stream = owned(run)
    status = read_status(run, NOW)
    assert (status.state, status.reason, status.exit_code) == ("running", None, None)
    assert status.eta_s == 60 * 5.0 - 5.0
    assert f"pid {os.getpid()} on {HOST}" in "\n".join(lines(status))
    stream.close()
    # The number alone may be another process's by now.
    assert (run / "lock").read_text() == f"pid {os.getpid()} on {HOST}\n"
    assert read_status(run, NOW).state == "dead"


def test_looking_never_takes_the_lock(run: Path) -> None:
    import fcntl

    before = (run / "lock").stat()
    with (run / "lock").open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        read_status(run, NOW)
    after = (run / "lock").stat()
    assert (before.st_mtime_ns, before.st_ino, before.st_size) == (after.st_mtime_ns, after.st_ino, after.st_size)
    code = (
        "import sys; from pathlib import Path; from vitgraft.launch.status import read_status;"
        "sys.addaudithook(lambda name, _: sys.exit('locked') if name.startswith('fcntl.') else None);"
        f"read_status(Path({str(run)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_of_another_host_is_told_by_its_files(run: Path) -> None:
    (run / "lock").write_text("pid 1 on some-other-host\n")
    status = read_status(run, NOW)
    assert status.state == "running"
    assert status.reason is not None
    assert "another host" in status.reason
    write_rows(run / "events.jsonl", [start(1, NOW - 600), end(1, NOW - 10, 5)])
    assert read_status(run, NOW).state == "failed"


def test_a_restart_counts_from_its_checkpoint_until_it_has_rows(run: Path) -> None:
    write_rows(run / "events.jsonl", [start(1, NOW - 600), end(1, NOW - 99, 5), start(2, NOW - 50, resume=30)])
    with owned(run):
        status = read_status(run, NOW)
    # The figures are those of the step from which it goes on.
    assert (status.state, status.attempt, status.restarts, status.step, status.loss) == ("running", 2, 1, 30, 1 / 30)
    assert (status.eta_s, status.pace) == (None, pace_of([]))
    write_rows(run / "metrics.jsonl", [row(40), row(31, 2), row(32, 2)], torn='{"step": 33, "att')
    with owned(run):
        status = read_status(run, NOW)
    assert (status.step, status.pace.seconds_per_step) == (32, 5.0)
    assert "1 restarts" in "\n".join(lines(status))


def test_stages_that_were_added_count_before_their_first_row(run: Path) -> None:
    assert read_status(run, NOW).steps == 100
    (run / "config.yaml").write_text("name: digits\ntrain:\n  steps: 100\n  extend:\n  - steps: 50\n")
    assert read_status(run, NOW).steps == 150


def test_a_start_that_has_not_been_recorded_yet(run: Path) -> None:
    write_rows(run / "events.jsonl", [start(1, NOW - 600), end(1, NOW - 10, 5)])
    (run / "attempt").write_text("2\n")
    with owned(run):
        status = read_status(run, NOW)
    assert (status.state, status.reason, status.attempt, status.step) == ("running", "starting", 2, 0)


def test_torn_and_foreign_lines_are_passed_over(run: Path) -> None:
    rows = [json.dumps(row(1)), '{"step": 2, "at', "[1]", "null", "", json.dumps(row(3)), '{"step": 4']
    (run / "metrics.jsonl").write_text("\n".join(rows))
    events = [json.dumps(start(1, NOW - 9)), '{"event": "end", "attempt": 1}', '{"event": 3}', '{"time": "x"}', "{"]
    (run / "events.jsonl").write_text("\n".join(events))
    (run / "config.yaml").write_text("train: [")
    (run / "attempt").write_text("two")
    status = read_status(run, NOW)
    assert (status.step, status.attempt, status.name, status.state) == (3, 1, None, "dead")
    assert list(lines(status))
    json.loads(json.dumps(status.as_json(), allow_nan=False))


def test_only_the_end_of_a_long_file_is_read(run: Path) -> None:
    write_rows(run / "metrics.jsonl", [row(step) for step in range(1, 3000)])
    assert (run / "metrics.jsonl").stat().st_size > 1 << 19
    status = read_status(run, NOW)
    assert status.step == 2999
    assert status.pace.slowest_share == 1.0


def test_what_is_not_finite_is_null_in_json(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps(row(1, loss=float("nan"))) + "\n")
    plain = read_status(run, NOW).as_json()
    assert plain["loss"] is None
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize("name", ["config.yaml", "events.jsonl", "lock"])
def test_a_run_that_has_hardly_begun(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    status = read_status(tmp_path, NOW)
    assert (status.state, status.attempt, status.step, status.steps, status.roles) == ("dead", 0, 0, None, [])
    assert list(lines(status))


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        read_status(tmp_path)
    with pytest.raises(ConfigError, match="no run directory"):
        read_status(tmp_path / "missing")


def test_pace_and_eta() -> None:
    assert pace_of([]) == Pace(None, None, None, None, None, None, None, None)
    pace = pace_of([row(1, time=10.0), row(2, time=12.0, slowest_rank=1), row(5, time=30.0)])
    assert pace.seconds_per_step == 5.0
    assert (pace.slowest_rank, pace.slowest_share) == (3, pytest.approx(2 / 3))
    assert eta(5, 100, pace, 2.0) == 95 * 5.0 - 2.0
    assert eta(5, 100, pace, 1e6) == 94 * 5.0
    assert eta(100, 100, pace, 0.0) == 0.0
    assert eta(5, None, pace, 0.0) is None
    assert eta(5, 100, pace_of([row(5)]), 0.0) is None


def test_words() -> None:
    said = [duration(seconds) for seconds in (0.4, 59.9, 60, 3599, 3600 + 300, 86400 * 2 + 3600 * 5)]
    assert said == ["0 s", "59 s", "1 min", "59 min", "1 h 05 min", "2 d 5 h"]
    assert event_text(end(1, NOW, 5, "full disk")).endswith("end  code 5  reason full disk")
    assert event_text({}) == "?  ?"


def test_the_command(run: Path, tmp_path: Path) -> None:
    done = vitgraft("status", run, "--json")
    assert (done.returncode, json.loads(done.stdout)["step"]) == (0, 40), done.stderr
    done = vitgraft("status", run)
    assert "40 of 100" in done.stdout
    for wrong in (("status", run, "--watch"), ("status", run, "--watch", "--json"), ("status", tmp_path / "none")):
        done = vitgraft(*wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_it_loads_nothing_heavy(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vitgraft.launch import status, status_view;"
        f"list(status_view.lines(status.read_status(Path({str(run)!r}))));"
        "heavy = {'torch', 'deepspeed', 'numpy', 'pydantic', 'rich'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_watching_follows_the_run_until_ctrl_c(run: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [executable(), "status", str(run), "--watch"],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"},
        text=True,
    )
    os.close(follower)
    os.set_blocking(leader, False)
    shown = b""

    def shows(text: bytes) -> bool:
        nonlocal shown
        try:
            shown += os.read(leader, 1 << 16)
        except OSError:  # nothing yet, or the other side is gone
            time.sleep(0.05)
        return text in shown

    try:
        wait_until(lambda: shows(b"40 of 100"), 30)
        write_rows(run / "metrics.jsonl", [row(step) for step in range(1, 51)])
        wait_until(lambda: shows(b"50 of 100"), 30)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: shows(b"\0") or process.poll() is not None, 30)
        assert process.wait() == 0, process.communicate()[1]
    finally:
        process.kill()
        os.close(leader)


def test_a_status_is_plain_data(run: Path) -> None:
    tree = read_status(run, NOW).as_json()
    assert set(tree) == set(Status.__dataclass_fields__)
