"""What an installation says: what it does, and errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "install.sh"
PIP = """#!/usr/bin/env bash
# Stands for pip: warnings from -q on go unsaid with a second q, errors never do.
case " $* " in *" -qq "*) ;; *) echo "WARNING: something about wheels" >&2 ;; esac
case "$*" in *FAILS*) echo "ERROR: no such version" >&2; exit 1 ;; esac
echo "$*" >> "$(dirname "$0")/asked"
"""


@pytest.mark.parametrize("fails", [False, True])
def test_an_installation_passes_on_errors_and_no_warnings(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "launch").mkdir()
    script, pip = shutil.copy(SCRIPT, tmp_path / "launch"), tmp_path / ".venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.write_text(PIP.replace("FAILS", "setuptools") if fails else PIP)
    pip.chmod(0o755)
    done = subprocess.run(["bash", script, sys.executable], capture_output=True, text=True, timeout=60, check=False)
    said, *errors = done.stderr.splitlines()
    assert said.startswith("vitgraft: installing into .venv")
    assert (done.returncode, errors, done.stdout) == ((1, ["ERROR: no such version"], "") if fails else (0, [], ""))
    if not fails:
        assert (pip.parent / "asked").read_text().splitlines()[-1].endswith("-e .[dev,demo]")
