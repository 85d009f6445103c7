"""How long a phase may take, learned from the run, and who holds the others up. Pure.

A gang works in lockstep: when one rank stands still all do, and when one is slow all are. So a hang is a gang in which
every rank has overstayed its phase, and the rank to blame is the one that is silent or furthest behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low, quantiles

from vitgraft.launch.observations import Hang, Phase, RankState, Straggler

UNLEARNED_S: dict[Phase, float] = {
    "start": 1800.0,
    "first_step": 1800.0,
    "step": 1800.0,
    "save": 3600.0,
    "evaluate": 7200.0,
}
"""Limits until enough has been seen."""
FLOOR_S: dict[Phase, float] = {**dict.fromkeys(UNLEARNED_S, 300.0), "save": 1800.0}
"""No learned limit is shorter: a busy disk, or a store that answers late, must not look like a hang. What saves teach
is how long a copy into memory takes; the last one, and any that the disk has not kept up with, waits for the disk."""
FACTOR = 5.0
"""Times what is usual (NVIDIA's resiliency extension uses the same factor)."""
ENOUGH = 8
WINDOW = 256
SILENCE_S = 15.0
"""A rank that gives no sign of life for so long is stopped or gone; a beat is due every few seconds."""
STOPPED_S = 60.0
"""A rank that gives none for so long stands still, whatever its phase may take."""
START_SILENT_S = 120.0
"""The same while it starts: libraries that are loaded from a cold file system let no other thread say anything."""
SLOW_FACTOR = 1.5
SLOW_SHARE = 0.8
SLOW_STEPS = 20
SLOW_LEAST_S = 0.01
_ORDER: tuple[Phase, ...] = ("start", "first_step", "step", "save", "evaluate")


def deadline(phase: Phase, durations: Sequence[float], fixed: float | None = None) -> float:
    """Seconds that a phase may take.

    Args:
        durations: how long it took so far in this run, oldest first; the last ``WINDOW`` count.
        fixed: the recipe's own limit, which holds as it is.
    """
    if fixed is not None:
        return fixed
    recent = durations[-WINDOW:]
    if len(recent) < ENOUGH:
        # What has been seen, however little, must not be a hang when it comes again.
        return max(UNLEARNED_S[phase], FACTOR * max(recent, default=0.0))
    # Nine out of ten were shorter, and what was as long twice may come again: one outlier moves nothing.
    usual = quantiles(recent, n=10, method="inclusive")[-1]
    return max(FLOOR_S[phase], FACTOR * usual, 2 * sorted(recent)[-2])


@dataclass
class Deadlines:
    """How long phases may take in a run: the recipe's own limits, or what is learned.

    ``silence``: seconds without a sign of life after which a rank stands still.
    """

    fixed: Mapping[Phase, float | None] = field(default_factory=dict)
    silence: float = STOPPED_S
    _durations: dict[Phase, list[float]] = field(default_factory=dict)

    def learn(self, phase: Phase, seconds: float) -> None:
        """A phase took so long."""
        durations = self._durations.setdefault(phase, [])
        durations.append(seconds)
        del durations[:-WINDOW]

    def forget(self) -> None:
        """What was learned holds no longer: the world is another one, and a rank's share of each batch with it."""
        self._durations.clear()

    def limits(self) -> dict[Phase, float]:
        """How long each phase may take now."""
        return {phase: deadline(phase, self._durations.get(phase, ()), self.fixed.get(phase)) for phase in UNLEARNED_S}


def find_hang(
    ranks: Collection[RankState], limits: Mapping[Phase, float], now: float, stopped: float = STOPPED_S
) -> Hang | None:
    """Whether the gang stands still; ``None``: it does not.

    Args:
        stopped: seconds without a sign of life after which a rank stands still, whatever its phase may take; one that
            starts has ``START_SILENT_S`` at least.
    """
    if not ranks:
        return None
    for rank in sorted(ranks, key=lambda rank: (rank.heard, rank.rank)):
        patience = max(stopped, START_SILENT_S) if rank.phase == "start" else stopped
        if now - rank.heard > patience:
            return _hang(rank, rank, now, now - rank.heard, patience)
    blamed = _blamed(ranks, now, min(SILENCE_S, stopped))
    if any(now - rank.since <= limits[rank.phase] for rank in ranks):
        return None
    # Without one to blame, the last whose limit was over tells since when.
    shown = blamed or min(ranks, key=lambda rank: now - rank.since - limits[rank.phase])
    return _hang(shown, blamed, now, now - shown.since, limits[shown.phase])


def _hang(shown: RankState, blamed: RankState | None, now: float, seconds: float, limit: float) -> Hang:
    rank, host = (None, None) if blamed is None else (blamed.rank, blamed.host)
    return Hang(now, shown.phase, shown.step, seconds, limit, rank, host)


def _blamed(ranks: Collection[RankState], now: float, silence: float) -> RankState | None:
    """The silent one, else the one furthest behind; ``None``: several alike."""
    silent = [rank for rank in ranks if now - rank.heard > silence]
    if silent:
        return min(silent, key=lambda rank: (rank.heard, rank.rank))
    behind = sorted(ranks, key=_progress)
    if len(behind) > 1 and _progress(behind[0]) == _progress(behind[1]):
        return None
    return behind[0]


def _progress(rank: RankState) -> tuple[int, int]:
    return rank.step, _ORDER.index(rank.phase)


def find_stragglers(steps: Sequence[Sequence[float]]) -> list[Straggler]:
    """Ranks that are persistently slower than the others, the slowest first.

    Args:
        steps: own seconds of each rank, by rank, in each of the last steps, oldest first; ``SLOW_STEPS`` of them count,
            and with fewer nobody is named.
    """
    recent = steps[-SLOW_STEPS:]
    # Fewer, or of another world: wait.
    if len(recent) < SLOW_STEPS or len(recent[-1]) < 2 or len({len(row) for row in recent}) > 1:
        return []
    found = []
    for rank in range(len(recent[-1])):
        late = sum(_is_late(row, rank) for row in recent)
        if late >= SLOW_SHARE * len(recent):
            own = median_low([row[rank] for row in recent])
            usual = median_low([median_low(row) for row in recent])
            found.append(Straggler(rank, own / usual if usual > 0 else float("inf"), own))
    return sorted(found, key=lambda straggler: (-straggler.ratio, straggler.rank))


def _is_late(row: Sequence[float], rank: int) -> bool:
    # The lower median: of two ranks the slow one is late, and half of a gang can be.
    usual = median_low(row)
    return row[rank] > SLOW_FACTOR * usual and row[rank] - usual > SLOW_LEAST_S
