"""The training loop: one optimizer step after another, from the global cursor to the end of the recipe."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitgraft.configs.errors import PreemptedRun, TrainingError
from vitgraft.configs.hashing import seed_of
from vitgraft.configs.units import counted
from vitgraft.data_shards.batch import Batch, Entry, Skipped
from vitgraft.data_shards.loader import TrainBatches
from vitgraft.data_shards.plan import MicroBatch, steps_per_epoch
from vitgraft.models.contract import Counts, Losses
from vitgraft.models.norms import frozen_batchnorm, unsynchronised_statistics
from vitgraft.trainer import comm
from vitgraft.trainer.batch_picture import draw_batch
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.checkpoint.retention import evaluation_due, result_path
from vitgraft.trainer.evaluate import Evaluator, evaluate_into_run, evaluated_already
from vitgraft.trainer.figures import headline, missing_best
from vitgraft.trainer.forecast import Forecast
from vitgraft.trainer.heartbeat import Heart
from vitgraft.trainer.mfu import Arithmetic, arithmetic_of
from vitgraft.trainer.monitor import Monitor, StepRow, peak_memory
from vitgraft.trainer.non_finite import record_non_finite, remedy
from vitgraft.trainer.own_time import clock_for, spread
from vitgraft.trainer.session import Session
from vitgraft.trainer.skips import SkipLog


@dataclass
class StepFacts:
    """Values of a step for the checks and the log.

    ``reduced`` and ``local``: per micro-step, the loss sums, counts, own seconds of each rank, skipped entries, whether
    a checkpoint failed and whether to stop, over all ranks and of this rank; they stay on the device until the step's
    one synchronisation. ``normalisers``: divisor of each loss sum, and ``weights``: its weight in the mean over the
    micro-steps. ``skipped``: this rank's.
    """

    names: list[str] = field(default_factory=list)
    reduced: list[Tensor] = field(default_factory=list)
    local: list[Tensor] = field(default_factory=list)
    normalisers: list[Tensor] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    entries: list[tuple[Entry, ...]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    samples: int = 0
    epoch: int = 0
    data_wait: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0

    def losses(self) -> dict[str, float]:
        """Return the step's losses by name: sums over ranks divided by counts over ranks, weighted over micro-steps."""
        sums, counts = torch.stack(self.reduced).tolist(), torch.stack(self.normalisers).tolist()
        out = dict.fromkeys(self.names, 0.0)
        for total, count, weights in zip(sums, counts, self.weights, strict=True):
            for index, name in enumerate(self.names):
                out[name] += weights[index] * total[index] / count[index] / len(self.weights)
        return out

    def own_seconds(self) -> list[float]:
        """Return each rank's seconds for the step without waiting for others, by rank."""
        own: list[float] = torch.stack(self.reduced)[:, 2 * len(self.names) : -3].sum(0).tolist()
        return own

    def any_skipped(self) -> bool:
        """Tell whether any rank skipped an entry in the step."""
        return any(row[-3].item() > 0 for row in self.reduced)

    def checkpoint_failed(self) -> bool:
        """Tell whether any rank knows that the last checkpoint could not be written."""
        return bool(self.reduced[-1][-2].item() > 0)

    def stop_asked(self) -> bool:
        """Tell whether any rank was asked to stop before the step's last micro-step."""
        return bool(self.reduced[-1][-1].item() > 0)


class TrainLoop:
    """Runs a session. ``stop``: polled at every step for a request to stop. ``heart``: notified of every
    phase."""

    def __init__(self, session: Session, stop: Callable[[], bool], heart: Heart) -> None:
        self.session, self.stop, self._heart = session, stop, heart
        self.recipe = session.recipe
        self.run_folder = session.assignment.run
        self._evaluator: Evaluator | None = None
        self._monitor = Monitor(self.run_folder, session.first_step) if comm.rank() == 0 else None
        self._kind = "clips" if self.recipe.task == "video" else "images"
        steps = session.last_step - session.first_step
        evaluates = self.recipe.evaluator is None and self.recipe.data.val is not None
        self._forecast = Forecast(steps, self._kind, "evaluations" if evaluates else None)
        self._loose_statistics = unsynchronised_statistics(session.engine.module)
        self._stall = 0.0
        self._clock = clock_for(session.device)
        self._arithmetic = self._count_arithmetic() if comm.rank() == 0 else None
        self._ledger = self._open_ledger()
        attempt = session.assignment.attempt
        self._first_batch: Batch | None = None
        self._skips = SkipLog(self.run_folder, self.recipe.data.on_error, session.first_step, attempt)
        self._may_skip = self.recipe.data.on_error != "stop" or bool(session.dataset.left_out)
        # At work on, from 1 as in the metrics; None: not yet.
        self.step: int | None = None

    def run(self) -> None:
        """Train to the end.

        Raises:
            PreemptedRun: stopped when asked, behind a committed checkpoint.
            TrainingError: non-finite loss or gradient, or a checkpoint that could not be written.
        """
        session = self.session
        if comm.rank() == 0:
            session.reporter.note(self._length())
        batches = session.batches()
        try:
            for step in range(session.first_step, session.last_step):
                started = time.monotonic()
                self.step = step + 1
                self._heart.enter("first_step" if step == session.first_step else "step", step + 1)
                facts = self._step(step, batches)
                self._log(step + 1, facts, time.monotonic() - started, batches)
                self._clock.stop()
                if facts.checkpoint_failed():
                    session.saver.finish()  # raises, on every rank
                last = step + 1 == session.last_step
                stop = facts.stop_asked() and not last
                every = self.recipe.train.checkpoint.every_steps
                if last or stop or (every is not None and (step + 1) % every == 0):
                    self._checkpoint(step + 1, wait=last or stop, evaluate=not stop)
                if stop:
                    comm.barrier()
                    raise PreemptedRun(
                        f"stopped at step {step + 1} behind a committed checkpoint; the same command goes on"
                    )
        finally:
            batches.close()
            if self._monitor is not None:
                self._monitor.close()
            if self._ledger is not None:
                self._ledger.close()

    def _length(self) -> str:
        """Return the remaining steps, samples and epochs, as text."""
        batch, size = self.recipe.train.global_batch, self.session.dataset.epoch_size
        left = self.session.last_step - self.session.first_step
        epochs = left / steps_per_epoch(size, batch)
        return f"{counted(left, 'step')} of {batch:,} {self._kind}: {epochs:.3g} epochs of {size:,}"

    def catch_up(self) -> None:
        """Evaluate the checkpoint that this attempt resumes from, if a kill came between its commit and its results."""
        resume, step = self.session.assignment.resume, self.session.first_step
        if resume is None or not self._evaluates(step):
            return
        checkpoint = open_checkpoint(resume)
        if not comm.from_first(evaluated_already(self._evaluator_of_run(), self.run_folder, checkpoint)):
            self._evaluate(checkpoint)

    def _step(self, step: int, batches: Iterator[tuple[MicroBatch, Batch]]) -> StepFacts:
        """Run one optimizer step: its micro-steps, the check that all is finite, the update."""
        session, train = self.session, self.recipe.train
        facts = StepFacts(lr=session.lr_at(step))
        for group, settings in zip(session.engine.optimizer.param_groups, session.groups, strict=True):
            group["lr"] = facts.lr * settings.lr_multiplier
        for micro, (part, batch, known) in enumerate(self._micro_batches(batches, facts)):
            if self._monitor is not None and step == session.first_step and micro == 0:
                self._first_batch = batch
            self._clock.start()
            # Nothing of a generator's state needs saving: randomness inside the model starts here, every time.
            torch.manual_seed(seed_of("model", train.seed, step, micro, comm.rank()))
            short = part.micro_count < train.global_batch // train.accumulation
            with self._batchnorm(short):
                self._micro_step(part, batch.to(session.device), known, facts)
            if micro + 1 == train.accumulation:
                self._check_finite(step + 1, facts)
                if self._may_skip and facts.any_skipped():
                    self._skips.record(step + 1, facts.skipped)
                if train.zero_stage == 0:
                    # DeepSpeed measures the norm itself from ZeRO-1 on.
                    gradients = [p.grad for p in session.state.names if p.grad is not None]
                    facts.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            session.engine.step()
        if train.zero_stage > 0:
            facts.grad_norm = float(session.engine.get_global_grad_norm())
        # BatchNorm that is not synchronised (norm: bn) follows rank 0, as under DDP.
        comm.broadcast(self._loose_statistics)
        if session.state.ema is not None:
            session.state.ema.update(step)
        return facts

    def _micro_batches(
        self, batches: Iterator[tuple[MicroBatch, Batch]], facts: StepFacts
    ) -> Iterator[tuple[MicroBatch, Batch, Counts]]:
        """Yield a step's micro-batches, and the counts over the step and all ranks that depend on the targets alone.

        Where there are any, all are read before the first is used. A single micro-step's are known from its losses.
        """
        accumulation = self.recipe.train.accumulation
        read = deque([self._read(batches, facts)])
        known: Counts = {}
        if accumulation > 1 and self._counts(read[0][1]):
            read.extend(self._read(batches, facts) for _ in range(accumulation - 1))
            known = self._counts_of_step([batch for _, batch in read])
        for _ in range(accumulation):
            part, batch = read.popleft() if read else self._read(batches, facts)
            yield part, batch, known

    def _read(self, batches: Iterator[tuple[MicroBatch, Batch]], facts: StepFacts) -> tuple[MicroBatch, Batch]:
        asked = time.monotonic()
        self._clock.start()
        part, batch = next(batches)
        facts.data_wait += time.monotonic() - asked
        self._write_ledger(part)
        return part, batch

    def _counts(self, batch: Batch) -> Counts:
        counts: Counts = self.session.engine.module.counts(batch.targets, batch.weights)
        return counts

    def _counts_of_step(self, batches: Sequence[Batch]) -> Counts:
        """Return the counts of a step from all ranks' batches. Collective."""
        parts = [self._counts(batch) for batch in batches]
        # In float64 sums of pixels are exact, in whatever order they are added up.
        sums = torch.stack([torch.stack([part[name].double() for part in parts]).sum() for name in parts[0]])
        return dict(zip(parts[0], comm.sum_tensor(sums.to(self.session.device)), strict=True))

    def _batchnorm(self, short: bool) -> AbstractContextManager[Any]:
        """Return a context in which BatchNorm uses its running statistics if the micro-step is short, at every world
        size: filler batches of some ranks must not enter the statistics."""
        return frozen_batchnorm(self.session.engine.module) if short else nullcontext()

    def _micro_step(self, part: MicroBatch, batch: Batch, known: Counts, facts: StepFacts) -> None:
        """Run forward, loss over the ranks' common normaliser, and backward.

        Args:
            known: counts of losses over the whole step, of which this is a part.
        """
        engine, train = self.session.engine, self.recipe.train
        images = batch.images.to(torch.bfloat16) if train.precision == "bf16_params" else batch.images
        losses: Losses = engine(images, batch.sizes, batch.targets, batch.weights)
        names = sorted(losses)
        totals = torch.stack([losses[name].total.float() for name in names])
        counts = torch.stack([losses[name].count.float() for name in names]).to(totals.device)
        own = [0.0] * comm.world()
        own[comm.rank()] = self._clock.meet()
        # Samples count alike in a short step, whose micro-steps are not equally full.
        share = train.accumulation * part.micro_count / part.step_count
        weights = [float(train.accumulation) if name in known else share for name in names]
        news = [*own, len(batch.skipped), self.session.saver.failed(), self.stop()]
        # In one copy to the device, for which the host waits.
        numbers = torch.tensor([*weights, *news], dtype=torch.float32, device=totals.device)
        local = torch.cat([totals.detach(), counts, numbers[len(names) :]])
        reduced = comm.sum_tensor(local.clone())
        counted = zip(names, reduced[len(names) : 2 * len(names)], strict=True)
        normaliser = torch.stack([known.get(name, count).float() for name, count in counted]).clamp(min=1.0)
        # DeepSpeed averages gradients over ranks and micro-steps; the sum over ranks is meant, hence the world.
        engine.backward((totals / normaliser * numbers[: len(names)]).sum() * comm.world())
        facts.names = names
        facts.local.append(local)
        facts.reduced.append(reduced)
        facts.normalisers.append(normaliser)
        facts.weights.append(weights)
        facts.entries.append(part.entries)
        facts.skipped += batch.skipped
        facts.samples, facts.epoch = part.step_count, part.epoch

    def _check_finite(self, step: int, facts: StepFacts) -> None:
        """Stop before the update when a loss is not finite, naming the samples."""
        width = len(facts.names)
        if torch.stack(facts.reduced)[:, :width].isfinite().all():
            return
        bad = [micro for micro, row in enumerate(facts.local) if not row[:width].isfinite().all()]
        # What was left out is empty and weighs nothing: it is another entry's doing.
        empty = {skipped.entry for skipped in facts.skipped}
        mine = [entry for micro in bad for entry in facts.entries[micro] if entry not in empty]
        entries = [Entry(*entry) for part in comm.gather(mine) for entry in part]
        names = [name for name, value in facts.losses().items() if not math.isfinite(value)]
        self._record_non_finite(step, names, entries)
        key = self.session.dataset.reader.key
        samples = ", ".join(key(entry.sample) for entry in entries[:16])
        raise TrainingError(
            f"step {step}: loss {', '.join(names)} is not finite; samples: {samples or 'none alone'}; "
            f"{remedy(self.run_folder, self.recipe)}",
            cause="non_finite",
            step=step,
        )

    def _record_non_finite(self, step: int, names: list[str], entries: list[Entry]) -> None:
        """Note the non-finite entries in RUN/non_finite.jsonl, or all of the step where none is identified.
        Collective."""
        if comm.rank() == 0:
            key = self.session.dataset.reader.key
            found = [(entry, key(entry.sample)) for entry in entries or self.session.entries_of(step)]
            attempt = self.session.assignment.attempt
            try:
                record_non_finite(self.run_folder, attempt=attempt, step=step, losses=names, entries=found)
            except OSError:  # the loss matters more than its record
                logging.getLogger("vitgraft").exception("step %d: not recorded", step)
        comm.barrier()  # whoever ends first has the others ended

    def _log(self, step: int, facts: StepFacts, seconds: float, batches: TrainBatches) -> None:
        session = self.session
        losses = facts.losses()
        if not math.isfinite(facts.grad_norm):
            self._record_non_finite(step, ["gradient"], [])
            raise TrainingError(
                f"step {step}: the gradient's norm is {facts.grad_norm} though the loss is finite; "
                f"{remedy(self.run_folder, self.recipe)}",
                cause="non_finite",
                step=step,
            )
        stall, self._stall = self._stall, 0.0
        if self._monitor is None:
            return
        by_rank = facts.own_seconds()
        self._heart.own_seconds(by_rank)
        loss, own = math.fsum(losses.values()), spread(by_rank)
        row = StepRow(
            step=step,
            steps=session.last_step,
            samples=session.samples_at(step),
            epoch=facts.epoch,
            loss=loss,
            losses=losses,
            lr=facts.lr,
            grad_norm=facts.grad_norm,
            seconds=seconds,
            images_per_second=facts.samples / seconds,
            mfu=None if self._arithmetic is None else self._arithmetic.utilisation(facts.samples, seconds),
            own_s_median=own.median,
            own_s_max=own.slowest,
            slowest_rank=own.slowest_rank,
            data_wait_s=facts.data_wait,
            checkpoint_stall_s=stall,
            memory=peak_memory(session.device),
            loader_memory=batches.memory(),
            attempt=session.assignment.attempt,
        )
        rates = [group["lr"] for group in session.engine.optimizer.param_groups]
        self._monitor.step(row, by_rank, rates)
        if self._first_batch is not None:
            batch, self._first_batch = self._first_batch, None
            self._monitor.start(session.groups, draw_batch(batch, self.recipe, session.facts.classes))
        session.reporter.progress(
            "train", step, session.last_step, loss=loss, lr=facts.lr, **{f"{self._kind}/s": row.images_per_second}
        )
        if (line := self._forecast.step(seconds, facts.samples)) is not None:
            session.reporter.note(line)

    def _checkpoint(self, step: int, *, wait: bool, evaluate: bool) -> None:
        session = self.session
        self._heart.enter("save", step)
        started = time.monotonic()
        session.saver.begin(step, session.samples_at(step), session.data_state(step))
        due = evaluate and self._evaluates(step)
        # Training goes on at once, unless the checkpoint is to be read or relied on now.
        checkpoint = session.saver.finish() if due or wait else None
        self._stall = time.monotonic() - started
        if due and checkpoint is not None:
            self._evaluate(checkpoint)
        session.saver.tidy()

    def _evaluates(self, step: int) -> bool:
        """Tell whether the ranks evaluate this step's checkpoint, which a separate evaluator would do otherwise."""
        return self.recipe.evaluator is None and evaluation_due(self.recipe, step, self.session.last_step)

    def _evaluate(self, checkpoint: Checkpoint) -> None:
        session, evaluator = self.session, self._evaluator_of_run()
        self._heart.enter("evaluate", checkpoint.step)

        def progress(done: int, total: int) -> None:
            if comm.rank() == 0:
                session.reporter.progress("evaluate", done, total)

        evaluation = evaluate_into_run(evaluator, self.run_folder, checkpoint, progress)
        if evaluation is not None and self._monitor is not None:
            folder = result_path(self.run_folder, checkpoint.step).with_suffix("")
            self._monitor.evaluation(evaluation, folder, evaluator.classes)
            session.reporter.note(headline(evaluator, evaluation, checkpoint))
            if (missing := missing_best(evaluator, evaluation)) is not None:
                session.reporter.note(missing)

    def _evaluator_of_run(self) -> Evaluator:
        """Return the evaluator, created when first needed, as it holds a second model."""
        if self._evaluator is None:
            assert self.recipe.data.val is not None
            classes, data = self.session.facts.classes, self.recipe.data.val.path
            loss = self.recipe.evaluate.loss
            self._evaluator = Evaluator(self.recipe, classes, data, self.session.device, loss)
        return self._evaluator

    def _count_arithmetic(self) -> Arithmetic | None:
        session = self.session
        trained = {name for name, parameter in session.engine.module.named_parameters() if parameter.requires_grad}
        try:
            return arithmetic_of(self.recipe, len(session.facts.classes), trained, session.device, comm.world())
        except RuntimeError as error:
            session.reporter.note(f"no MFU curve: the model's FLOPs cannot be counted: {str(error).splitlines()[0]}")
            return None

    def _open_ledger(self) -> Any:
        if not self.recipe.train.ledger:
            return None
        folder = self.run_folder / "ledger"
        folder.mkdir(exist_ok=True)
        name = f"attempt-{self.session.assignment.attempt:04d}.rank-{comm.rank():05d}.jsonl"
        return (folder / name).open("w", encoding="utf-8")

    def _write_ledger(self, part: MicroBatch) -> None:
        if self._ledger is not None and part.entries:
            entries = [[entry.epoch, entry.sample, entry.repetition] for entry in part.entries]
            row = {"step": part.step + 1, "micro": part.micro, "rank": comm.rank(), "entries": entries}
            self._ledger.write(json.dumps(row) + "\n")
            self._ledger.flush()
