"""Evaluation of a run's checkpoints as they are committed, in one process beside the trainer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vitgraft.configs.errors import VitgraftError
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.recipe import Backlog
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.trainer.checkpoint.commit import all_step_names, final_folder, owning_attempt
from vitgraft.trainer.checkpoint.files import replace_text
from vitgraft.trainer.checkpoint.layout import parse_step
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.checkpoint.retention import awaiting, evaluation_due, given_up_path, result_path, retain
from vitgraft.trainer.evaluate import Evaluation, Evaluator, evaluate_into_run, evaluated_already
from vitgraft.trainer.figures import headline, missing_best
from vitgraft.trainer.monitor import draw_evaluation
from vitgraft.trainer.rank import as_known
from vitgraft.trainer.schedule import stage_ends

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from vitgraft.trainer.evaluator import Pulse

POLL_S = 0.5
_log = logging.getLogger("vitgraft")


class Follower:
    """Evaluates due checkpoints in turn. A failure is reported in one line, and the next follows.

    Args:
        attempt: the attempt of the run that it belongs to; ``None``: to whichever owns the run.

    Raises:
        DataError: the run's length is in epochs, and its training data cannot be looked at.
    """

    def __init__(
        self, run: Path, attempt: int | None, recipe: Recipe, device: torch.device, backlog: Backlog, pulse: Pulse
    ) -> None:
        self.run, self.attempt, self.recipe, self.device = run, attempt, recipe, device
        self.backlog, self.pulse = backlog, pulse
        self._last_step = _last_step(recipe)
        self._settled: set[int] = set()
        self._owner = owning_attempt(run)
        self._evaluator: Evaluator | None = None
        self._board: SummaryWriter | None = None

    def serve(self, drain: threading.Event, patience: float = 0.0) -> None:
        """Work until asked to drain, then until nothing is due; or until another attempt owns the run.

        Args:
            patience: seconds for which, once asked, the checkpoint of the run's last step is waited for. It is
                committed by then, but storage that hosts share may show it late.
        """
        until: float | None = None
        while not self._stale():
            # Asked before looking: what was committed before the signal must be seen.
            drained = drain.is_set()
            step = next(iter(self.pending()), None)
            if step is not None:
                self.evaluate(step)
            elif drained:
                until = time.monotonic() + patience if until is None else until
                if self._last_step in self._settled or patience == 0:
                    break
                if time.monotonic() > until:
                    text = f"the checkpoint of step {self._last_step} does not show within {patience:g} s"
                    self.pulse.reporter.event("evaluator_gave_up", f"WARNING {text}; it is not evaluated")
                    break
                time.sleep(POLL_S)
            else:
                drain.wait(POLL_S)
        if self._board is not None:
            self._board.close()

    def pending(self) -> list[int]:
        """Return the steps that are to be evaluated now, in this order."""
        steps = [step for name in all_step_names(self.run) if (step := parse_step(name)) is not None]
        due = [step for step in steps if evaluation_due(self.recipe, step, self._last_step)]
        return awaiting(due, self._settled, self.backlog)

    def evaluate(self, step: int) -> None:
        """Evaluate a checkpoint, unless that is done. It is locked meanwhile: retention spares it."""
        self.pulse.at(step)
        try:
            checkpoint = open_checkpoint(final_folder(self.run, step))
            with checkpoint.reading():
                evaluator = self._evaluator_of(checkpoint)
                if not evaluated_already(evaluator, self.run, checkpoint):
                    evaluation = evaluate_into_run(evaluator, self.run, checkpoint, self._progress)
                    assert evaluation is not None  # there is one process
                    self.pulse.done += 1
                    self._tell(evaluator, evaluation, checkpoint)
            with contextlib.suppress(OSError):
                given_up_path(self.run, step).unlink(missing_ok=True)
        except Exception as error:
            self.give_up(step, _why(error))
        self._settled.add(step)
        self.pulse.at(None)

    def give_up(self, step: int, reason: str) -> None:
        """Skip a step's evaluation and record that, so that its checkpoint is not kept for the evaluation."""
        self._settled.add(step)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not final_folder(self.run, step).exists():
            _log.info("step %d: its checkpoint was deleted meanwhile", step)
            return
        self.pulse.reporter.note(f"WARNING step {step} is not evaluated: {reason}")
        with contextlib.suppress(OSError):
            given_up_path(self.run, step).parent.mkdir(exist_ok=True)
            replace_text(given_up_path(self.run, step), reason + "\n")

    def retain(self) -> None:
        """Delete checkpoints that were kept for their evaluation only, where no later commit would delete them."""
        try:
            if not self._stale():
                retain(self.run, self.recipe)
        except OSError as error:
            self.pulse.reporter.note(f"WARNING an old checkpoint could not be deleted: {error}")

    def _stale(self) -> bool:
        """Tell whether another attempt owns the run. Without one of our own, a new owner clears the settled steps."""
        owner = owning_attempt(self.run)
        if self.attempt is not None:
            return owner is not None and owner != self.attempt
        if owner != self._owner:
            self._owner = owner
            self._settled.clear()
        return False

    def _evaluator_of(self, checkpoint: Checkpoint) -> Evaluator:
        """Return the evaluator, created when first needed, as it holds a model."""
        if self._evaluator is None:
            assert self.recipe.data.val is not None  # else nothing is due
            classes, data = checkpoint.manifest.classes, self.recipe.data.val.path
            self._evaluator = Evaluator(self.recipe, classes, data, self.device, self.recipe.evaluate.loss)
        return self._evaluator

    def _tell(self, evaluator: Evaluator, evaluation: Evaluation, checkpoint: Checkpoint) -> None:
        self.pulse.reporter.note(headline(evaluator, evaluation, checkpoint))
        if (missing := missing_best(evaluator, evaluation)) is not None:
            self.pulse.reporter.note(missing)
        folder = result_path(self.run, evaluation.step).with_suffix("")
        try:
            if self._board is None:
                self._board = self._open_board()
            draw_evaluation(self._board, evaluation, folder, evaluator.classes)
        except OSError as error:
            self.pulse.reporter.note(f"WARNING step {evaluation.step} has no curves: {error}")

    def _open_board(self) -> SummaryWriter:
        """Open a TensorBoard writer in its own folder: of several files in one, TensorBoard follows only the newest."""
        from torch.utils.tensorboard import SummaryWriter

        # What came of later checkpoints was of those that a resume has set aside.
        newest = max((parse_step(name) or 0 for name in all_step_names(self.run)), default=0)
        return SummaryWriter(str(self.run / "tensorboard" / "evaluator"), purge_step=newest + 1)

    def _progress(self, done: int, total: int) -> None:
        self.pulse.reporter.progress("evaluate", done, total)


def _last_step(recipe: Recipe) -> int:
    """Return the run's last step, as in the trainer's session."""
    train = recipe.train
    if train.steps is not None:
        return stage_ends(train, 0)[-1]
    dataset = PackedDataset(recipe.data.train, recipe.data, recipe.task, seed=train.seed, train=True)
    return stage_ends(train, dataset.epoch_size)[-1]


def _why(error: Exception) -> str:
    """Return one line on a failure of the data, a checkpoint or the machine.

    Raises:
        Exception: it is none of those; a successor may fare better.
    """
    known = as_known(error)
    if known.exit_code == VitgraftError.exit_code:
        raise error
    if known.cause in ("device_memory", "host_memory"):
        return f"out of memory: {' '.join(str(error).split())[:200]}; lower evaluate.batch"
    return str(known)
