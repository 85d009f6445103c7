"""A rank's signs of life: which phase it is in, at which step, since when, and how long phases have taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Literal

from vitgraft.trainer.report import Reporter

Phase = Literal["start", "first_step", "step", "save", "evaluate"]
BEAT_S = 1.0
ROWS = 20
"""Rows of own seconds that one sign of life carries at most."""


class Heart:
    """Beats in a thread of its own, so that a rank that waits for others beats and one that is stopped does not.

    What the loop tells it costs the loop no more than an assignment under a lock; everything is sent by the thread.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()
        self._phase: Phase = "start"
        self._step = 0
        self._since = time.monotonic()
        self._longest: dict[str, float] = {}
        self._own: list[list[float]] = []
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def enter(self, phase: Phase, step: int) -> None:
        """A phase begins, and the one before it is over.

        Args:
            step: the one that is computed, saved or evaluated, from 1 as in the metrics.
        """
        now = time.monotonic()
        with self._lock:
            before, taken = self._phase, now - self._since
            self._longest[before] = max(taken, self._longest.get(before, 0.0))
            self._phase, self._step, self._since = phase, step, now

    def own_seconds(self, row: Sequence[float]) -> None:
        """What each rank took for a step without waiting for others, by rank; from rank 0 alone."""
        with self._lock:
            self._own = [*self._own[1 - ROWS :], [round(value, 6) for value in row]]

    def message(self) -> dict[str, object]:
        """What is sent, once: phases that are over are told of only in the next sign of life."""
        with self._lock:
            longest, self._longest = self._longest, {}
            own, self._own = self._own, []
            return {
                "phase": self._phase,
                "step": self._step,
                "age": round(time.monotonic() - self._since, 3),
                "longest": longest,
                "own": own,
            }

    def _beat(self) -> None:
        while True:
            self._reporter.state(self.message())
            time.sleep(BEAT_S)
