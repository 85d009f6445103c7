"""Requests to stop the run, and the command's exit after them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from vitgraft.configs.errors import InterruptedRun, PreemptedRun, VitgraftError
from vitgraft.launch import ending
from vitgraft.launch.run_dir import RunHandle
from vitgraft.launch.ui import Screen
from vitgraft.trainer.signals import signal_name


@dataclass
class StopWish:
    """Request to stop. ``asked``: its first signal, here or on another host. ``patient``: signals are only recorded,
    while ranks train and save first, or as the run is over."""

    handle: RunHandle
    screen: Screen
    asked: int | None = None
    patient: bool = False
    _hosts: set[str] = field(default_factory=set)
    _at_once: bool = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Handle signals of this process inside the block; unless patient, the handler calls :meth:`raise_if_asked`."""
        with _handled(self._on_signal):
            yield

    def ask(self, number: int, host: str = "") -> None:
        """Note a signal received on a host (empty: this one). A scheduler's signal reaches all hosts and counts once.

        Raises:
            InterruptedRun: Ctrl-C after an earlier request; once, as a third must not disturb how the run ends.
        """
        if host in self._hosts and number == signal.SIGINT:
            if self._at_once:
                self.screen.note("ending already")
                return
            self._at_once = True
            raise InterruptedRun("interrupted; the same command goes on from the last committed checkpoint")
        self._hosts.add(host)
        if self.asked is None:
            self.asked = number
            self.handle.event("stop_asked", signal=signal_name(number))
        elif host:
            return
        self.screen.note("stopping behind a checkpoint at the end of this step; Ctrl-C again ends at once")

    def raise_if_asked(self) -> None:
        """Raise if a stop was requested; for moments without a rank that could save a checkpoint.

        Raises:
            PreemptedRun, InterruptedRun: a stop was requested.
        """
        if self.asked is not None:
            raise stopped(self.asked, behind=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        ending = self._at_once
        self.ask(number)
        if not self.patient and not ending:
            # Whatever is waited for, e.g. other nodes, is not needed any more. One is enough: how the run ends is told.
            self.patient = True
            raise stopped(number, behind=False)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Stop at once on a signal inside the block, before the run starts; checks of a large checkpoint may take minutes.

    Raises:
        PreemptedRun, InterruptedRun: a signal came.
    """

    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise stopped(number, behind=False)

    with _handled(stop):
        try:
            yield
        finally:
            if asked:  # whatever a library that was being imported has made of it
                raise stopped(asked[0], behind=False)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # nohup has had the end of the terminal ignored.
    heard = [number for number in ending.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    except BaseException:
        ending.decide()  # with this the command ends, and no later signal has anything to say
        raise
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def stopped(asked: int, *, behind: bool) -> VitgraftError:
    """Return the error that ends the command after signal ``asked``; ``behind``: after a committed checkpoint."""
    committed = " behind a committed checkpoint" if behind else ""
    if asked == signal.SIGINT:
        return InterruptedRun(f"interrupted{committed}; the same command goes on from the last committed checkpoint")
    return PreemptedRun(f"stopped{committed}; the same command goes on from the last committed checkpoint")
