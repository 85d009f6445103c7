"""Which code wrote a checkpoint."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_S = 10.0


@cache
def code_version() -> str:
    """The package's version, and the commit where it runs from a git checkout: ``0.1.0+g5cda0e6bbcb9``, with ``.dirty``
    where files differ from it. Without git, the version alone."""
    released = version("vitgraft")
    if not (ROOT / ".git").exists():  # git would look above it and find whatever holds the environment
        return released
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(
            [*command, "--dirty=.dirty"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return released
    return f"{released}+g{found.stdout.strip()}"
