"""A real run's checkpoint, evaluated by the trainer's two ranks and by the evaluator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from support_evaluator import result_of


def test_the_evaluator_finds_what_the_ranks_found(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "results")
    command = [sys.executable, "-m", "vitgraft.trainer.evaluator", "--run-dir", str(run)]
    subprocess.run(command, check=True, timeout=120)
    assert result_of(run, 20) == result_of(unbroken, 20)
    pictures = sorted((unbroken / "results" / "step-00000020").iterdir())
    assert pictures
    for picture in pictures:
        assert (run / "results" / "step-00000020" / picture.name).read_bytes() == picture.read_bytes()
