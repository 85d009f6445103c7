"""metrics.jsonl and TensorBoard: one row and one point for every optimizer step."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitgraft.trainer.monitor_files import drop_torn_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepRow:
    """One row of metrics.jsonl. ``memory``: bytes at the peak, of the GPU or of the process."""

    step: int
    samples: int
    epoch: int
    loss: float
    losses: dict[str, float]
    lr: float
    grad_norm: float
    images_per_second: float
    data_wait_s: float
    checkpoint_stall_s: float
    memory: int
    attempt: int

    def as_json(self) -> dict[str, Any]:
        """The row with the loss's exact bits as hexadecimal text."""
        return {**asdict(self), "loss_hex": self.loss.hex()}


def peak_memory(device: torch.device) -> int:
    """Peak bytes of the GPU's allocator, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Monitor:
    """Writes the rows and curves of one attempt; rank 0 only."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        drop_torn_line(path)
        self._rows = path.open("a", encoding="utf-8")
        # Points of a killed attempt that this one computes again are hidden, not drawn twice.
        self._board: SummaryWriter = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def step(self, row: StepRow) -> None:
        """Write one optimizer step."""
        self._rows.write(json.dumps(row.as_json()) + "\n")
        self._rows.flush()
        curves = {
            "train/loss": row.loss,
            "train/lr": row.lr,
            "train/grad_norm": row.grad_norm,
            "train/epoch": row.epoch,
            "speed/images_per_second": row.images_per_second,
            "speed/data_wait_s": row.data_wait_s,
            "speed/checkpoint_stall_s": row.checkpoint_stall_s,
            "memory/peak_bytes": row.memory,
        }
        curves |= {f"loss/{name}": value for name, value in row.losses.items()}
        for name, value in curves.items():
            self._board.add_scalar(name, value, row.step)

    def evaluation(self, step: int, figures: dict[str, float], pictures: list[Path]) -> None:
        """Write one evaluation's figures and pictures."""
        from vitgraft.trainer.draw import load_picture

        for name, value in figures.items():
            self._board.add_scalar(f"evaluation/{name}", value, step)
        for number, path in enumerate(pictures):
            self._board.add_image(f"predictions/{number:02d}", load_picture(path), step)
        self._board.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._rows.close()
        self._board.close()
