"""State of a run from the files of its directory alone: ``vitgraft status``.

Nothing here writes, locks or imports anything heavy: a run may be looked at as often as one likes, from any host that
sees its directory.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.files import MAX_SMALL_BYTES, check_reachable, read_json, read_text
from vitgraft.launch.ownership import ownership
from vitgraft.launch.run_state import State, judge, run_end
from vitgraft.trainer.monitor_files import MAX_WHOLE, Attempt, attempts, moment, read_rows

TAIL_BYTES = 1 << 18
"""Bytes read from the end of metrics.jsonl: some hundred rows."""
SHOWN_EVENTS = 5
# Supervisors and agents have one for all attempts: the last part of an address as a host's name is no attempt.
_LOG = re.compile(r"(?!agent\.|supervisor\.)([a-z]+)(?:-[0-9]+)?\.(.+)\.([0-9]+)\.log")


@dataclass(frozen=True)
class Role:
    """The processes of one role on one host, as the logs of the attempt name them."""

    role: str
    host: str
    processes: int


@dataclass(frozen=True)
class Pace:
    """Speed of the last steps of an attempt. Shares are of the steps' time; ``slowest_share``: share of the steps in
    which ``slowest_rank``, the most frequently slowest rank, was the slowest."""

    seconds_per_step: float | None
    images_per_second: float | None
    data_wait_share: float | None
    checkpoint_stall_share: float | None
    own_s_median: float | None
    own_s_max: float | None
    slowest_rank: int | None
    slowest_share: float | None


@dataclass(frozen=True)
class Status:
    """A run at one moment; ``None``: not known (yet). Ages and the time that is left are in seconds.

    ``state``: ``dead`` is a run without a recorded end that no process owns. ``row_age_s``: since the last
    optimizer step was written. ``restarts``: starts after the first; ``role_restarts``: of roles within this attempt.
    """

    run: str
    name: str | None
    state: State
    reason: str | None
    exit_code: int | None
    attempt: int
    restarts: int
    role_restarts: int
    owner: str | None
    device: str | None
    world: int | None
    step: int
    steps: int | None
    epoch: int | None
    epochs: int | None
    samples: int | None
    eta_s: float | None
    row_age_s: float | None
    loss: float | None
    lr: float | None
    grad_norm: float | None
    mfu: float | None
    memory: int | None
    pace: Pace
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    evaluation_step: int | None
    evaluation: dict[str, float]
    roles: list[Role] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; non-finite numbers become null."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def read_status(run: Path, now: float | None = None) -> Status:
    """Return the status of a run.

    Raises:
        ConfigError: there is no run in that directory, or a file of it cannot be read.
    """
    if not any(os.path.isfile(run / name) for name in ("config.yaml", "events.jsonl", "lock")):
        check_reachable(run / "config.yaml")
        raise ConfigError(f"{run}: no run directory (it has neither config.yaml nor events.jsonl); name one of train's")
    try:
        return _look_at(run, time.time() if now is None else now)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or run}: cannot be read: {error.strerror or error}; check its permissions and storage"
        ) from None


def _look_at(run: Path, now: float) -> Status:
    config, events = _config(run), read_rows(run / "events.jsonl")
    starts = attempts(events)
    held, owner, claimed = ownership(run)
    start = starts[-1] if starts else None
    number = _attempt(run, start)
    state, reason, code = judge(run_end(events), bool(starts), held, claimed, number)
    begins = [event for event in events if event.get("event") == "start"]
    rows = read_rows(run / "metrics.jsonl", TAIL_BYTES)
    # Rows of an earlier attempt tell nothing about this one, but where it goes on.
    own = [row for row in rows if row.get("attempt") == number]
    begin = start.resumed_step if start is not None and start.number == number else 0
    before = [row for row in rows if (_whole(row, "step") or math.inf) <= begin]
    row: dict[str, Any] = next(reversed(own or before), {})
    step, pace = _whole(row, "step") or begin, pace_of(own)
    # A row may be from before stages were added to the run.
    steps = _length(_tree(config.get("train")), "steps") or _whole(row, "steps")
    written = _time(row, "time")
    checkpoint, result = _newest_json(run, "checkpoints/step-*/manifest.json"), _newest_json(run, "results/step-*.json")
    made, metrics = _time(checkpoint, "created"), _tree((result or {}).get("metrics"))
    return Status(
        run=str(run),
        name=_text(config, "name"),
        state=state,
        reason=reason,
        exit_code=code,
        attempt=number,
        restarts=max(0, len(starts) - 1),
        role_restarts=sum(_is_role_restart(event, number) for event in events),
        owner=owner,
        device=_text(begins[-1], "device") if begins else None,
        world=start.world if start is not None else None,
        step=step,
        steps=steps,
        epoch=_whole(row, "epoch"),
        epochs=_length(_tree(config.get("train")), "epochs"),
        samples=_whole(row, "samples"),
        eta_s=eta(step, steps, pace, None if written is None else now - written) if state == "running" else None,
        row_age_s=None if written is None else max(0.0, now - written),
        loss=_number(row, "loss"),
        lr=_number(row, "lr"),
        grad_norm=_number(row, "grad_norm"),
        mfu=_number(row, "mfu"),
        memory=_whole(row, "memory"),
        pace=pace,
        checkpoint_step=_whole(checkpoint, "step"),
        checkpoint_age_s=None if made is None else max(0.0, now - made),
        evaluation_step=_whole(result, "step"),
        evaluation={name: value for name in metrics if (value := _number(metrics, name)) is not None},
        roles=list(_roles(run, number)),
        events=events[-SHOWN_EVENTS:],
    )


def pace_of(rows: list[dict[str, Any]]) -> Pace:
    """Return the pace of one attempt's ``rows``, in order. The time between rows includes checkpoints and evaluations,
    as the remaining time will."""
    seconds = sum(_number(row, "seconds") or 0.0 for row in rows)
    timed = [(step, when) for row in rows if (step := _whole(row, "step")) and (when := _time(row, "time"))]
    passed = timed[-1][0] - timed[0][0] if timed else 0
    # A clock that was put back counts for nothing.
    between = math.fsum(max(0.0, later[1] - earlier[1]) for earlier, later in pairwise(timed))
    images = sum((_number(row, "images_per_second") or 0.0) * (_number(row, "seconds") or 0.0) for row in rows)
    slowest = Counter(rank for row in rows if (rank := _whole(row, "slowest_rank")) is not None).most_common(1)

    def share(key: str) -> float | None:
        return sum(_number(row, key) or 0.0 for row in rows) / seconds if seconds > 0 else None

    def mean(key: str) -> float | None:
        values = [value for row in rows if (value := _number(row, key)) is not None]
        return sum(values) / len(values) if values else None

    return Pace(
        seconds_per_step=between / passed if passed > 0 else None,
        images_per_second=images / seconds if seconds > 0 else None,
        data_wait_share=share("data_wait_s"),
        checkpoint_stall_share=share("checkpoint_stall_s"),
        own_s_median=mean("own_s_median"),
        own_s_max=mean("own_s_max"),
        slowest_rank=slowest[0][0] if slowest else None,
        slowest_share=slowest[0][1] / len(rows) if slowest else None,
    )


def eta(step: int, steps: float | None, pace: Pace, row_age: float | None) -> float | None:
    """Return the seconds to the end at the pace of the last rows; the step in progress since the last row counts."""
    if steps is None or pace.seconds_per_step is None:
        return None
    left = (steps - step) * pace.seconds_per_step
    return max(0.0, left - min(row_age or 0.0, pace.seconds_per_step))


def _attempt(run: Path, start: Attempt | None) -> int:
    """Return the attempt that owns the run: RUN/attempt is written before the event of its start."""
    try:
        text = read_text(run / "attempt", MAX_SMALL_BYTES).strip()
    except DataError:
        text = ""
    owned = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    return max(owned, start.number if start is not None else 0)


def _roles(run: Path, attempt: int) -> Iterator[Role]:
    """Yield the roles in RUN/logs/ROLE.HOST.ATTEMPT.log; a role's name may end with its process number."""
    try:
        names = os.listdir(run / "logs")
    except OSError:
        return
    parts = [found for name in names if (found := _LOG.fullmatch(name)) is not None]
    counted = Counter((part[1], part[2]) for part in parts if int(part[3]) == attempt)
    for (role, host), processes in sorted(counted.items()):
        yield Role(role, host, processes)


def _is_role_restart(event: dict[str, Any], attempt: int) -> bool:
    return str(event.get("event", "")).endswith("_restart") and event.get("attempt") == attempt


def _config(run: Path) -> dict[str, Any]:
    """Read RUN/config.yaml without the schema, which is slow to import: only a few keys are shown."""
    from vitgraft.configs.yaml_text import parse_yaml

    try:
        return _tree(parse_yaml(read_text(run / "config.yaml", MAX_SMALL_BYTES), "config.yaml"))
    except (DataError, ConfigError):
        return {}


def _length(train: dict[str, Any], unit: str) -> int | None:
    """Return the length of all stages of the run together; ``None`` where it is not given in this unit."""
    first, more = _whole(train, unit), train.get("extend")
    return first and first + sum(_whole(stage, unit) or 0 for stage in (more if isinstance(more, list) else []))


def _newest_json(run: Path, pattern: str) -> dict[str, Any] | None:
    """Return the last readable file by name."""
    for path in sorted(run.glob(pattern), reverse=True):
        try:
            tree = _tree(read_json(path, MAX_SMALL_BYTES, finite=False))
        except DataError:
            continue
        if tree:
            return tree
    return None


def _tree(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def _number(tree: Any, key: str) -> float | None:
    """Return a number of an untrusted tree; ``None``: absent, no number, or an integer out of range."""
    value = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A loss may be infinite, or no number; an integer of a thousand digits is invalid.
    return None if isinstance(value, int) and abs(value) > MAX_WHOLE else value


def _whole(tree: Any, key: str) -> int | None:
    value = _number(tree, key)
    return int(value) if value is not None and abs(value) < MAX_WHOLE else None


def _time(tree: Any, key: str) -> float | None:
    try:
        return moment(tree.get(key) if isinstance(tree, dict) else None)
    except ValueError:
        return None


def _text(tree: dict[str, Any], key: str) -> str | None:
    value = tree.get(key)
    return value if isinstance(value, str) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
