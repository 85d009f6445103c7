"""Learning-rate schedules: end points, closed formulas, and nothing but samples in them."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraft.configs.schema.train import CosineSchedule, PolySchedule, ScheduleConfig, StepSchedule, TrainConfig
from vitgraft.data_shards.plan import samples_before
from vitgraft.trainer.schedule import learning_rate, lr_factor, stage_ends

TOTAL = 1000
SCHEDULES: list[Any] = [
    CosineSchedule(warmup=0.1, final=0.2),
    PolySchedule(warmup=0.1, power=0.9),
    StepSchedule(warmup=0.1, milestones=[0.5, 0.8], gamma=0.1),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_the_warm_up_rises_linearly_from_above_zero_to_one(schedule: ScheduleConfig) -> None:
    rising = [lr_factor(schedule, samples, TOTAL) for samples in range(101)]
    assert 0 < rising[0] < 0.02
    assert rising[100] == pytest.approx(1.0)
    steps = [after - before for before, after in pairwise(rising)]
    assert min(steps) == pytest.approx(max(steps))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_after_the_warm_up_it_never_rises(schedule: ScheduleConfig) -> None:
    falling = [lr_factor(schedule, samples, TOTAL) for samples in range(100, TOTAL + 1)]
    assert all(after <= before for before, after in pairwise(falling))


def test_cosine_end_points_and_middle() -> None:
    schedule = CosineSchedule(warmup=0.1, final=0.2)
    assert lr_factor(schedule, 100, TOTAL) == pytest.approx(1.0)
    assert lr_factor(schedule, 550, TOTAL) == pytest.approx(0.6)
    assert lr_factor(schedule, 325, TOTAL) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert lr_factor(schedule, TOTAL, TOTAL) == pytest.approx(0.2)


def test_poly_end_points_and_middle() -> None:
    assert lr_factor(PolySchedule(warmup=0.0, power=0.9), 0, TOTAL) == 1.0
    assert lr_factor(PolySchedule(warmup=0.0, power=0.9), 250, TOTAL) == pytest.approx(0.75**0.9)
    assert lr_factor(PolySchedule(warmup=0.2, power=2.0), 600, TOTAL) == pytest.approx(0.25)
    assert lr_factor(PolySchedule(warmup=0.2), TOTAL, TOTAL) == 0.0


def test_step_falls_at_its_milestones_exactly() -> None:
    schedule = StepSchedule(warmup=0.0, milestones=[0.5, 0.8], gamma=0.1)
    places = (0, 499, 500, 799, 800, 1000)
    assert [lr_factor(schedule, samples, TOTAL) for samples in places] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warm_up_and_nothing_else(warmup: float) -> None:
    factors = [lr_factor(CosineSchedule(warmup=warmup), samples, 10) for samples in range(10)]
    assert factors == sorted(factors, reverse=warmup == 0.0)
    assert lr_factor(CosineSchedule(warmup=0.0), 0, 10) == 1.0


@given(
    st.sampled_from(SCHEDULES), st.integers(1, 5000), st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.data()
)
def test_every_step_of_any_run_has_a_factor_from_zero_to_one(
    schedule: Any, epoch_size: int, global_batch: int, warmup: float, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(1, 500))
    total = samples_before(steps, epoch_size, global_batch)
    step = data.draw(st.integers(0, steps - 1))
    changed = schedule.model_copy(update={"warmup": warmup})
    assert 0 < lr_factor(changed, samples_before(step, epoch_size, global_batch), total) <= 1


def test_nothing_but_samples_is_asked_for() -> None:
    assert list(inspect.signature(lr_factor).parameters) == ["schedule", "samples", "total"]
    # Half the batch, twice the steps: the same rate after the same samples.
    large = [lr_factor(SCHEDULES[0], samples_before(step, 960, 32), 9600) for step in range(300)]
    small = [lr_factor(SCHEDULES[0], samples_before(step, 960, 16), 9600) for step in range(600)]
    assert small[::2] == large


def train_of(**settings: Any) -> TrainConfig:
    tree = {"steps": 60, "global_batch": 4, "optimizer": {"name": "sgd", "lr": 0.3}, **settings}
    return TrainConfig.model_validate(tree)


def rates(train: TrainConfig) -> list[float]:
    """Of all steps, of epochs of 22 entries."""
    ends = stage_ends(train, 22)
    return [learning_rate(train, ends, step, lambda n: samples_before(n, 22, 4)) for step in range(ends[-1])]


def test_the_end_of_a_schedule_is_what_it_says() -> None:
    for schedule in (*SCHEDULES, CosineSchedule(final=1.0), StepSchedule(milestones=[])):
        assert lr_factor(schedule, TOTAL, TOTAL) == schedule.ends_at


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_a_stage_that_is_added_changes_no_step_before_it(schedule: Any) -> None:
    tree = schedule.model_dump()
    stages = [{"steps": 20, "schedule": {"name": "cosine", "final": 0.5}, "lr": 0.7}, {"steps": 5}, {"steps": 9}]
    whole = rates(train_of(schedule=tree, extend=stages))
    assert len(whole) == 94
    for count in range(3):
        assert whole[: 60 + sum([20, 5][:count])] == rates(train_of(schedule=tree, extend=stages[:count]))
    assert whole[80:] == [0.35] * 14


def test_without_decay_a_longer_run_and_an_extended_one_have_the_same_rates() -> None:
    for schedule in ({"name": "cosine", "warmup": 0.0, "final": 1.0}, {"name": "step", "warmup": 0.0, "gamma": 1.0}):
        assert rates(train_of(schedule=schedule, extend=[{"steps": 30}])) == rates(
            train_of(schedule=schedule, steps=90)
        )


def test_a_stage_of_epochs_is_counted_in_their_steps() -> None:
    train = train_of(steps=None, epochs=3, schedule={"name": "cosine", "final": 0.1}, extend=[{"epochs": 2}])
    assert stage_ends(train, 22) == [18, 30]
    assert rates(train)[18:] == [0.3 * 0.1] * 12
