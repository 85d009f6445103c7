"""Items to pack that worker processes can import, and what they do there."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.pack.items import LeftOut, Prepared
from vitgraft.data_shards.pack.label_report import SIZES, LabelFault


@dataclass(frozen=True)
class Text:
    """A sample of the bytes of ``path``; what they say may make it anything else."""

    path: Path

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's name."""
        return {"file_name": self.path.name}

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def prepare(self) -> Prepared | LeftOut:
        """The sample, a fault, or the end of this process."""
        data = self.path.read_bytes()
        if data == b"bad":
            raise DataError(f"{self.path.name}: bad sample; replace it")
        if data == b"none":
            return LeftOut(f"{self.path.name}: none")
        if data == b"kill" and not (self.path.parent / "tame").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return Prepared({"mp4": data}, self.metadata)


def square(number: int) -> int:
    """The square, the later the smaller; faults at 13, a mistake at 17."""
    if number == 13:
        raise LabelFault("13 is no number", SIZES)
    if number == 17:
        raise ValueError("a mistake")
    time.sleep(0.01 if number < 3 else 0)
    return number * number


def sleep(seconds: float) -> int:
    """The process that slept."""
    time.sleep(seconds)
    return os.getpid()


def own_pid(_: int) -> int:
    """Which process does the work."""
    return os.getpid()


def kill_if(number: int) -> bytes:
    """Much to send; 5 dies."""
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(1 << 20)
