"""Signals end every command in one line, from its first line of code until its exit code is decided."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import executable, succeed

# What each does while a signal comes: hashes, decodes, waits.
COMMANDS = {
    "train": ["train", "quickstart/semantic", "--run-dir", "{out}/run"],
    "pack": ["shards", "pack", "digits", "--task", "detection", "--split", "train", "--samples", "3000", "--out"],
    "verify": ["shards", "verify", "{data}"],
    "demo": ["demo", "--out", "{out}/demo"],
    "doctor": ["doctor"],
    "prune": ["checkpoints", "prune", "{out}"],
}
SHORT = ("doctor", "prune", "verify")
COMMANDS["pack"].append("{out}/packed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "packed"
    succeed("shards", "pack", "digits", "--task", "semantic", "--split", "val", "--samples", "100", "--out", out)
    return out


def hears(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process that lives has a handler of this signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def started(arguments: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [executable(), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not hears(process, signal.SIGTERM):
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("delay", [0.0, 0.2, 1.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_as_documented(
    name: str, number: signal.Signals, delay: float, data: Path, tmp_path: Path
) -> None:
    process = started([word.format(data=data, out=tmp_path) for word in COMMANDS[name]])
    time.sleep(delay)
    # Of a terminal's Ctrl-C all processes of the group hear.
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    if name in SHORT and delay > 1 and process.returncode in (0, 4):
        return  # it was quicker
    expected = {signal.SIGTERM: (75, "stopped"), signal.SIGINT: (130, "interrupted")}[number]
    assert (process.returncode, expected[1] in complaint) == (expected[0], True), complaint
    assert "Traceback" not in complaint
    assert "defect" not in complaint
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"] == []


def test_nothing_that_takes_time_is_loaded_before_signals_are_heard() -> None:
    code = (
        "import sys, vitgraft.launch.entry; sys.exit(bool({'typer', 'pydantic', 'yaml', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ENDS = """
import signal, sys, time
from vitgraft.launch import ending
ending.hear()
try:
    print("heard", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    pass
{decide}
print("over", flush=True)
time.sleep(0.5)
class Late:
    def __del__(self):
        time.sleep(0.5)  # while Python ends
keep = Late()
sys.exit(75)
"""


def test_signals_that_keep_coming_do_not_change_a_code_that_is_decided() -> None:
    program = ENDS.format(decide="ending.decide()")
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "heard\n"
    while process.poll() is None:
        process.terminate()
        time.sleep(0.01)
    assert (process.returncode, process.communicate()[1]) == (75, "")


def test_what_the_process_was_started_to_ignore_stays_ignored() -> None:
    program = (
        "from vitgraft.launch import ending; ending.hear(); import os, signal; os.kill(os.getpid(), signal.SIGHUP)"
    )
    shell = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", program]
    assert subprocess.run(shell, check=False).returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_an_import_that_makes_another_error_of_it_changes_nothing(number: signal.Signals, code: int) -> None:
    """pydantic makes a RuntimeError of what comes while it builds a class."""
    program = f"""
import os, sys, typer
sys.argv = ["vitgraft", "train", "x"]
import vitgraft.configs.load as load
def load_recipe(*_):
    try:
        os.kill(os.getpid(), {int(number)})
    except BaseException as error:
        raise RuntimeError("Error calling __set_name__") from error
load.load_recipe = load_recipe
from vitgraft.launch import entry
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
