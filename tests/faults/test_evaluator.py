"""Real evaluator processes under fire: killed in the middle, stopped, asked to end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import processes_naming, wait_until
from support_evaluator import add_checkpoint, inline_result, make_evaluated_run, result_of

from vitgraft.data_shards.pack.digits import pack_digits
from vitgraft.launch import evaluator as keeper_module
from vitgraft.launch.evaluator import EvaluatorKeeper

SAMPLES = 40
"""So many that, one by one, they take long enough to be killed among the first."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "semantic"
    pack_digits("semantic", "val", folder, samples=SAMPLES)
    return folder


class Keeping:
    """A launcher that only keeps an evaluator, and hears what it says."""

    def __init__(self, run: Path) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.messages: list[dict[str, Any]] = []
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.lock = (run / "lock").open("w")
        self.keeper = EvaluatorKeeper(run, 1, "cpu", 1, self.lock.fileno(), self._event)
        self.keeper.start(self.write_end)
        self._rest = b""

    def _event(self, name: str, **facts: Any) -> None:
        self.events.append((name, facts))

    def tend(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            *lines, self._rest = (self._rest + os.read(self.read_end, 1 << 16)).split(b"\n")
            for message in map(json.loads, lines):
                self.messages.append(message)
                if message["kind"] == "beat":
                    self.keeper.heard(message)
        return self.keeper.tend()

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.events, self.keeper.log_path().read_text())
            self.tend()
            time.sleep(0.002)

    def evaluating(self, samples: int) -> bool:
        """Whether it has done so many samples of a checkpoint."""
        return any(m.get("label") == "evaluate" and m["done"] >= samples for m in self.messages)

    def pid(self) -> int:
        return max(message["pid"] for message in self.messages if message["kind"] == "beat")

    def texts(self) -> list[str]:
        return [message["text"] for message in self.messages if "text" in message]

    def __enter__(self) -> Keeping:
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.end()
        self.lock.close()
        os.close(self.read_end)
        os.close(self.write_end)


def test_killed_in_the_middle_it_gives_the_trainers_results(tmp_path: Path, data: Path) -> None:
    """Figures, pictures and all, of each checkpoint once; signals to the whole job do not reach it."""
    settings: dict[str, Any] = {"train__steps": 9, "evaluate__batch": 1, "evaluator": {"backlog": "all"}}
    run, recipe = make_evaluated_run(tmp_path / "run", data, [3, 6], **settings)
    with Keeping(run) as keeping:
        keeping.until(lambda: keeping.evaluating(2))
        assert os.getpriority(os.PRIO_PROCESS, keeping.pid()) == 5
        os.kill(keeping.pid(), signal.SIGKILL)
        keeping.until(lambda: keeping.events)
        assert not list((run / "results").glob("*.json"))
        (event,) = keeping.events
        assert event == ("evaluator_restart", {"reason": "ended by SIGKILL", "restarts": 1, "step": 3})
        keeping.until(lambda: any("step 3" in text for text in keeping.texts()))
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(keeping.pid(), number)
        keeping.until(lambda: any("step 6" in text for text in keeping.texts()))
        add_checkpoint(run, 9)
        keeping.keeper.drain()
        keeping.until(lambda: not keeping.tend())
        assert len(keeping.events) == 1
        assert [text[:6] for text in keeping.texts()] == ["step 3", "step 6", "step 9"]
    other, _ = make_evaluated_run(tmp_path / "other", data, [3, 6, 9], **settings)
    for step in (3, 6, 9):
        assert result_of(run, step) == inline_result(other, recipe, step)
        for picture in (other / "results" / f"step-{step:08d}").iterdir():
            assert (run / "results" / f"step-{step:08d}" / picture.name).read_bytes() == picture.read_bytes()
    wait_until(lambda: not processes_naming(run), seconds=15)


def test_stopped_it_is_replaced(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3], train__steps=3, evaluate__batch=1)
    with Keeping(run) as keeping:
        keeping.until(lambda: keeping.evaluating(2))
        os.kill(keeping.pid(), signal.SIGSTOP)
        monkeypatch.setattr(keeper_module, "SILENCE_S", 2.0)
        keeping.until(lambda: keeping.events)
        assert keeping.events[0][1]["reason"] == "silent for 2 s"
        keeping.keeper.drain()
        keeping.until(lambda: not keeping.tend())
    assert result_of(run, 3)["samples"] == SAMPLES


def test_asked_before_it_listens_it_drains_and_dies_with_its_launcher(tmp_path: Path, data: Path) -> None:
    run, _ = make_evaluated_run(tmp_path / "run", data, [3], train__steps=3)
    with Keeping(run) as keeping:
        keeping.keeper.drain()  # at once: the process has hardly begun
        keeping.until(lambda: not keeping.tend())
        assert keeping.events == []
    assert result_of(run, 3)["step"] == 3
    launcher = (
        "import os, sys, time; from pathlib import Path; from vitgraft.launch.evaluator import EvaluatorKeeper as K;"
        "K(Path(sys.argv[1]), 1, 'cpu', 1, None, print).start(os.pipe()[1]); print('on', flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", launcher, str(run)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert any("vitgraft.trainer.evaluator" in line for line in processes_naming(run))
        process.kill()
    wait_until(lambda: not processes_naming(run), seconds=15)


def by_hand(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitgraft.trainer.evaluator", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_by_hand(tmp_path: Path, data: Path) -> None:
    """Everything that is due, whatever the run's backlog says; then nothing; and what is wrong in one line."""
    run, _ = make_evaluated_run(tmp_path / "run", data, [3, 6, 9], evaluator={"backlog": "latest"})
    done = by_hand("--run-dir", run, "--backlog", "all", "--give-up", "6")
    assert done.returncode == 0, done.stderr
    assert sorted(path.stem for path in (run / "results").glob("*.json")) == ["step-00000003", "step-00000009"]
    assert "step 9: mIoU" in done.stderr
    assert "WARNING step 6 is not evaluated" in done.stderr
    assert len(list((run / "checkpoints").iterdir())) == 3, "retention is the run's affair"
    wrong = by_hand("--run-dir", tmp_path / "nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("vitgraft: ")
    assert wrong.stderr.count("\n") == 1
    assert "is none of cpu, cuda and cuda:N" in by_hand("--run-dir", run, "--device", "tpu").stderr
    assert "python -m vitgraft.trainer.evaluator --run-dir runs/first" in by_hand("--help").stdout
