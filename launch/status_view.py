"""``vitgraft status`` as text: a few lines, redrawn with ``--watch``."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import printable
from vitgraft.configs.units import duration
from vitgraft.launch import ending
from vitgraft.launch.status import Status, read_status
from vitgraft.trainer.monitor_files import moment

WATCH_INTERVAL_S = 1.0
PRIMARY = ("box_AP", "mask_AP", "mIoU", "top1", "top5")
"""The figures of an evaluation that are shown; ``--json`` has all."""
_MEANT = {"resume", "world", "code", "reason", "text", "restarts"}
_MOSTLY = 0.8
"""A rank is named as the slowest when it was that in so large a share of the steps."""


def lines(status: Status) -> Iterator[str]:
    """Yield the run's state in lines for one screen; unknown facts have no line."""
    yield _line("run", [status.run, status.name if status.name != Path(status.run).name else None])
    code = None if status.exit_code in (None, 0) else f"exit {status.exit_code}"
    yield _line("state", [status.state, code, status.reason])
    restarts = f"{status.restarts} restarts" if status.restarts else None
    roles = f"{status.role_restarts} role restarts" if status.role_restarts else None
    owner = status.owner if status.state == "running" else None
    yield _line("attempt", [str(status.attempt), restarts, roles, owner])
    whole = f"{status.step:,}" if status.steps is None else f"{status.step:,} of {status.steps:,}"
    percent = f"{100 * status.step / status.steps:.1f} %" if status.steps else None
    left = f"ETA {duration(status.eta_s)}" if status.eta_s is not None else None
    yield _line("step", [whole, percent, _epoch(status), left])
    if status.loss is not None:
        facts = [f"loss {status.loss:.4g}", _said("lr", status.lr), _said("grad norm", status.grad_norm)]
        age = status.row_age_s if status.state in ("running", "dead") else None
        yield _line("training", [*facts, f"{duration(age)} ago" if age is not None else None])
    yield from _speed(status)
    if status.checkpoint_step is not None and status.checkpoint_age_s is not None:
        yield _line("checkpoint", [f"step {status.checkpoint_step:,}", f"{duration(status.checkpoint_age_s)} old"])
    if status.evaluation_step is not None:
        shown = [f"{name} {status.evaluation[name]:.3f}" for name in PRIMARY if name in status.evaluation]
        yield _line("evaluation", [f"step {status.evaluation_step:,}", *shown])
    hosts = [f"{role.role} × {role.processes} on {role.host}" for role in status.roles]
    if hosts or status.world is not None:
        ranks = f"{status.world} ranks on {status.device}" if status.world is not None else None
        yield _line("roles", [ranks, *hosts])
    for number, event in enumerate(status.events):
        yield _line("events" if number == 0 else "", [event_text(event)])


def watch(run: Path) -> None:
    """Draw the status again and again on the terminal, until Ctrl-C.

    Raises:
        ConfigError: as :func:`read_status`.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def drawn() -> Text:
        return Text("\n".join(lines(read_status(run))), no_wrap=True, overflow="ellipsis")

    try:
        with Live(drawn(), console=Console(highlight=False), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(WATCH_INTERVAL_S)
                live.update(drawn(), refresh=True)
    except KeyboardInterrupt:
        if ending.asked() not in (None, signal.SIGINT):
            raise
        # Ctrl-C is how watching ends.


def event_text(event: dict[str, Any]) -> str:
    """Return one event as one line."""
    try:
        clock = time.strftime("%m-%d %H:%M:%S", time.localtime(moment(event.get("time"))))
    except ValueError:
        clock = "?"
    facts = [f"{key} {value}" for key, value in event.items() if key in _MEANT and value is not None]
    return "  ".join([clock, str(event.get("event", "?")), *facts])


def _speed(status: Status) -> Iterator[str]:
    pace = status.pace
    if pace.images_per_second is not None:
        waits = [
            f"{name} {100 * share:.1f} %"
            for name, share in (
                ("MFU", status.mfu),
                ("data wait", pace.data_wait_share),
                ("checkpoint stall", pace.checkpoint_stall_share),
            )
            if share is not None
        ]
        memory = f"memory {status.memory / 1e9:.2f} GB" if status.memory is not None else None
        yield _line("speed", [f"{pace.images_per_second:.4g} images/s", *waits, memory])
    if (status.world or 1) > 1 and pace.own_s_median and pace.own_s_max is not None:
        slowest = (
            f"mostly rank {pace.slowest_rank}" if (pace.slowest_share or 0.0) >= _MOSTLY else "no rank in particular"
        )
        ratio = f"the slowest × {pace.own_s_max / pace.own_s_median:.2f}"
        yield _line("ranks", [f"own time {pace.own_s_median:.3g} s", ratio, slowest])


def _epoch(status: Status) -> str | None:
    if status.epoch is None:
        return None
    return f"epoch {status.epoch + 1}" + (f" of {status.epochs}" if status.epochs is not None else "")


def _said(name: str, value: float | None) -> str | None:
    return None if value is None else f"{name} {value:.4g}"


def _line(label: str, facts: list[str | None]) -> str:
    text = "  ".join(fact for fact in facts if fact is not None)
    # What others wrote into the run's files must not steer the terminal.
    return f"{label:<11}" + printable(text)
