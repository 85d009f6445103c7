"""Learning-rate schedules as pure functions of samples, so that the world size cannot change them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

from vitgraft.configs.schema.train import CosineSchedule, PolySchedule, ScheduleConfig, TrainConfig
from vitgraft.data_shards.plan import steps_per_epoch


def lr_factor(schedule: ScheduleConfig, samples: int, total: int) -> float:
    """Return the factor on the learning rate for the step that starts after ``samples`` of ``total`` samples.

    During the warm-up share it rises linearly; then it follows the schedule over the rest of the run. A step counts the
    samples that end it in its warm-up (``samples`` + 1 at least), so that the first step is never wasted at rate zero.
    """
    warmup = schedule.warmup * total
    if samples < warmup:
        return (samples + 1) / (warmup + 1)
    if isinstance(schedule, CosineSchedule | PolySchedule):
        progress = (samples - warmup) / max(total - warmup, 1)
        if isinstance(schedule, CosineSchedule):
            return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return float((1 - progress) ** schedule.power)
    return float(schedule.gamma ** sum(samples >= milestone * total for milestone in schedule.milestones))


def stage_ends(train: TrainConfig, epoch_size: int) -> list[int]:
    """Return the number of steps at the end of each stage; the last is the run's end.

    Args:
        epoch_size: entries of an epoch.
    """
    unit = 1 if train.epochs is None else steps_per_epoch(epoch_size, train.global_batch)
    return [unit * length for length in accumulate(train.stage_lengths())]


def learning_rate(train: TrainConfig, ends: list[int], step: int, samples_at: Callable[[int], int]) -> float:
    """Return the rate of the step that starts after ``step`` steps, for parameters whose multiplier is one.

    It depends on the stages up to its own alone, so that a stage which is added changes nothing of those before it.

    Args:
        ends: as :func:`stage_ends` gives them.
        samples_at: samples that are consumed after so many steps.
    """
    number = min(bisect_right(ends, step), len(ends) - 1)
    while number > 0 and train.extend[number - 1].schedule is None:
        number -= 1
    if number == 0:
        start, lr, schedule = 0, train.optimizer.lr, train.schedule
    else:
        stage = train.extend[number - 1]
        assert stage.schedule is not None
        start, lr, schedule = ends[number - 1], stage.lr or train.optimizer.lr, stage.schedule
    if step >= ends[number]:
        return lr * schedule.ends_at
    before = samples_at(start)
    return lr * lr_factor(schedule, samples_at(step) - before, samples_at(ends[number]) - before)
