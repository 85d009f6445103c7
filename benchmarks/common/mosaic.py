"""mosaicml-streaming as a peer, in an interpreter of its own: it wants other versions of numpy and huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from common.measure import Run

VARIABLE = "VITGRAFT_BENCH_STREAMING"
HOW = f"mosaicml-streaming (set {VARIABLE})"


def interpreter() -> str | None:
    """A Python that has it; ``None``: there is none."""
    given = os.environ.get(VARIABLE)
    return given or (sys.executable if find_spec("streaming") else None)


class Mosaic:
    """A process that reads the samples of our tars, which it first converts into its own format. Context manager.

    Args:
        folder: of tars. out: an empty folder for the converted shards.

    Raises:
        RuntimeError: the process ended, with what it said last.
    """

    def __init__(self, python: str, folder: Path, out: Path) -> None:
        script = Path(__file__).with_name("mosaic_peer.py")
        self._log = out.with_suffix(".log").open("w+")
        self._process = subprocess.Popen(
            [python, str(script), str(folder), str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.samples = int(self._answer()["samples"])

    def __enter__(self) -> Mosaic:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()

    def read(self, number: int, *, decode: bool, by_index: bool = False, worker: bool = False) -> Run:
        """One round; ``worker``: batches of pixels from a worker process of torch's DataLoader."""
        assert self._process.stdin is not None
        command = {"round": number, "decode": decode, "by_index": by_index, "worker": worker}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return Run(*self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"mosaicml-streaming ended: {self._log.read()[-800:]}")
        return json.loads(line)
