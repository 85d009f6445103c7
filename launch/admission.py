"""Who comes in at the leader's port, which anybody on the network may reach.

One thread serves all who have not proved yet that they are nodes of the run. They are bounded in number, time and
bytes, so that nobody can keep the nodes out or take the descriptors that the leader needs for itself.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from vitgraft.launch.handshake import Stranger, Visitor

MAX_VISITORS = 128
REPORT_S = 60.0
"""How often strangers are told of at most."""
_AT_ONCE = 64


class Admission:
    """Lets nodes in until it is closed.

    Args:
        listener: bound and listening; closed with this.
        welcome: takes a node's number and the descriptor of its connection; called in the thread of this object.
        note: shows a line.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: bytes,
        nodes: int,
        welcome: Callable[[int, int], None],
        note: Callable[[str], None],
    ) -> None:
        self._listener, self._secret, self._nodes = listener, secret, nodes
        self._welcome, self._note = welcome, note
        self._visitors: list[Visitor] = []
        """The oldest first."""
        # Of a low limit on descriptors most is left for the leader's own files.
        self._most = max(4, min(MAX_VISITORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._strangers, self._last_stranger, self._reported = 0, "", -REPORT_S
        self._wake, self._closing = os.pipe()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="admission", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        if self._closing >= 0:
            os.close(self._closing)
            self._closing = -1
            self._thread.join()

    def _serve(self) -> None:
        try:
            while True:
                ready = {key.fileobj for key, _ in self._selector.select(self._patience())}
                if self._wake in ready:
                    return
                # Before others come in their place.
                for visitor in [visitor for visitor in self._visitors if visitor.connection in ready]:
                    self._hear(visitor)
                now = time.monotonic()
                for visitor in [visitor for visitor in self._visitors if visitor.deadline <= now]:
                    self._dismiss(visitor)
                if self._listener in ready:
                    self._accept()
                self._report()
        finally:
            for visitor in self._visitors:
                visitor.connection.close()
            self._listener.close()
            self._selector.close()
            os.close(self._wake)

    def _patience(self) -> float | None:
        return max(0.0, self._visitors[0].deadline - time.monotonic()) if self._visitors else None

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # Mostly too many open files in this process.
                if self._visitors:
                    self._dismiss(self._visitors[0])
                else:
                    time.sleep(0.1)
                return
            if len(self._visitors) >= self._most:
                self._dismiss(self._oldest_of_many())
            try:
                visitor = Visitor(connection, str(address[0]).removeprefix("::ffff:"), self._secret, self._nodes)
            except OSError:
                connection.close()
                continue
            self._visitors.append(visitor)
            self._selector.register(connection, selectors.EVENT_READ)

    def _oldest_of_many(self) -> Visitor:
        """The oldest from the address that most come from: a flood must not push out who comes from elsewhere."""
        [(address, _)] = Counter(visitor.address for visitor in self._visitors).most_common(1)
        return next(visitor for visitor in self._visitors if visitor.address == address)

    def _hear(self, visitor: Visitor) -> None:
        try:
            node = visitor.hear()
        except (Stranger, OSError):
            self._dismiss(visitor)
            return
        if node is not None:
            self._forget(visitor)
            self._welcome(node, visitor.connection.detach())

    def _forget(self, visitor: Visitor) -> None:
        self._visitors.remove(visitor)
        self._selector.unregister(visitor.connection)

    def _dismiss(self, visitor: Visitor) -> None:
        self._forget(visitor)
        visitor.connection.close()
        self._strangers += 1
        self._last_stranger = visitor.address

    def _report(self) -> None:
        now = time.monotonic()
        if not self._strangers or now - self._reported < REPORT_S:
            return
        with contextlib.suppress(OSError):
            port = self._listener.getsockname()[1]
            self._note(
                f"WARNING port {port}: closed {self._strangers} connections that did not prove to be nodes of this "
                f"run, the last from {self._last_stranger}; only its nodes should reach this port"
            )
        self._strangers, self._reported = 0, now
