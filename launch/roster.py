"""The hosts of a run: which of them answer, and the connections to their agents."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from vitgraft.launch.backends import Backend
from vitgraft.launch.hosts import Host
from vitgraft.launch.links import FIRST_ANSWER_S, AgentLink, ask_all
from vitgraft.launch.remote_shell import NoAnswer
from vitgraft.launch.stopping import StopWish

PING_S = 2.0


@dataclass
class Roster:
    """``folder``: in which relative paths of the recipe lie. ``stop``: what hosts that are asked to stop tell.
    ``links``: by host, also those that were lost."""

    backend: Backend
    folder: str
    stop: StopWish
    links: dict[str, AgentLink] = field(default_factory=dict)
    _made: list[AgentLink] = field(default_factory=list)
    _over: bool = False

    def is_lost(self, host: str) -> bool:
        """Tell whether a host did not answer, or no longer answers."""
        link = self.links.get(host)
        return link is None or link.lost is not None

    def answering(self) -> list[str]:
        """Return the hosts that answer, in the backend's order."""
        return [host.name for host in self.backend.hosts if not self.is_lost(host.name)]

    def connect(self, hosts: Sequence[Host], *, again: bool) -> dict[str, str]:
        """Start or wait for the agents of these hosts, all at once; returns why some do not answer.

        Args:
            again: the run has started before; nodes are not waited for as long then.

        Raises:
            PreemptedRun, InterruptedRun: one that is here already was asked to stop.
        """
        for link in [self.links.pop(host.name) for host in hosts if host.name in self.links]:
            link.close()
        self._made = [link for link in self._made if link.lost is None]
        failures, links, since = {}, list[AgentLink](), time.monotonic()

        def meanwhile() -> None:
            self._hear_wishes([*links, *self.backend.waiting()])
            self.stop.raise_if_asked()

        for host in hosts:
            # By this thread, which lives on: the kernel ends a process on this host with the thread that started it.
            try:
                links.append(self.backend.connect(host, again=again, since=since, meanwhile=meanwhile))
                self._made.append(links[-1])
            except NoAnswer as error:
                failures[host.name] = str(error)
        for link, failure in zip(links, ask_all(links, self._introduce), strict=True):
            if failure is not None:
                failures[link.host] = str(failure)
            else:
                self.links[link.host] = link
        return failures

    def hear_idle(self, used: Collection[str]) -> dict[str, str]:
        """Read messages of the idle hosts, also of those that wait to take part again; return newly lost hosts with the
        reason.

        Args:
            used: hosts that others hear.
        """
        idle = [link for host, link in self.links.items() if host not in used and link.lost is None]
        self._hear_wishes([*idle, *self.backend.waiting()])
        for link in idle:
            link.lost = link.silent()
        return {link.host: link.lost for link in idle if link.lost is not None}

    def _hear_wishes(self, links: Sequence[AgentLink]) -> None:
        for link in links:
            for message in link.receive():
                if message.get("say") == "asked":
                    self.stop.ask(int(message["signal"]), link.host)

    def quiet(self, seconds: float) -> list[str]:
        """Return the hosts that count as answering but have sent no message for so long."""
        now = time.monotonic()
        return [host for host in self.answering() if now - self.links[host].heard > seconds]

    def keep_calling(self) -> None:
        """Send heartbeats to the agents from now on, also while this process hashes a checkpoint."""
        threading.Thread(target=self._ping, name="ping", daemon=True).start()

    def dismiss(self, code: int) -> None:
        """Send the run's exit code to all agents, also of nodes that wait to take part again, and close the backend."""
        self._over = True
        links = [*self._made, *self.backend.waiting()]
        for link in links:
            link.send("leave", code=code)
        for link in links:
            link.close(patience=2.0)
        self.backend.close()

    def _introduce(self, link: AgentLink) -> NoAnswer | None:
        try:
            link.facts = link.ask("facts", "facts", FIRST_ANSWER_S, folder=self.folder)
        except NoAnswer as error:
            link.close()
            return error
        return None

    def _ping(self) -> None:
        while not self._over:
            for link in [*self._made, *self.backend.waiting()]:
                link.send("ping")
            time.sleep(PING_S)
