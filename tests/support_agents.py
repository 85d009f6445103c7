"""Agents that are played: a supervisor talks to them as to those on real hosts, and they say what a test wants."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from vitgraft.configs.errors import PreemptedRun

Reply = Callable[[dict[str, Any]], list[dict[str, Any]]]


class PlayedAgent:
    """Stands for a link: ``reply`` says what the agent answers to an order."""

    def __init__(self, host: str, reply: Reply) -> None:
        self.host, self.reply = host, reply
        self.facts: dict[str, Any] = {"nodename": host, "address": "10.0.0.1", "gpus": 0, "cores": 2}
        self.lost: str | None = None
        self.gone: str | None = None
        self.quiet = 0.0
        self.told: list[dict[str, Any]] = []
        self._said: list[dict[str, Any]] = []
        read, self._write = os.pipe()
        self.wire = type("Wire", (), {"read": read})()

    def send(self, do: str, **facts: Any) -> None:
        if self.lost is None:
            self.told.append({"do": do, **facts})
            self.say(*self.reply(self.told[-1]))

    def say(self, *messages: dict[str, Any]) -> None:
        self._said += messages
        if messages:
            os.write(self._write, b".")

    def receive(self) -> list[dict[str, Any]]:
        said, self._said = self._said, []
        return said

    def close(self, patience: float = 0.0) -> None:
        self.lost = self.lost or "let go"

    @property
    def heard(self) -> float:
        return time.monotonic() - self.quiet

    def silent(self) -> str | None:
        return self.gone

    def ask(self, do: str, answer: str, timeout: float, **facts: Any) -> dict[str, Any]:
        self.told.append({"do": do, **facts})
        facts = self.facts if do == "facts" else {"port": 29000} if do == "port" else {}
        return {"say": answer, **facts}

    def orders(self) -> list[str]:
        return [message["do"] for message in self.told]


class Wishes:
    """Stands for the wish to stop. ``heard``: host and signal of each."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def ask(self, number: int, host: str = "") -> None:
        self.heard.append((host, number))

    def raise_if_asked(self) -> None:
        if self.heard:
            raise PreemptedRun("stopped; the same command goes on")


def ends(code: int, *ranks: int, by_us: bool = False) -> list[dict[str, Any]]:
    return [{"say": "end", "rank": rank, "code": code, "by_us": by_us} for rank in ranks]


def obedient(codes: dict[int, int]) -> Reply:
    """Ranks that end at once with these codes; those without one live until they are ended."""

    def reply(order: dict[str, Any]) -> list[dict[str, Any]]:
        if order["do"] == "begin":
            mine = [rank for rank in order["orders"]["ranks"] if rank in codes]
            return [{"say": "begun"}, *(message for rank in mine for message in ends(codes[rank], rank))]
        return {"drain": [{"say": "drained"}], "end_ranks": [{"say": "ranks_ended"}]}.get(order["do"], [])

    return reply
