"""RUN/agents/HOST.json: identity of a run's agent process on a host, so that its successor can end it first."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import read_json
from vitgraft.launch.processes import kill_with
from vitgraft.trainer.checkpoint.files import replace_text

PATIENCE_S = 20.0
MARK_VARIABLE = "VITGRAFT_AGENT"
"""Variable that names the agent which started a process, directly or indirectly."""


def end_predecessor(run: Path, host: str) -> None:
    """Kill the agent that an earlier supervisor has left on this host for the same run, if it still lives: its ranks
    die with it. And what those have left: loader processes end with their rank, but for those that were stopped. Then
    this process is the run's agent here, and what it starts inherits its mark.

    Raises:
        OSError: the record cannot be written, or the other process does not die.
    """
    folder = run / "agents"
    folder.mkdir(exist_ok=True)
    path = folder / f"{host}.json"
    me = _facts(os.getpid())
    earlier: Any = None
    with contextlib.suppress(DataError):
        earlier = read_json(path, 1 << 16)
    if isinstance(earlier, dict) and earlier != me and isinstance(earlier.get("pid"), int):
        _kill(earlier)
        kill_with(f"{MARK_VARIABLE}={_mark(earlier)}")
    replace_text(path, json.dumps(me) + "\n")
    os.environ[MARK_VARIABLE] = _mark(me)


def _mark(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True)


def _kill(facts: dict[str, Any]) -> None:
    pid = facts["pid"]
    deadline = time.monotonic() + PATIENCE_S
    # The number alone may be another process's by now; time of start, boot and name space make it this one's.
    while facts == _facts(pid):
        if time.monotonic() > deadline:
            raise OSError(f"an earlier agent, process {pid}, does not die; see what holds it in the kernel")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _facts(pid: int) -> dict[str, Any] | None:
    """Return the facts that identify a process uniquely; ``None``: there is none, or it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (
            {
                "pid": pid,
                "started": int(fields[19]),
                "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                "space": os.readlink(f"/proc/{pid}/ns/pid"),
            }
            if fields[0] not in "ZX"
            else None
        )
    except OSError:
        return None
