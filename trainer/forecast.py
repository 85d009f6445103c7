"""Estimate of a run's duration from its first steps."""

from __future__ import annotations

from statistics import median

from vitgraft.configs.units import counted, duration

MEASURED_STEPS = 3
MEASURED_S, ENOUGH_STEPS = 10.0, 100
"""So long is measured, or so many steps where they are short."""


class Forecast:
    """Reports once the estimated duration of the remaining steps.

    Args:
        steps: that are left.
        kind: of samples, e.g. ``images``.
        on_top: what the time does not include, ``None``: nothing.
    """

    def __init__(self, steps: int, kind: str, on_top: str | None) -> None:
        self._left, self._kind, self._on_top = steps, kind, on_top
        self._seconds: list[float] = []
        self._told = False

    def step(self, seconds: float, samples: int) -> str | None:
        """Add the duration and samples of a step; return the line with the estimate once it is known, else ``None``."""
        self._left -= 1
        if self._told:
            return None
        self._seconds.append(seconds)
        # What is made once is made in the first step.
        measured = self._seconds[1:]
        if len(measured) < MEASURED_STEPS or (sum(measured) < MEASURED_S and len(measured) < ENOUGH_STEPS):
            return None
        self._told = True
        each = median(measured)
        if self._left * each < MEASURED_S:  # nearly over
            return None
        top = "" if self._on_top is None else f"; {self._on_top} come on top"
        return (
            f"about {duration(self._left * each)} for the {counted(self._left, 'step')} that are left, at {each:.3g} s "
            f"({samples / each:.3g} {self._kind}/s){top}"
        )
