"""What is shown may be lost, when nobody reads it or the disk is full; neither a run nor an exit code is."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support_writers import make_run

from vitgraft.configs.errors import ConfigError
from vitgraft.launch import training
from vitgraft.launch.ui import Screen

SHOWING = """
import time
from vitgraft.launch.ui import Screen, PLAIN_INTERVAL_S

with Screen() as screen:
    for done in range(3):
        screen.note("a note " + "x" * 100000)
        screen.progress("train", done, 3)
        screen.progress("train", 3, 3)
        time.sleep(0.05)
open("done", "w").close()
"""
COMMAND = """
import sys
from vitgraft.configs.errors import DataError
from vitgraft.launch import entry, status, training

def fail(*_, **__):
    {body}

training.train = status.read_status = fail
sys.argv = ["vitgraft", *sys.argv[1:]]
entry.main()
"""
TRAIN = ("train", "quickstart/detection", "--run-dir", "none")
STATUS = ("status", "none", "--json")


def unread() -> int:
    """A pipe whose reader is gone."""
    read, write = os.pipe()
    os.close(read)
    return write


def python(code: str, *arguments: str, cwd: Path, out: int, err: int) -> int:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, stdout=out, stderr=err, timeout=60, check=False
    ).returncode


@pytest.mark.parametrize("kind", ["pipe", "full disk", "terminal", "closed"])
def test_a_screen_outlives_who_looks_at_it(tmp_path: Path, kind: str) -> None:
    if kind == "pipe":
        err = unread()
    elif kind == "terminal":
        leader, err = pty.openpty()
        os.close(leader)
    else:
        err = os.open("/dev/full", os.O_WRONLY)
    code = SHOWING if kind != "closed" else "import sys; sys.stderr = None\n" + SHOWING
    out = os.open(os.devnull, os.O_WRONLY)
    try:
        python(code, cwd=tmp_path, out=out, err=err)
    finally:
        os.close(err)
        os.close(out)
    assert (tmp_path / "done").exists()


class Busy(io.StringIO):
    """As Python's streams are to a handler of signals that comes while they are written to."""

    def write(self, text: str = "") -> int:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    flush = write  # type: ignore[assignment]


def test_a_signal_that_comes_while_a_line_is_written_is_handled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Busy())
    screen = Screen()
    screen.keep(tmp_path / "log")
    screen.note("a signal came")
    assert "a signal came" in (tmp_path / "log").read_text()


def test_bars_that_a_reader_leaves_behind(tmp_path: Path) -> None:
    """Bars are drawn by a thread, too."""
    code = "import os; os.environ['FORCE_COLOR'] = '1'\n" + SHOWING
    err = unread()
    assert python(code, cwd=tmp_path, out=subprocess.DEVNULL, err=err) == 0
    os.close(err)
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("where", ["unread", "full"])
@pytest.mark.parametrize(
    ("body", "arguments", "code"),
    [
        ("raise DataError('no')", TRAIN, 3),
        ("raise KeyboardInterrupt", TRAIN, 130),
        ("raise RuntimeError('a defect')", TRAIN, 1),
        ("sys.stderr.write('said'); sys.stderr.flush()", TRAIN, 0),
        ("raise AssertionError", ("train", "--no-such-option"), 2),
    ],
)
def test_an_exit_code_reaches_the_caller_when_the_words_do_not(
    tmp_path: Path, where: str, body: str, arguments: tuple[str, ...], code: int
) -> None:
    """Neither stdout nor stderr can be written."""
    lost = unread() if where == "unread" else os.open("/dev/full", os.O_WRONLY)
    try:
        assert python(COMMAND.format(body=body), *arguments, cwd=tmp_path, out=lost, err=lost) == code
    finally:
        os.close(lost)


BROKEN = "raise BrokenPipeError(32, 'Broken pipe')"


@pytest.mark.parametrize(
    ("body", "arguments", "reader", "code"),
    [
        ("import typer; typer.echo('x')", STATUS, False, 0),
        (BROKEN, STATUS, False, 0),
        # Another pipe: stdout has its reader.
        (BROKEN, STATUS, True, 1),
        ("raise BrokenPipeError", STATUS, True, 1),
        (BROKEN, TRAIN, False, 1),
        ("raise BrokenPipeError", TRAIN, False, 1),
    ],
)
def test_a_broken_pipe_is_well_only_when_it_is_the_output(
    tmp_path: Path, body: str, arguments: tuple[str, ...], reader: bool, code: int
) -> None:
    read, write = os.pipe()
    if not reader:
        os.close(read)
    with (tmp_path / "said").open("wb") as said:
        assert python(COMMAND.format(body=body), *arguments, cwd=tmp_path, out=write, err=said.fileno()) == code
    os.close(write)
    assert ("a defect of vitgraft" in (tmp_path / "said").read_text()) == (code == 1)


def test_notes_are_kept_behind_earlier_ones(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of an earlier start\n")
    screen = Screen()
    screen.note("before there is a log")
    screen.keep(log)
    screen.note("[bold]shown \udcff")
    screen.record("not shown")
    first, second, third = log.read_text().splitlines()
    assert first == "of an earlier start"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[bold\]shown \\udcff", second)
    assert third.endswith(" not shown")
    screen.keep(tmp_path / "nowhere" / "log")
    screen.note("nobody misses it")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("launch.port: taken"), "launch.port: taken\n"),
        (KeyError("x"), "\n    raise error\nKeyError: 'x'\n"),
    ],
)
def test_the_leaders_log_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    """What is shown may not be there to read later."""

    def fail(*_: Any) -> None:
        raise error

    for name in ("check_data", "check_model", "Supervisor"):
        monkeypatch.setattr(training, name, fail if name == "Supervisor" else lambda *_: 1)
    run, recipe = make_run(tmp_path / "run")
    with pytest.raises(type(error)):
        training.train(recipe, run, Screen())
    (log,) = (run / "logs").glob("supervisor.*.log")
    assert log.read_text().endswith(said)


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("vitgraft.launch.ui.time.monotonic", lambda: self.now)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_plain_lines_have_units_and_say_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Screen() as screen:
        for step in range(1, 31):
            facts = {"loss": 2.0 / 3, "lr": 1.25e-4, "images/s": 26.666}
            screen.progress("train", step, 1201, facts)
            clock.now += 10.0
        # An evaluation of five minutes counts, too.
        clock.now += 300.0
        screen.progress("train", 31, 1201, facts)
        screen.progress("train", 1201, 1201, facts)
    lines = shown(capsys)
    assert lines[0] == "train 1/1,201  loss 0.6667  lr 0.000125  26.67 images/s"
    assert lines[1] == "train 2/1,201  loss 0.6667  lr 0.000125  26.67 images/s  ETA 3 h 19 min"
    assert lines[-2].endswith("images/s  ETA 6 h 30 min")
    assert lines[-1].endswith("26.67 images/s")


def test_what_begins_anew_is_reckoned_anew(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A second evaluation, or steps that are made again after a failure."""
    clock = Clock(monkeypatch)
    with Screen() as screen:
        for done, seconds in (10, 20), (20, 1000), (5, 20), (15, 20):
            screen.progress("evaluate", done, 100)
            clock.now += seconds
    assert shown(capsys) == [
        "evaluate 10/100",
        "evaluate 20/100  ETA 2 min",
        "evaluate 5/100",
        "evaluate 15/100  ETA 2 min",
    ]
