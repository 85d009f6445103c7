"""Supervisor of a run: attempts until it is complete, cannot go on, or is asked to stop."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from vitgraft.configs.cores import asked_threads
from vitgraft.configs.errors import ConfigError, PreemptedRun, TrainingError, VitgraftError
from vitgraft.configs.errors import cause_of as cause_of_error
from vitgraft.configs.schema import Recipe
from vitgraft.configs.units import counted
from vitgraft.configs.worlds import possible_worlds
from vitgraft.launch import recovery
from vitgraft.launch.attempt import Attempt
from vitgraft.launch.backends import Backend
from vitgraft.launch.causes import cause_of
from vitgraft.launch.deadlines import Deadlines
from vitgraft.launch.evaluator import absence, left_undone
from vitgraft.launch.observations import Cause, Failure
from vitgraft.launch.planning import Plan, difference_of, evaluator_host, plan_attempt
from vitgraft.launch.preflight import preflight
from vitgraft.launch.recovery import Policy, Restart, Stop
from vitgraft.launch.replay import VERDICT, Finding, Replay, earlier_fault, leave_out, read_non_finite
from vitgraft.launch.roster import Roster
from vitgraft.launch.run_dir import RunHandle
from vitgraft.launch.stopping import StopWish, stopped
from vitgraft.launch.ui import Screen
from vitgraft.trainer.checkpoint.read import complete_checkpoints
from vitgraft.trainer.monitor_files import read_rows

LAST_ROWS_BYTES = 1 << 16
FRESH_S = 3.0
"""Seconds since the last message within which a host counts as alive: its agent sends one every second."""


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
    _told: bool = False
    """True once the events record the run's end."""
    _stop: StopWish = field(init=False)
    _replay: Replay = field(init=False)
    _deadlines: Deadlines = field(init=False)
    _policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        launch = self.recipe.launch
        self._stop = StopWish(self.handle, self.screen)
        self.roster = Roster(self.backend, self.folder, self._stop)
        self._replay = Replay(self.record)
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
        with self._stop.heard():
            self.roster.keep_calling()
            code = VitgraftError.exit_code
            try:
                self._attempts()
                code = 0
            except VitgraftError as error:
                code = self._record_end(error)
                raise
            except OSError as error:  # storage that fails under the supervisor is the run's failure
                failure = TrainingError(f"{type(error).__name__}: {error}; mend it", cause=cause_of_error(error))
                code = self._record_end(failure)
                raise failure from error
            except Exception as error:
                log = f"logs/supervisor.{os.uname().nodename}.log"
                self._record_end(VitgraftError(f"{type(error).__name__}: {error}; a defect of vitgraft, see {log}"))
                raise
            finally:
                self._stop.patient = True
                self.roster.dismiss(code)

    def _record_end(self, error: VitgraftError) -> int:
        """Record the run's end in its events, unless recorded already; return the exit code."""
        self._stop.patient = True
        if not self._told:
            self.handle.event("end", code=error.exit_code, reason=str(error))
        return error.exit_code

    def _attempts(self) -> None:
        if self.handle.resume is not None:
            self._replay.earlier = earlier_fault(self.handle.path, self.handle.resume.step)
        ranks = self._first_ranks()
        while (cause := self._attempt(ranks)) is not None:
            ranks = self._go_on(cause)

    def _attempt(self, ranks: dict[str, int]) -> Cause | None:
        """Run one attempt; return why it ended early, or ``None``."""
        handle, plan = self.handle, self._plan(ranks)
        if self.record and sum(self.record[-1].hosts.values()) != plan.world:
            self._deadlines.forget()
        handle.notes += self._differences(plan)
        for note in handle.notes:
            self.screen.note(note)
        start = f"from {handle.resume.path.name}" if handle.resume is not None else "from the start"
        why = f" ({plan.why})" if plan.why is not None else ""
        where = "" if len(ranks) == 1 else f" on {len(ranks)} hosts"
        self.screen.note(
            f"attempt {handle.attempt} {start}: {counted(plan.world, 'rank')} on {plan.device}{where}, "
            f"{counted(plan.threads, 'thread')} each{why}, in {handle.path}"
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
            lambda: self._stop.asked,
            self._stop.ask,
            lambda: self._meanwhile(attempt),
        )
        self._stop.patient = True
        try:
            seen = attempt.run()
        finally:
            self._stop.patient = False
        cause = cause_of(seen)
        if cause is None:
            self._tell_verdict(self._replay.passed(math.inf))
            self._see_evaluated(plan)
            handle.event("end", code=0, reason="done")
            return None
        text = self._words(cause, attempt)
        handle.event("end", code=cause.exit_code, reason=text, kind=cause.kind, rank=cause.rank, host=cause.host)
        self._remember(cause, ranks)
        if cause.kind in ("interrupt", "preemption"):
            self._told = True
            # Ranks end with this code behind a barrier behind the commit.
            behind = all(end.code == PreemptedRun.exit_code for end in seen.ends)
            raise stopped(self._stop.asked or signal.SIGTERM, behind=behind)
        return cause

    def _see_evaluated(self, plan: Plan) -> None:
        """Report checkpoints of a complete run that are left without evaluation, as the evaluator's host was lost."""
        host = evaluator_host(self.recipe, plan.ranks)
        if host is not None and self.roster.is_lost(host) and (text := left_undone(self.handle.path, host)) is not None:
            self.screen.note(f"WARNING {text}")
            self.handle.event("evaluator_gave_up", host=host, text=text)

    def _meanwhile(self, attempt: Attempt) -> None:
        """Monitor the run during training: its directory, the hosts without ranks, and the replay of a step."""
        self.handle.check_place()
        self._hear_idle(attempt.hosts)
        self._tell_verdict(self._replay.passed(attempt.step))

    def _hear_idle(self, used: Collection[str] = ()) -> None:
        for host, why in self.roster.hear_idle(used).items():
            self._tell_lost(host, why)

    def _tell_lost(self, host: str, why: str) -> None:
        self.screen.note(f"{host} is lost: {why}")
        self.handle.event("host_lost", host=host, text=why)

    def _tell_verdict(self, found: Finding | None) -> None:
        if found is not None:
            self.screen.note(found.text)
            self.handle.event(VERDICT, step=found.step, verdict=found.verdict, entries=found.entries)

    def _words(self, cause: Cause, attempt: Attempt) -> str:
        """Return the cause, the next action, and the logs to read."""
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
        self._tell_verdict(self._replay.failed())

    def _go_on(self, cause: Cause) -> dict[str, int]:
        """Wait after a failure, find the hosts that answer, and claim the next attempt; return the ranks of each
        host."""
        if self._stop.asked is None:
            self._settle()
            self._seek_lost_hosts()
        decision = self._decide()
        if isinstance(decision, Stop):
            self.handle.event("give_up", code=decision.exit_code, text=decision.text)
            self._told = True
            raise _error(decision.exit_code, decision.text)
        self._stop.raise_if_asked()
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

    def _settle(self) -> None:
        """Wait until each host has answered recently or counts as lost: hosts lost together are detected one by one."""
        self._hear_idle()
        while self.roster.quiet(FRESH_S):
            time.sleep(0.1)
            self._hear_idle()

    def _seek_lost_hosts(self) -> None:
        lost = [host for host in self.backend.hosts if self.roster.is_lost(host.name)]
        if not lost:
            return
        failures = self.roster.connect(lost, again=True)
        for host in lost:
            if host.name not in failures:
                self.handle.event("host_back", host=host.name)
        unfit, gone = self._examine()
        for name, why in unfit.items():
            self.screen.note(f"WARNING {name} is left out: {why}")
            self.handle.event("host_unfit", host=name, text=why)
        for name, why in gone.items():
            self._tell_lost(name, why)

    def _decide(self) -> Restart | Stop:
        hosts = self.backend.hosts
        # Who is to stop needs no host any more.
        answering = self.roster.answering() if self._stop.asked is None else [host.name for host in hosts]
        return recovery.decide(self.record, hosts, answering, self._worlds(), self._policy, self._replay.earlier)

    def _worlds(self) -> list[int]:
        return possible_worlds(self.recipe.train.global_batch, self.recipe.train.accumulation)

    def _first_ranks(self) -> dict[str, int]:
        """Connect to all hosts; those that do not answer are left out where the others carry a world."""
        hosts = self.backend.hosts
        failures = self.roster.connect(hosts, again=False)
        unfit, gone = self._examine()
        if unfit:
            raise ConfigError("; ".join(f"{host}: {reason}" for host, reason in unfit.items()))
        failures |= gone
        ranks = recovery.place(hosts, self.roster.answering(), self._worlds())
        wanted = sum(host.slots for host in hosts if not host.spare)
        why = "; ".join(f"{host}: {reason}" for host, reason in failures.items()) or "no world is possible"
        if ranks is None:
            raise TrainingError(f"the hosts that answer can carry no world of this recipe; {why}")
        if failures and self._policy.max_restarts == 0 and sum(ranks.values()) < wanted:
            raise TrainingError(
                f"the hosts that answer can carry {sum(ranks.values())} of {wanted} ranks only, and with "
                f"launch.max_restarts: 0 no host may be missing; {why}"
            )
        for host, reason in failures.items():
            self.screen.note(f"WARNING {host} does not answer: {reason}")
            self.handle.event("host_absent", host=host, text=reason)
        if sum(ranks.values()) != wanted:
            self.screen.note(f"WARNING going on with {sum(ranks.values())} ranks instead of {wanted}")
        return ranks

    def _examine(self) -> tuple[dict[str, str], dict[str, str]]:
        """Check that the answering hosts are compatible, and exclude others. Return the reasons, also of hosts that
        stopped answering."""
        links = [self.roster.links[host] for host in self.roster.answering()]
        if self.backend.alone or not links:
            return {}, {}
        slots = {host.name: host.slots for host in self.backend.hosts}
        unfit, warnings = preflight(links, self.recipe, Path(os.path.abspath(self.handle.path)), slots)
        for warning in warnings:
            self.screen.note(f"WARNING {warning}")
        # While waiting for the slowest, messages of the others were not read.
        gone = self.roster.hear_idle(())
        for host in unfit:
            self.roster.links[host].close()
        return {host: why for host, why in unfit.items() if host not in gone}, gone

    def _plan(self, ranks: dict[str, int]) -> Plan:
        host = evaluator_host(self.recipe, ranks)
        if host is not None and self.roster.is_lost(host):
            self.screen.note(f"WARNING {absence(host)}")
            self.handle.event("evaluator_absent", host=host, text=absence(host))
            host = None
        facts = {name: link.facts for name, link in self.roster.links.items()}
        return plan_attempt(self.recipe, ranks, self.backend.used, facts, host, asked_threads(os.environ))

    def _differences(self, plan: Plan) -> list[str]:
        """Return the reasons why sums may differ in their last bits: between hosts, and from the attempt resumed."""
        found = [plan.note]
        if self.handle.resume is not None:
            wrote = self.handle.resume.manifest.attempt
            starts = [row for row in read_rows(self.handle.path / "events.jsonl") if row.get("event") == "start"]
            found += [difference_of(row, plan) for row in starts if row.get("attempt") == wrote][-1:]
        return [text for text in found if text is not None]

    def _pause(self, seconds: float) -> None:
        """Wait before a restart, while a stop from another node is still handled."""
        until = time.monotonic() + seconds
        while True:
            self._hear_idle()
            self._stop.raise_if_asked()
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(1.0, left))


def _error(code: int, text: str) -> VitgraftError:
    error = VitgraftError(text)
    error.exit_code = code
    return error
