"""Learning-rate schedules as pure functions of samples, so that the world size cannot change them."""

from __future__ import annotations

import math

from vitgraft.configs.schema.train import CosineSchedule, PolySchedule, ScheduleConfig


def lr_factor(schedule: ScheduleConfig, samples: int, total: int) -> float:
    """The factor on the learning rate for the step that starts after ``samples`` of ``total`` samples.

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
