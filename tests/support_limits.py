"""Run something in a process of its own that may take so much more memory and time, and see how it ended."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from vitgraft.configs.errors import VitgraftError


def outcome(action: Callable[[], object], *, memory: int, seconds: int = 30) -> str:
    """What ``action`` came to in a child with ``memory`` bytes more than this process has now, and ``seconds``.

    Returns:
        "ok: RESULT", "refused: MESSAGE" for an error with an exit code, "raised: TYPE: MESSAGE" for any other, and
        "killed by N" or "still running" for a child that did not say.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, json.dumps(_limited(action, memory)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
            return "still running"
        said = b""
        while part := os.read(reading, 1 << 16):
            said += part
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    return str(json.loads(said)) if said else f"killed by {os.waitstatus_to_exitcode(status)}"


def _limited(action: Callable[[], object], memory: int) -> str:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        return f"ok: {action()}"
    except VitgraftError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"raised: {type(error).__name__}: {error}"
