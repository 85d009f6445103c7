"""metrics.jsonl and TensorBoard: one row and one point for every optimizer step."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import MAX_SMALL_BYTES, read_text
from vitgraft.trainer.monitor_files import attempts, drop_torn_line, read_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from vitgraft.trainer.evaluate import Evaluation
    from vitgraft.trainer.param_groups import Group

MAX_RANK_CURVES = 16
"""With more ranks than that, their own times are drawn as one histogram."""


@dataclass(frozen=True)
class StepRow:
    """One row of metrics.jsonl.

    ``steps``: of the whole run. ``seconds``: from the step's begin to its end. ``mfu``: model FLOPs utilisation
    (:mod:`vitgraft.trainer.mfu`), ``None`` where no peak is known. ``own_s_median``, ``own_s_max``, ``slowest_rank``:
    what the ranks themselves took (:mod:`vitgraft.trainer.own_time`). ``memory``: bytes at the peak, of the GPU or of
    the process. ``loader_memory``: bytes of rank 0's loader processes, measured every few seconds.
    """

    step: int
    steps: int
    samples: int
    epoch: int
    loss: float
    losses: dict[str, float]
    lr: float
    grad_norm: float
    seconds: float
    images_per_second: float
    mfu: float | None
    own_s_median: float
    own_s_max: float
    slowest_rank: int
    data_wait_s: float
    checkpoint_stall_s: float
    memory: int
    loader_memory: int
    attempt: int

    def as_json(self) -> dict[str, Any]:
        """Return the row with the loss's exact bits as hexadecimal text, and when it was written (seconds since
        1970)."""
        return {**asdict(self), "loss_hex": self.loss.hex(), "time": time.time()}

    def curves(self) -> dict[str, float]:
        """Return the values for TensorBoard, by tag."""
        curves: dict[str, float] = {
            "train/loss": self.loss,
            "train/lr": self.lr,
            "train/grad_norm": self.grad_norm,
            "train/epoch": self.epoch,
            "speed/images_per_second": self.images_per_second,
            "speed/step_s": self.seconds,
            "speed/data_wait_s": self.data_wait_s,
            "speed/checkpoint_stall_s": self.checkpoint_stall_s,
            "ranks/own_s_median": self.own_s_median,
            "ranks/own_s_max": self.own_s_max,
            "ranks/slowest": self.slowest_rank,
            "memory/peak_bytes": self.memory,
            "memory/loader_bytes": self.loader_memory,
        }
        if self.mfu is not None:
            curves["speed/mfu"] = self.mfu
        return curves | {f"loss/{name}": value for name, value in self.losses.items()}


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of the GPU's allocator, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempts_table(events: list[dict[str, Any]]) -> str:
    """Return the starts of a run and how they ended, as a table in Markdown."""
    lines = ["| attempt | started | from step | ranks | ended |", "|---|---|---|---|---|"]
    for attempt in attempts(events):
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started))
        ended = "" if attempt.code is None else f"exit {attempt.code}: {attempt.reason}".replace("|", r"\|")
        lines.append(f"| {attempt.number} | {started} | {attempt.resumed_step} | {attempt.world} | {ended} |")
    return "\n".join(lines)


def groups_table(groups: Sequence[Group]) -> str:
    """Return the optimizer's parameter groups, as a table in Markdown: the numbers of their curves."""
    lines = ["| group | learning rate × | weight decay | tensors | e.g. |", "|---|---|---|---|---|"]
    for number, group in enumerate(groups):
        facts = f"{group.lr_multiplier:.4g} | {group.weight_decay:g} | {len(group.names)} | `{group.names[0]}`"
        lines.append(f"| {number:02d} | {facts} |")
    return "\n".join(lines)


def _recipe_text(run: Path) -> str:
    """Return the resolved recipe, as TensorBoard shows code."""
    try:
        text = read_text(run / "config.yaml", MAX_SMALL_BYTES)
    except DataError:
        return "config.yaml cannot be read"
    return "\n".join(f"    {line}" for line in text.splitlines())


def draw_evaluation(board: SummaryWriter, evaluation: Evaluation, folder: Path, classes: list[str]) -> None:
    """Write one evaluation's metrics, losses, confusion matrix and pictures to TensorBoard. A metric without ground
    truth has no point.

    Args:
        folder: of its pictures.
    """
    from vitgraft.trainer.draw import draw_confusion, load_picture

    step = evaluation.step
    curves: dict[str, float | None] = {f"evaluation/{name}": value for name, value in evaluation.metrics.items()}
    curves |= {f"evaluation_raw/{name}": value for name, value in (evaluation.raw_metrics or {}).items()}
    curves |= {f"validation/loss/{name}": value for name, value in evaluation.losses.items()}
    if evaluation.losses:
        curves["validation/loss"] = math.fsum(evaluation.losses.values())
    for name, value in curves.items():
        if value is not None:
            board.add_scalar(name, value, step)
    if evaluation.confusion is not None:
        board.add_image("confusion", draw_confusion(evaluation.confusion, classes), step)
    for number, name in enumerate(evaluation.pictures):
        board.add_image(f"predictions/{number:02d}", load_picture(folder / name), step)
    board.flush()


class Monitor:
    """Writes the rows and curves of one attempt; rank 0 only."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        drop_torn_line(path)
        self._rows = path.open("a", encoding="utf-8")
        # Points of a killed attempt that this one computes again are hidden, not drawn twice.
        self._board: SummaryWriter = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._points: Any = self._board.file_writer
        self._board.add_text("run/attempts", attempts_table(read_rows(run / "events.jsonl")), first_step)
        self._board.add_text("run/recipe", _recipe_text(run), first_step)
        self._first_step = first_step

    def step(self, row: StepRow, own_s: Sequence[float] = (), rates: Sequence[float] = ()) -> None:
        """Write one optimizer step.

        Args:
            own_s: the own seconds of each rank (:mod:`vitgraft.trainer.own_time`).
            rates: the learning rate of each parameter group; drawn where there are several.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        self._rows.write(json.dumps(row.as_json()) + "\n")
        self._rows.flush()
        # One event with all points: as one call for each, they would cost several times as much.
        curves = row.curves()
        if len(own_s) <= MAX_RANK_CURVES:
            curves |= {f"ranks/own_s/{rank:02d}": seconds for rank, seconds in enumerate(own_s)}
        if len(rates) > 1:
            curves |= {f"lr/group_{number:02d}": rate for number, rate in enumerate(rates)}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in curves.items()]
        self._points.add_summary(Summary(value=values), row.step)
        if len(own_s) > MAX_RANK_CURVES:
            self._board.add_histogram("ranks/own_s", torch.tensor(own_s), row.step)

    def evaluation(self, evaluation: Evaluation, folder: Path, classes: list[str]) -> None:
        """Write one evaluation (:func:`draw_evaluation`)."""
        draw_evaluation(self._board, evaluation, folder, classes)

    def start(self, groups: Sequence[Group], picture: torch.Tensor) -> None:
        """Write what an attempt begins with.

        Args:
            groups: of the optimizer's parameters.
            picture: of the first training batch, (3, H, W) uint8.
        """
        self._board.add_text("run/parameter_groups", groups_table(groups), self._first_step)
        self._board.add_image("train/batch", picture, self._first_step + 1)
        self._board.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._rows.close()
        self._board.close()
