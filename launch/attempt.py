"""One attempt at a run in the supervisor: orders to the agents, their reports, and its end."""

from __future__ import annotations

import math
import os
import secrets
import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import ConfigError, PreemptedRun, TrainingError
from vitgraft.configs.schema import Recipe
from vitgraft.launch.backends import Backend, Launcher, LaunchOrder
from vitgraft.launch.deadlines import SLOW_STEPS, Deadlines, find_hang, find_stragglers
from vitgraft.launch.deepspeed_launch import rank_arguments
from vitgraft.launch.evaluator import absence
from vitgraft.launch.gang import Orders
from vitgraft.launch.links import FIRST_ANSWER_S, AgentLink
from vitgraft.launch.observations import Hang, HostState, Observation, RankEnd, RankState, ReportedError
from vitgraft.launch.planning import Plan
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.role_process import log_path
from vitgraft.launch.run_dir import RunHandle
from vitgraft.launch.ui import Screen

GRACE_AFTER_FAILURE_S = 5.0
"""Seconds for ranks to end by themselves, and to report why, after the first of them failed."""
LOOK_S = 0.5
UNSTARTED_S = 30.0
"""A run that is to stop waits so long for ranks that have not started."""
LAUNCHER_GRACE_S = 2.0
ASKED_DRAIN_S = 60.0
"""Seconds for checkpointers to finish after a request to stop."""
_NO_FAILURE = (0, PreemptedRun.exit_code)


@dataclass
class Attempt:
    """Runs an attempt.

    ``links``: to all hosts of the plan. ``asked``: the signal by which the run was asked to stop. ``ask``: is
    called with signal and host when a host was asked to. ``meanwhile``: is called several times a second.
    """

    handle: RunHandle
    recipe: Recipe
    plan: Plan
    links: Mapping[str, AgentLink]
    backend: Backend
    screen: Screen
    deadlines: Deadlines
    asked: Callable[[], int | None]
    ask: Callable[[int, str], None]
    meanwhile: Callable[[], None]
    errors: list[ReportedError] = field(default_factory=list)
    ends: list[RankEnd] = field(default_factory=list)
    hosts: dict[str, HostState] = field(default_factory=dict)
    hang: Hang | None = None
    failed_at: float | None = None
    _states: dict[int, RankState] = field(default_factory=dict)
    _nodes: dict[str, str] = field(default_factory=dict)
    _rows: deque[list[float]] = field(default_factory=lambda: deque(maxlen=SLOW_STEPS))
    _slow: set[int] = field(default_factory=set)
    _launcher: Launcher | None = None
    _begun: set[str] = field(default_factory=set)
    _cleared: set[str] = field(default_factory=set)
    _drained: set[str] = field(default_factory=set)
    _looked: float = 0.0
    _stopping_since: float | None = None
    _launcher_gone: float | None = None

    def run(self) -> Observation:
        """Run the attempt to its end; afterwards none of its processes runs on a host that answers.

        Raises:
            ConfigError: the port of the recipe is taken, or a host cannot carry out its orders.
        """
        try:
            self._begin()
            self._watch()
            self._drain()
        finally:
            self._end()
        return Observation(
            errors=tuple(self.errors),
            ends=tuple(self.ends),
            hosts=tuple(self.hosts.values()),
            hang=self.hang,
            asked=self.asked(),
        )

    @property
    def step(self) -> int:
        """The last step that a rank is known to be at."""
        return max(state.step for state in self._states.values())

    def log_of(self, rank: int) -> Path:
        """Return the path of a rank's log."""
        host = next((host for host, ranks in self.plan.numbers().items() if rank in ranks), "")
        return log_path(self.handle.path, f"trainer-{max(rank, 0)}", self.handle.attempt, self._nodes.get(host, host))

    def _begin(self) -> None:
        numbers, evaluator = self.plan.numbers(), self.plan.evaluator
        hosts = [*numbers, *([evaluator[0]] if evaluator is not None and evaluator[0] not in numbers else [])]
        self.hosts = {host: HostState(host, ranks=tuple(numbers.get(host, ()))) for host in hosts}
        self._nodes = {host: str(self.links[host].facts.get("nodename", host)) for host in hosts}
        now = time.monotonic()
        step = self.handle.resume.step if self.handle.resume is not None else 0
        for host, ranks in numbers.items():
            # Nobody has started it yet, and what is not there cannot be silent.
            self._states |= {rank: RankState(rank, host, "start", step, now, math.inf) for rank in ranks}
        first = self.links[next(iter(numbers))]
        port = self._free_port(first)
        if port is None:
            return
        meeting = self.backend.meeting(first, port)
        run = Path(os.path.abspath(self.handle.path))
        # Not resolved: blobs lie in the run, wherever a link has put its checkpoints.
        resume = None if self.handle.resume is None else Path(os.path.abspath(self.handle.resume.path))
        separate = self.recipe.train.roles == "separate"
        launch = self.backend.launcher()
        tickets = None if launch is None else f"vitgraft-{secrets.token_hex(12)}"  # a name that cannot be guessed
        for host in hosts:
            environment = self.backend.environment(
                host, len(numbers.get(host, ())), self.plan.device, self.plan.threads
            )
            orders = Orders(
                run=str(run),
                attempt=self.handle.attempt,
                world=self.plan.world,
                ranks=numbers.get(host, []),
                tickets=tickets,
                arguments=rank_arguments(run, self.handle.attempt, self.plan.device, resume),
                environment={**environment, "MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)},
                silence=self.recipe.train.checkpoint.writer_silence_s if separate else None,
                evaluator=evaluator[1] if evaluator is not None and evaluator[0] == host else None,
            )
            self.links[host].send("begin", orders=orders.model_dump())
        if launch is not None and tickets is not None:
            # The agents listen before any ticket connects.
            self._wait(lambda: self._begun >= self._live() or self.failed_at is not None)
            if self.failed_at is None:
                self._launcher = launch(
                    LaunchOrder(run, self.handle.attempt, self.plan.ranks, meeting, tickets, self.plan.device)
                )

    def _free_port(self, first: AgentLink) -> int | None:
        wanted = self.recipe.launch.port
        try:
            answer = first.ask("port", "port", FIRST_ANSWER_S, wanted=wanted)
        except NoAnswer as error:
            self._lose(first.host, str(error))
            return None
        if "error" in answer:
            raise ConfigError(f"launch.port: {wanted}: {answer['error']}; choose another, or 0 for a free one")
        return int(answer["port"])

    def _live(self) -> set[str]:
        return {host for host in self.hosts if self.links[host].lost is None}

    def _watch(self) -> None:
        """Watch until all ranks have ended, were killed, or are lost with their hosts."""
        told = False
        while True:
            lost = {host for host in self.hosts if self.links[host].lost is not None}
            ended = {end.rank for end in self.ends}
            if all(rank in ended or state.host in lost | self._cleared for rank, state in self._states.items()):
                return
            self._turn()
            now = time.monotonic()
            if self.asked() is not None and self._stopping_since is None:
                self._stopping_since = now
                self._tell("stop")
            if not told and self._patience_over(now):
                told = True
                self._tell("end_ranks")
            self._see_launcher(now)

    def _patience_over(self, now: float) -> bool:
        """Tell whether live ranks are to be killed: the grace after a failure is over, or a stop waits for ranks that
        never started."""
        grace = 0.0 if self.hang is not None else GRACE_AFTER_FAILURE_S
        if self.failed_at is not None and now - self.failed_at > grace:
            return True
        waiting = self._stopping_since is not None and now - self._stopping_since > UNSTARTED_S
        return waiting and any(state.heard == math.inf for state in self._states.values())

    def _see_launcher(self, now: float) -> None:
        why = self._launcher.ended() if self._launcher is not None else None
        if why is None or self.failed_at is not None:
            return
        self._launcher_gone = self._launcher_gone or now
        # A signal to the whole job ends it too, perhaps before this process hears of it: the ranks stop in order then.
        if self.asked() is None and now - self._launcher_gone > LAUNCHER_GRACE_S:
            self._fail(ReportedError(-1, "", now, TrainingError.exit_code, why))

    def _drain(self) -> None:
        """Wait for the roles to finish, within a time-out as a disk may hang: uncommitted work is then dropped."""
        codes = {end.rank: end.code for end in self.ends}
        done = all(codes.get(rank) == 0 for rank in self._states)
        self._tell("drain", drop_copy=not done, evaluate=done)
        # The end of a run waits for the last copy and evaluation until a stop is requested; all is committed then.
        limit, began, hurried = math.inf if done else self.deadlines.limits()["save"], time.monotonic(), False
        while not self._drained >= self._live() and (taken := time.monotonic() - began) < limit:
            if self.asked() is not None and not hurried:
                hurried, limit = True, min(limit, taken + ASKED_DRAIN_S)
                if done:
                    self._tell("drain", drop_copy=True, evaluate=False)
            self._turn()
        left = sorted(self._live() - self._drained)
        if left:
            text = f"WARNING {', '.join(left)}: not finished within {limit:.0f} s, its disk may hang; ended as it is"
            self.screen.note(text)
            self.handle.event("roles_killed", hosts=left, text=text)

    def _end(self) -> None:
        for host in self._live():
            self.links[host].send("end")
        if self._launcher is not None:
            self._launcher.end()
        for host in self._live():
            try:
                self.links[host].ask("ping", "ended", 20.0)
            except NoAnswer as error:
                self._lose(host, str(error))

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._turn()

    def _tell(self, do: str, **facts: Any) -> None:
        for host in self._live():
            self.links[host].send(do, **facts)

    def _turn(self) -> None:
        """Wait briefly, read the messages, check the deadlines."""
        with selectors.DefaultSelector() as selector:
            for host in self._live():
                selector.register(self.links[host].wire.read, selectors.EVENT_READ)
            selector.select(0.1)
        for host in self._live():
            for message in self.links[host].receive():
                self._hear(host, message)
            if (why := self.links[host].silent()) is not None:
                self._lose(host, why)
        self.meanwhile()
        now = time.monotonic()
        if now - self._looked > LOOK_S and self.failed_at is None:
            self._looked = now
            self._look(now)

    def _look(self, now: float) -> None:
        ended = {end.rank for end in self.ends}
        # Of a silent host it is unknown whether its ranks are silent; it will count as lost soon.
        quiet = {host: now - self.links[host].heard for host in self._live()}
        living = [
            replace(state, heard=state.heard + quiet.get(state.host, 0.0))
            for rank, state in self._states.items()
            if rank not in ended
        ]
        self.hang = find_hang(living, self.deadlines.limits(), now, self.deadlines.silence)
        if self.hang is not None:
            self.failed_at = now
        stragglers = {straggler.rank: straggler for straggler in find_stragglers(list(self._rows))}
        for rank in stragglers.keys() - self._slow:
            found, host = stragglers[rank], self._states[rank].host
            text = f"rank {rank} on {host} is slow: {found.seconds:.3g} s a step, {found.ratio:.2g} times the others'"
            self.screen.note(text)
            self.handle.event("straggler", rank=rank, host=host, ratio=found.ratio, seconds=found.seconds, text=text)
        for rank in self._slow - stragglers.keys():
            self.handle.event("straggler_over", rank=rank, host=self._states[rank].host)
        self._slow = set(stragglers)

    def _lose(self, host: str, why: str) -> None:
        now = time.monotonic()
        self.links[host].lost = why
        self.hosts[host] = replace(self.hosts[host], lost_at=now)
        self.screen.note(f"{host} is lost: {why}")
        self.handle.event("host_lost", host=host, text=why)
        if self.plan.evaluator is not None and self.plan.evaluator[0] == host:
            self.screen.note(absence(host))
            self.handle.event("evaluator_absent", host=host, text=absence(host))
        ended = {end.rank for end in self.ends}
        if any(state.host == host and rank not in ended for rank, state in self._states.items()):
            self.failed_at = self.failed_at or now

    def _fail(self, error: ReportedError) -> None:
        self.errors.append(error)
        if error.code not in _NO_FAILURE:
            self.failed_at = self.failed_at or error.at

    def _hear(self, host: str, message: dict[str, Any]) -> None:
        say, now = message.get("say"), time.monotonic()
        if say == "alive":
            self._hear_alive(host, message, now)
        elif say == "relay":
            self._hear_process(host, int(message["rank"]), message["message"], now)
        elif say == "end" and message["rank"] in self._states:
            self.ends.append(RankEnd(message["rank"], host, now, message["code"], message["by_us"]))
            if message["code"] not in _NO_FAILURE:
                self.failed_at = self.failed_at or now
        elif say == "event":
            self.handle.event(message["name"], host=host, **message["facts"])
        elif say == "begun":
            self._begun.add(host)
        elif say == "ranks_ended":
            self._cleared.add(host)
        elif say == "drained":
            self._drained.add(host)
        elif say == "asked":
            self.ask(int(message["signal"]), host)
        elif say == "refused":
            text = f"{host} cannot carry out its orders: {message['text']}"
            self._begun.add(host)
            self._fail(ReportedError(-1, host, now, TrainingError.exit_code, text))

    def _hear_alive(self, host: str, message: dict[str, Any], now: float) -> None:
        self.hosts[host] = replace(self.hosts[host], memory_kills=message["memory_kills"], run_free=message["free"])
        for number, said in message["ranks"].items():
            rank = int(number)
            if rank not in self._states:
                continue  # its end would never be reported
            self._states[rank] = RankState(
                rank, host, said["phase"], said["step"], now - said["age"], now - said["quiet"]
            )
            if rank == 0:
                self._rows.extend(said.get("own", []))
                for phase, seconds in said.get("longest", {}).items():
                    self.deadlines.learn(phase, seconds)

    def _hear_process(self, host: str, rank: int, message: dict[str, Any], now: float) -> None:
        kind = message.get("kind")
        if kind == "progress":
            self.screen.progress(message["label"], message["done"], message["total"], message["facts"])
        elif kind == "note":
            self.screen.note(message["text"])
        elif kind == "event":
            self.screen.note(message["text"])
            self.handle.event(message["name"], text=message["text"])
        elif kind == "error":
            known = {key: message[key] for key in ("cause", "step") if message.get(key) is not None}
            self._fail(ReportedError(rank, host, now, message["code"], message["text"], **known))
