"""State and end of a run, from its events alone. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from vitgraft.configs.errors import InterruptedRun, PreemptedRun
from vitgraft.trainer.monitor_files import moment, whole

State = Literal["running", "finished", "stopped", "failed", "dead"]
_STOPS = (PreemptedRun.exit_code, InterruptedRun.exit_code)


@dataclass(frozen=True)
class RunEnd:
    """End of a run. ``when``: seconds since 1970. ``over``: the command ended with this code, not only an attempt,
    which another may follow. ``restarting``: a restart was announced. ``attempt``: the one that ended."""

    code: int
    reason: str | None
    when: float
    over: bool
    restarting: bool = False
    attempt: int = 0


def run_end(events: Iterable[dict[str, Any]]) -> RunEnd | None:
    """Return the end of a run since its last start; ``None``: its events report none.

    Invalid events are skipped, and so are those of an attempt that a newer one has replaced.
    """
    end: RunEnd | None = None
    newest = 0
    for event in events:
        name, attempt = event.get("event"), event.get("attempt")
        if isinstance(attempt, int) and attempt < newest:
            continue
        if name == "start":
            end, newest = None, attempt if isinstance(attempt, int) else newest
        elif name == "restart" and end is not None:
            end = replace(end, restarting=True)
        elif name in ("end", "give_up"):
            try:
                code, when = whole(event["code"]), moment(event["time"])
            except (KeyError, TypeError, ValueError):
                continue
            reason = event.get("reason", event.get("text"))
            # A failure of an attempt has a kind; what ends the command for another reason has none.
            over = name == "give_up" or code in (0, *_STOPS) or "kind" not in event
            text = reason if isinstance(reason, str) else end.reason if end else None
            end = RunEnd(code, text, when, over, attempt=attempt if isinstance(attempt, int) else newest)
    return end


def judge(
    end: RunEnd | None, started: bool, held: bool | None, claimed: float, attempt: int = 0
) -> tuple[State, str | None, int | None]:
    """Return state, its reason and the exit code.

    Args:
        started: whether it ever was.
        held: whether a process owns the run; ``None``: that cannot be told from here.
        claimed: when the lock was taken last (seconds since 1970).
        attempt: the newest that took the run: it tells a new start from the old end, too, where a clock was put back.
    """
    if end is not None and not (held and (claimed > end.when or attempt > end.attempt)):
        if not end.over:
            # The supervisor that saw this end pauses, connects to the hosts again or examines them.
            if held:
                return "running", "starting again", None
            if held is None and end.restarting:
                return "running", "starting again, as far as its files tell: it is owned from another host", None
        return "finished" if end.code == 0 else "stopped" if end.code in _STOPS else "failed", end.reason, end.code
    if held is None:
        return "running", "as far as its files tell: it is owned by a process on another host", None
    if held:
        return "running", None if started and end is None else "starting", None
    return "dead", "nobody owns the run, though no end of it is recorded; the same command goes on", None
