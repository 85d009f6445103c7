"""How long a run will take is said once, from its first steps but the very first."""

from __future__ import annotations

from vitgraft.trainer.forecast import Forecast


def lines(forecast: Forecast, seconds: list[float], samples: int = 16) -> list[str | None]:
    return [forecast.step(each, samples) for each in seconds]


def test_long_steps_tell_after_three() -> None:
    said = lines(Forecast(1204, "images", None), [90.0, 10.0, 11.0, 10.0, 10.0])
    assert said == [
        None,
        None,
        None,
        "about 3 h 20 min for the 1,200 steps that are left, at 10 s (1.6 images/s)",
        None,
    ]


def test_short_steps_are_measured_for_a_while_and_a_slow_one_does_not_mislead() -> None:
    said = lines(Forecast(1000, "clips", "evaluations"), [5.0, *[0.6] * 9, 4.0, *[0.6] * 20])
    (line,) = (text for text in said if text is not None)
    assert said.index(line) == 12
    assert line == "about 9 min for the 987 steps that are left, at 0.6 s (26.7 clips/s); evaluations come on top"
    assert [text is not None for text in lines(Forecast(2000, "images", None), [0.01] * 102)].index(True) == 100


def test_a_run_that_is_nearly_over_tells_nothing() -> None:
    assert lines(Forecast(4, "images", None), [20.0] * 4) == [None] * 4
    assert lines(Forecast(150, "images", None), [0.1] * 150) == [None] * 150
    assert lines(Forecast(3, "images", None), [0.1] * 3) == [None] * 3
