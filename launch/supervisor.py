"""The supervisor: attempt after attempt at a run, until it is done, cannot be done, or is not wanted any more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from vitgraft.configs.errors import ConfigError, InterruptedRun, PreemptedRun, TrainingError, VitgraftError
from vitgraft.configs.errors import cause_of as cause_of_error
from vitgraft.configs.schema import Recipe
from vitgraft.configs.worlds import possible_worlds
from vitgraft.launch import recovery
from vitgraft.launch.attempt import Attempt, Plan
from vitgraft.launch.backends import Backend
from vitgraft.launch.causes import cause_of
from vitgraft.launch.deadlines import Deadlines
from vitgraft.launch.evaluator import evaluator_device
from vitgraft.launch.gang import EvaluatorOrder
from vitgraft.launch.observations import Cause, Failure
from vitgraft.launch.preflight import preflight
from vitgraft.launch.recovery import Policy, Restart, Stop
from vitgraft.launch.replay import leave_out, read_non_finite
from vitgraft.launch.roster import Roster
from vitgraft.launch.run_dir import RunHandle
from vitgraft.launch.ui import Screen
from vitgraft.trainer.checkpoint.read import complete_checkpoints
from vitgraft.trainer.monitor_files import read_rows
from vitgraft.trainer.signals import signal_name

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LAST_ROWS_BYTES = 1 << 16


@dataclass
class Supervisor:
    """Owns a run until it ends. ``backend``: where it runs. ``folder``: in which relative paths of the recipe lie."""

    handle: RunHandle
    recipe: Recipe
    backend: Backend
    screen: Screen
    folder: str
    roster: Roster = field(init=False)
    record: list[Failure] = field(default_factory=list)
    _asked: int | None = None
    _training: bool = False
    _over: bool = False
    _deadlines: Deadlines = field(init=False)
    _policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        launch = self.recipe.launch
        self.roster = Roster(self.backend, self.folder)
        self._deadlines = Deadlines(launch.deadlines.by_phase(), launch.deadlines.silence)
        self._policy = Policy(
            max_restarts=launch.max_restarts,
            host_failures=launch.host_failures,
            non_finite=self.recipe.train.on_non_finite,
            first_delay_s=launch.restart_delay_s,
        )

    def run(self) -> None:
        """Train to the end of the recipe.

        Raises:
            VitgraftError: why it ended before; one line and an exit code. No process of the run lives on any host that
                answers, and those on the others end themselves.
        """
        with self._signals():
            self.roster.keep_calling()
            code = VitgraftError.exit_code
            try:
                self._attempts()
                code = 0
            except VitgraftError as error:
                code = error.exit_code
                raise
            except OSError as error:  # storage that fails under the supervisor is the run's failure
                failure = TrainingError(f"{type(error).__name__}: {error}; mend it", cause=cause_of_error(error))
                code = failure.exit_code
                self.handle.event("end", code=code, reason=str(failure))
                raise failure from error
            finally:
                self._over = True
                self.roster.dismiss(code)

    def _attempts(self) -> None:
        ranks = self._first_ranks()
        while (cause := self._attempt(ranks)) is not None:
            ranks = self._go_on(cause)

    def _attempt(self, ranks: dict[str, int]) -> Cause | None:
        """One attempt; why it ended before its time, or ``None``."""
        handle, plan = self.handle, self._plan(ranks)
        if self.record and sum(self.record[-1].hosts.values()) != plan.world:
            self._deadlines.forget()
        for note in handle.notes:
            self.screen.note(note)
        start = f"from {handle.resume.path.name}" if handle.resume is not None else "from the start"
        where = "" if len(ranks) == 1 else f" on {len(ranks)} hosts"
        self.screen.note(
            f"attempt {handle.attempt} {start}: {plan.world} ranks on {plan.device}{where}, "
            f"{plan.threads} threads each, in {handle.path}"
        )
        facts = {"resume": handle.resume.step if handle.resume else None, "world": plan.world, "hosts": dict(ranks)}
        handle.event("start", **facts, device=plan.device, threads=plan.threads, notes=handle.notes)
        attempt = Attempt(
            handle,
            self.recipe,
            plan,
            self.roster.links,
            self.backend,
            self.screen,
            self._deadlines,
            lambda: self._asked,
            self._ask_to_stop,
        )
        self._training = True
        try:
            seen = attempt.run()
        except VitgraftError as error:
            handle.event("end", code=error.exit_code, reason=str(error))
            raise
        finally:
            self._training = False
        cause = cause_of(seen)
        if cause is None:
            handle.event("end", code=0, reason="done")
            return None
        text = self._words(cause, attempt)
        handle.event("end", code=cause.exit_code, reason=text, kind=cause.kind, rank=cause.rank, host=cause.host)
        self._remember(cause, ranks)
        if cause.kind in ("interrupt", "preemption"):
            # Ranks end with this code behind a barrier behind the commit.
            behind = all(end.code == PreemptedRun.exit_code for end in seen.ends)
            raise _stopped(self._asked or signal.SIGTERM, behind=behind)
        return cause

    def _words(self, cause: Cause, attempt: Attempt) -> str:
        """The cause, what to do, and where to read more."""
        text = cause.line
        own = cause.rank is not None and cause.rank >= 0 and cause.exit_code in (1, TrainingError.exit_code)
        return f"{text} (log: {attempt.log_of(cause.rank or 0)})" if own else text

    def _remember(self, cause: Cause, ranks: dict[str, int]) -> None:
        run = self.handle.path
        newest = max((checkpoint.step for checkpoint in complete_checkpoints(run)), default=0)
        rows = read_rows(run / "metrics.jsonl", LAST_ROWS_BYTES)
        done = [row["step"] for row in rows if row.get("attempt") == self.handle.attempt]
        resumed = self.handle.resume.step if self.handle.resume is not None else 0
        step, entries = cause.step or max(done, default=resumed) + 1, frozenset[str]()
        found = read_non_finite(run, self.handle.attempt) if cause.kind == "non_finite" else None
        if found is not None:
            step, entries = found
        self.record.append(Failure(cause, newest, step, entries, dict(ranks)))

    def _go_on(self, cause: Cause) -> dict[str, int]:
        """After a failure: wait, find out who answers, and claim the next attempt; returns the ranks of each host."""
        self._seek_lost_hosts()
        decision = self._decide()
        if isinstance(decision, Stop):
            self.handle.event("give_up", code=decision.exit_code, text=decision.text)
            raise _error(decision.exit_code, decision.text)
        for note in decision.notes:
            self.screen.note(note)
        self.screen.note(f"{cause.text}; starting again from the newest checkpoint in {decision.delay_s:g} s")
        self.handle.event(
            "restart",
            kind=cause.kind,
            reason=cause.text,
            delay_s=decision.delay_s,
            hosts=decision.ranks,
            notes=list(decision.notes),
        )
        self._pause(decision.delay_s)
        if decision.skip:
            leave_out(self.handle.path, decision.skip, self.record[-1].step or 0, self.handle.attempt)
        self.handle.next_attempt()
        return dict(decision.ranks)

    def _seek_lost_hosts(self) -> None:
        lost = [host for host in self.backend.hosts if self.roster.is_lost(host.name)]
        if not lost:
            return
        failures = self.roster.connect(lost, again=True)
        for host in lost:
            if host.name not in failures:
                self.handle.event("host_back", host=host.name)
        for name, why in self._leave_out_unfit().items():
            self.screen.note(f"WARNING {name} is left out: {why}")
            self.handle.event("host_unfit", host=name, text=why)

    def _decide(self) -> Restart | Stop:
        return recovery.decide(self.record, self.backend.hosts, self.roster.answering(), self._worlds(), self._policy)

    def _worlds(self) -> list[int]:
        return possible_worlds(self.recipe.train.global_batch, self.recipe.train.accumulation)

    def _first_ranks(self) -> dict[str, int]:
        """Connect to all hosts; those that do not answer are left out where the others carry a world."""
        hosts = self.backend.hosts
        failures = self.roster.connect(hosts, again=False)
        unfit = self._leave_out_unfit()
        if unfit:
            raise ConfigError("; ".join(f"{host}: {reason}" for host, reason in unfit.items()))
        ranks = recovery.place(hosts, self.roster.answering(), self._worlds())
        wanted = sum(host.slots for host in hosts if not host.spare)
        if ranks is None or (failures and self._policy.max_restarts == 0):
            why = "; ".join(f"{host}: {reason}" for host, reason in failures.items()) or "no world is possible"
            raise TrainingError(f"the hosts that answer can carry no world of this recipe; {why}")
        for host, reason in failures.items():
            self.screen.note(f"WARNING {host} does not answer: {reason}")
            self.handle.event("host_absent", host=host, text=reason)
        if sum(ranks.values()) != wanted:
            self.screen.note(f"WARNING going on with {sum(ranks.values())} ranks instead of {wanted}")
        return ranks

    def _leave_out_unfit(self) -> dict[str, str]:
        """See whether the hosts that answer fit together; those that do not are let go. Returns why."""
        links = [self.roster.links[host] for host in self.roster.answering()]
        if self.backend.alone or not links:
            return {}
        slots = {host.name: host.slots for host in self.backend.hosts}
        unfit, warnings = preflight(links, self.recipe, Path(os.path.abspath(self.handle.path)), slots)
        for warning in warnings:
            self.screen.note(f"WARNING {warning}")
        for host in unfit:
            self.roster.links[host].close()
        return unfit

    def _plan(self, ranks: dict[str, int]) -> Plan:
        launch = self.recipe.launch
        used = {host: self.roster.links[host].facts for host, count in ranks.items() if count}
        slots = {host: self.backend.used(host, ranks[host]) for host in used}
        poor = [host for host, facts in used.items() if facts["gpus"] <= max(slots[host])]
        # Where only some have what they need, the run would be far slower than anybody wants: no host's trouble, and
        # no mistake in a hostfile, turns all to the CPU.
        some = launch.device == "auto" and any(facts["gpus"] for facts in used.values())
        if poor and (launch.device == "cuda" or some):
            host = poor[0]
            raise ConfigError(
                f"launch.device: {launch.device}, but {host} has {used[host]['gpus']} GPUs for {ranks[host]} ranks "
                f"(slots {','.join(map(str, slots[host]))}); correct its slots, or launch.device: cpu"
            )
        device = "cpu" if launch.device == "cpu" or poor else "cuda"
        if self.recipe.train.precision == "bf16_params" and device == "cpu":
            raise ConfigError("train.precision: bf16_params needs a GPU; use bf16, which runs on a CPU too")
        threads = launch.threads or max(1, min(used[host]["cores"] // count for host, count in ranks.items()))
        return Plan(ranks, device, threads, self._evaluator(ranks, device))

    def _evaluator(self, ranks: dict[str, int], device: str) -> tuple[str, EvaluatorOrder] | None:
        wanted = self.recipe.evaluator
        if wanted is None:
            return None
        host = wanted.host or next(iter(ranks))
        if self.roster.is_lost(host):
            self.screen.note(f"WARNING {host} does not answer; nothing is evaluated until it does")
            return None
        facts = self.roster.links[host].facts
        chosen = evaluator_device(
            wanted.device, facts["gpus"], self.backend.used(host, ranks.get(host, 0)) if device == "cuda" else ()
        )
        threads = wanted.threads or max(1, facts["cores"] // max(1, ranks.get(host, 0) + 1))
        return host, EvaluatorOrder(device=chosen, threads=threads)

    def _pause(self, seconds: float) -> None:
        """Back off; somebody on another node may want to stop meanwhile."""
        until = time.monotonic() + seconds
        while True:
            for link in self.roster.links.values():
                for message in link.receive() if link.lost is None else ():
                    if message.get("say") == "asked":
                        self._ask_to_stop(int(message["signal"]))
            if self._asked is not None:
                raise _stopped(self._asked, behind=False)
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(1.0, left))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        # nohup has had the end of the terminal ignored.
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        old = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise InterruptedRun("interrupted; the same command goes on from the last committed checkpoint")
        self._ask_to_stop(number)
        if not self._training and not self._over:
            # No rank is there that could save: whatever is waited for, e.g. other nodes, is not needed any more.
            raise _stopped(number, behind=False)

    def _ask_to_stop(self, number: int) -> None:
        if self._asked is None:
            self._asked = number
            self.handle.event("stop_asked", signal=signal_name(number))
            self.screen.note("stopping behind a checkpoint at the end of this step; Ctrl-C again ends at once")


def _stopped(asked: int, *, behind: bool) -> VitgraftError:
    """What the command ends with when it was asked to."""
    committed = " behind a committed checkpoint" if behind else ""
    if asked == signal.SIGINT:
        return InterruptedRun(f"interrupted{committed}; the same command goes on from the last committed checkpoint")
    return PreemptedRun(f"stopped{committed}; the same command goes on from the last committed checkpoint")


def _error(code: int, text: str) -> VitgraftError:
    error = VitgraftError(text)
    error.exit_code = code
    return error
