"""The supervisor's agent on a host: ``python -m vitgraft.launch.agent --host NAME``.

It takes orders from the supervisor, one JSON object a line on its standard input, and tells what it sees on its
standard output. It owns the host's processes: they die with it, and it ends them when the supervisor is gone (its pipe
closed) or silent for half a minute, as when the network is cut. It never imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vitgraft.configs.cores import deciding_quota, usable_cores
from vitgraft.configs.errors import TrainingError
from vitgraft.launch.free_space import FreeSpace
from vitgraft.launch.gang import HostGang, Orders
from vitgraft.launch.predecessor import end_predecessor
from vitgraft.launch.wire import Wire
from vitgraft.trainer.rank import die_with_parent
from vitgraft.trainer.signals import OF_THE_JOB, ignore_job_signals

ALIVE_S = 1.0
SILENCE_S = 30.0
"""Seconds of silence after which the supervisor counts as gone; it sends a message every few seconds."""
LOCK_VARIABLE = "VITGRAFT_LOCK_FD"
_TICK_S = 0.1
_NOT_UNDERSTOOD = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""Exceptions of malformed orders, as from another version, or of a foreign ticket."""
_PEER = struct.Struct("3i")  # pid, user, group


class Agent:
    """One host's side of the supervisor.

    Args:
        host: this host's name, as the supervisor calls it.
        lock: open descriptor of RUN/lock, where this host's supervisor owns the run.
    """

    def __init__(self, wire: Wire, host: str, lock: int | None) -> None:
        self._wire, self._host, self._lock = wire, host, lock
        self._gang: HostGang | None = None
        self._space: FreeSpace | None = None
        self._listener: socket.socket | None = None
        self._tickets: list[Wire] = []
        self._strange: list[Wire] = []
        self._heard = time.monotonic()
        self._told = 0.0
        self._memory_kills = 0
        self._code: int | None = None
        self._asked = 0
        self.left_alone = False
        """Whether it ended because the supervisor was gone."""
        self._answers: dict[str, Callable[[dict[str, Any]], None]] = {
            "facts": self._facts,
            "port": self._port,
            "answer": self._answer,
            "begin": self._begin,
            "stop": lambda _: self._gang.stop() if self._gang else None,
            "end_ranks": self._end_ranks,
            "drain": self._drain,
            "end": self._end,
            "leave": self._leave,
            "ping": lambda _: None,
        }

    def ask_to_stop(self, number: int) -> None:
        """Pass a signal of this host on to the supervisor."""
        self._asked = number

    def serve(self) -> int:
        """Serve until the supervisor sends the exit code or is gone; return the exit code. No process is left."""
        try:
            with selectors.DefaultSelector() as selector:
                while self._code is None:
                    self._wait(selector)
                    self._turn()
        finally:
            if self._gang is not None:
                self._gang.end()
            self._forget_space()
            self._close_tickets()
        return self._code

    def _wait(self, selector: selectors.BaseSelector) -> None:
        wanted = {self._wire.read, *(wire.read for wire in (*self._tickets, *self._strange))}
        wanted |= {self._listener.fileno()} if self._listener is not None else set()
        wanted |= set(self._gang.descriptors()) if self._gang is not None else set()
        for descriptor in set(selector.get_map()) - wanted:
            selector.unregister(descriptor)
        for descriptor in wanted - set(selector.get_map()):
            selector.register(descriptor, selectors.EVENT_READ)
        selector.select(_TICK_S)

    def _turn(self) -> None:
        for message in self._wire.receive():
            self._obey(message)
            # Afterwards: what was said while an order took its time is still to be read.
            self._heard = time.monotonic()
        self._wire.flush()
        now = time.monotonic()
        if self._code is None and (self._wire.closed or now - self._heard > SILENCE_S):
            why = "its connection closed" if self._wire.closed else f"nothing was heard of it for {SILENCE_S:g} s"
            print(f"vitgraft agent on {self._host}: the supervisor is gone ({why}); ending", file=sys.stderr)
            self._code, self.left_alone = TrainingError.exit_code, True
        if self._asked:
            self._say({"say": "asked", "signal": self._asked})
            self._asked = 0
        self._hear_tickets()
        if self._gang is not None:
            with self._told_of("the agent cannot look after its processes"):
                self._gang.tend()
            if not self._gang.descriptors():
                time.sleep(_TICK_S)
        if now - self._told >= ALIVE_S:
            self._told = now
            self._say_alive()

    def _obey(self, message: dict[str, Any]) -> None:
        answer = self._answers.get(str(message.get("do")))
        if answer is None:
            return
        try:
            answer(message)
        except (OSError, *_NOT_UNDERSTOOD) as error:
            self._say({"say": "refused", "text": f"{type(error).__name__}: {' '.join(str(error).split())}"})

    @contextlib.contextmanager
    def _told_of(self, what: str) -> Iterator[None]:
        """Fail the gang, not the agent, on a system or message error: the agent must still end its processes."""
        try:
            yield
        except (OSError, *_NOT_UNDERSTOOD) as error:
            if self._gang is not None:
                self._gang.fail(what, error)

    def _say(self, message: dict[str, Any]) -> None:
        self._wire.send(message)

    def _say_alive(self) -> None:
        message: dict[str, Any] = {"say": "alive", "ranks": {}, "memory_kills": 0, "free": None}
        if self._gang is not None:
            message["ranks"] = self._gang.states()
            message["memory_kills"] = memory_kills() - self._memory_kills
            message["free"] = self._space.free if self._space is not None else None
        self._say(message)

    def _facts(self, message: dict[str, Any]) -> None:
        from vitgraft.launch.devices import count_gpus
        from vitgraft.launch.network_probe import own_address

        # Where the supervisor is: a relative path of the recipe means the same on all hosts.
        os.chdir(message["folder"])
        facts = {
            "gpus": count_gpus(),
            "cores": usable_cores(),
            "quota": deciding_quota(),
            "address": own_address(os.environ),
            "nodename": os.uname().nodename,
        }
        self._say({"say": "facts", **facts})

    def _port(self, message: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", message["wanted"]))
            except OSError as error:
                self._say({"say": "port", "error": error.strerror})
                return
            self._say({"say": "port", "port": probe.getsockname()[1]})

    def _answer(self, message: dict[str, Any]) -> None:
        from vitgraft.launch.host_facts import answer_to
        from vitgraft.launch.network_probe import NetworkProbe

        self._say({"say": "answer", "answer": answer_to(message["question"], NetworkProbe())})

    def _begin(self, message: dict[str, Any]) -> None:
        if self._gang is not None:
            self._gang.end()
        orders = Orders.model_validate(message["orders"])
        end_predecessor(Path(orders.run), self._host)
        self._memory_kills = memory_kills()
        self._forget_space()
        self._space = FreeSpace(Path(orders.run), ALIVE_S)
        self._gang = HostGang(orders, self._say, self._lock)
        if orders.tickets is not None:
            # In the kernel's own name space: nothing is left behind, and each host has its own.
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"\0{orders.tickets}")
            self._listener.listen()
            self._listener.setblocking(False)
        self._gang.start()
        self._say({"say": "begun"})

    def _end_ranks(self, message: dict[str, Any]) -> None:
        if self._gang is not None:
            self._gang.end_ranks()
            self._gang.tend()
        self._say({"say": "ranks_ended"})

    def _drain(self, message: dict[str, Any]) -> None:
        self._close_tickets()
        if self._gang is None:
            self._say({"say": "drained"})
        else:
            self._gang.drain(drop_copy=message["drop_copy"], evaluate=message["evaluate"])

    def _end(self, message: dict[str, Any]) -> None:
        self._close_tickets()
        if self._gang is not None:
            self._gang.end()
            self._gang = None
        self._forget_space()
        self._say({"say": "ended"})

    def _forget_space(self) -> None:
        if self._space is not None:
            self._space.close()
            self._space = None

    def _leave(self, message: dict[str, Any]) -> None:
        self._code = int(message["code"])

    def _hear_tickets(self) -> None:
        """Accept the tickets that DeepSpeed's launcher starts, one a rank, and start each rank with its environment."""
        if self._listener is not None:
            refused = self._told_of("the agent cannot hear the launcher")
            with refused, contextlib.suppress(BlockingIOError, ConnectionError):
                connection, _ = self._listener.accept()
                peer = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
                if peer[1] == os.geteuid():
                    descriptor = connection.detach()
                    self._strange.append(Wire(descriptor, descriptor))
                else:
                    connection.close()
        for wire in list(self._strange):
            for message in wire.receive()[:1]:
                self._strange.remove(wire)
                self._tickets.append(wire)
                if self._gang is not None:
                    with self._told_of("the agent cannot start a rank"):
                        self._gang.start_rank(int(message["environment"]["RANK"]), message["environment"])
            if wire.closed and wire in self._strange:
                self._strange.remove(wire)
                wire.close()
        for wire in list(self._tickets):
            wire.receive()
            if wire.closed:
                self._tickets.remove(wire)
                wire.close()

    def _close_tickets(self) -> None:
        """Close the tickets' connections, which ends them and DeepSpeed's launcher."""
        for wire in (*self._tickets, *self._strange):
            wire.close()
        self._tickets, self._strange = [], []
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def memory_kills() -> int:
    """Return the number of processes that this host's kernel has killed for lack of memory since it started."""
    kills = [0]
    for path, name in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        with contextlib.suppress(OSError):
            lines = [line.split() for line in Path(path).read_text().splitlines()]
            kills += [int(words[1]) for words in lines if words[0] == name]
    return max(kills)


def _choose_interface() -> None:
    """Set gloo's network interface to that of the leader's connection: gloo would listen at the address of the host's
    own name. A setting of the user, here or on the leader's host, takes precedence."""
    from vitgraft.launch.network_probe import interface_of, login_address

    address = login_address(os.environ)
    if address is not None and (interface := interface_of(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def main(arguments: list[str] | None = None) -> int:
    """Serve the supervisor at the other end of standard input and output."""
    parser = argparse.ArgumentParser(prog="python -m vitgraft.launch.agent", description=__doc__)
    parser.add_argument("--host", required=True, help="this host's name in the hostfile")
    options = parser.parse_args(arguments)
    if LOCK_VARIABLE in os.environ:
        # On the supervisor's own host. Over ssh its parent is a shell, and the closed pipe tells.
        die_with_parent()
    else:
        _choose_interface()
    # What is printed by mistake must not get between the messages.
    out = os.dup(1)
    os.dup2(2, 1)
    # What a login shell has printed may lack its newline, and would take the first message with it.
    os.write(out, b"\n")
    lock = os.environ.get(LOCK_VARIABLE)
    agent = Agent(Wire(0, out), options.host, int(lock) if lock else None)
    # A job's SIGTERM reaches every process of a host; the supervisor gets its own. Here they are blocked until now.
    ignore_job_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_JOB)
    return agent.serve()


if __name__ == "__main__":
    sys.exit(main())
