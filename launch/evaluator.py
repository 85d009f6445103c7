"""Start the evaluator, monitor it, and restart it when it dies or hangs; training never depends on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgraft.configs.cores import THREADS_VARIABLE
from vitgraft.configs.errors import ConfigError
from vitgraft.launch.role_process import RoleProcess
from vitgraft.trainer.checkpoint.read import complete_checkpoints
from vitgraft.trainer.checkpoint.retention import result_path
from vitgraft.trainer.evaluator import ROLE, SIGNALS
from vitgraft.trainer.signals import DRAIN

SILENCE_S = 120.0
"""Its signs of life come from a thread of their own, however long an evaluation takes."""
MAX_PAUSE_S = 60.0
MAX_DEATHS = 3
"""Deaths at the same step after which the next evaluator skips it; while draining, deaths after which it is given
up."""


def evaluator_device(wanted: str, gpus: int, used: Collection[int]) -> str:
    """Return the device of a host's evaluator: ``cpu`` or ``cuda:N``.

    Args:
        wanted: the recipe's ``evaluator.device``. ``auto``: the first GPU that no rank uses, else the CPU; ``cuda``:
            where there is no such GPU, the last one, beside its rank.
        gpus: of the host.
        used: those that ranks use.

    Raises:
        ConfigError: ``cuda`` on a host without a GPU.
    """
    if wanted == "cuda" and gpus == 0:
        raise ConfigError("evaluator.device: cuda, but no GPU is visible on its host; use auto or cpu")
    free = next((gpu for gpu in range(gpus) if gpu not in used), None)
    if wanted == "cpu" or (wanted == "auto" and free is None):
        return "cpu"
    return f"cuda:{gpus - 1 if free is None else free}"


def absence(host: str) -> str:
    """Return the message that the evaluator's host does not answer."""
    return f"{host} does not answer; nothing is evaluated in this attempt"


def left_undone(run: Path, host: str) -> str | None:
    """Return the message at the end of a run whose evaluator's host was lost; ``None``: its last checkpoint was
    evaluated."""
    last = max((checkpoint.step for checkpoint in complete_checkpoints(run)), default=0)
    if result_path(run, last).exists():
        return None
    return f"{host} is gone; what is left is not evaluated: python -m vitgraft.trainer.evaluator --run-dir {run}"


@dataclass
class EvaluatorKeeper:
    """Keeps one evaluator alive. Nothing that happens to it is an error of the run.

    ``device``: ``cpu`` or ``cuda:N``. ``threads``: CPU threads. ``lock``: open descriptor of RUN/lock, which it holds
    too; ``None`` where the run is owned from another host. ``event``: writes to RUN/events.jsonl. ``environment``: what
    it finds besides that of this process.
    """

    run: Path
    attempt: int
    device: str
    threads: int
    lock: int | None
    event: Callable[..., None]
    environment: Mapping[str, str] = field(default_factory=dict)
    _role: RoleProcess = field(init=False)
    _pipe: int = -1
    _draining: bool = False
    _ended: bool = True
    _done: int = 0
    _step: int | None = None
    _failures: int = 0
    """In a row, without an evaluation."""
    _reason: str | None = None
    """Why the last one is gone; its successor is started at ``_again_at``."""
    _again_at: float = 0.0
    _deaths: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._role = RoleProcess(
            ROLE, self.run, self.attempt, self.lock, SIGNALS, {**self.environment, THREADS_VARIABLE: str(self.threads)}
        )

    def start(self, pipe: int) -> None:
        """Start it; it reports to ``pipe``, which must stay open for its successors."""
        self._pipe, self._ended = pipe, False
        self._start()

    def heard(self, message: dict[str, Any]) -> None:
        """Handle a heartbeat; evaluations count as progress."""
        if not self._role.heard(message["pid"]):
            return  # a predecessor's, late
        self._step = message["outstanding"]
        if message["done"] > self._done:
            self._done, self._failures = message["done"], 0

    def tend(self) -> bool:
        """Call a few times a second: replaces a dead or silent one, after a pause. Returns whether there is anything to
        wait for: one works, or a successor will."""
        if self._ended:
            return False
        if self._reason is None:
            reason = self._role.trouble(SILENCE_S)
            if reason is not None:
                self._gone(reason)
        elif time.monotonic() >= self._again_at:
            # Not sooner: what it said last may still have been on its way.
            self._replace(self._reason)
        return not self._ended

    def drain(self) -> None:
        """Ask it to evaluate what is due and to end; then :meth:`tend` until it has."""
        if not self._draining:
            self._draining = True
            self._role.ask(DRAIN)

    def end(self) -> None:
        """Kill it."""
        self._role.kill()
        self._ended = True

    def log_path(self) -> Path:
        """Return RUN/logs/ROLE.HOST.ATTEMPT.log."""
        return self._role.log_path()

    def _gone(self, reason: str) -> None:
        finished = self._draining and self._role.code() == 0
        self._role.kill()
        if finished:
            self._ended = True
            return
        self._failures += 1
        if self._draining and self._failures >= MAX_DEATHS:
            self._ended = True
            text = f"the evaluator {_was(reason)}, {self._failures} times in a row; what is left is not evaluated"
            self.event("evaluator_gave_up", text=f"{text}; its log: {self.log_path()}")
            return
        self._reason = reason
        self._again_at = time.monotonic() + min(MAX_PAUSE_S, 2.0 ** min(self._failures - 1, 10))

    def _replace(self, reason: str) -> None:
        self.event("evaluator_restart", reason=reason, restarts=self._failures, step=self._step)
        if self._step is not None:
            self._deaths[self._step] += 1
            if self._deaths[self._step] == MAX_DEATHS:
                text = f"step {self._step} is not evaluated: the evaluator {_was(reason)} over it, {MAX_DEATHS} times"
                self.event("evaluation_given_up", text=f"{text}; its log: {self.log_path()}", step=self._step)
        self._start()

    def _start(self) -> None:
        self._reason, self._done, self._step = None, 0, None
        arguments = ["--device", self.device, *(["--drain"] if self._draining else [])]
        for step in sorted(step for step, deaths in self._deaths.items() if deaths >= MAX_DEATHS):
            arguments += ["--give-up", str(step)]
        try:
            self._role.start(self._pipe, arguments)
        except OSError as error:
            self._gone(f"not to be started: {error}")


def _was(reason: str) -> str:
    return reason if reason.startswith("ended") else f"was {reason}"
