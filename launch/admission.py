"""Accept authenticated nodes at the leader's port, which is open to any peer on the network.

One thread serves all connections that are not authenticated yet. They are bounded in number, time and bytes, so that
no peer can block the nodes or exhaust the leader's file descriptors.
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

from vitgraft.launch.handshake import HandshakeError, PendingConnection

MAX_PENDING = 128
REPORT_S = 60.0
"""Least time between two notes on connections that were refused."""
_AT_ONCE = 64


class Admission:
    """Accept and authenticate nodes until it is closed.

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
        self._pending: list[PendingConnection] = []
        """The oldest first."""
        # Of a low limit on descriptors most is left for the leader's own files.
        self._most = max(4, min(MAX_PENDING, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._refused, self._last_refused, self._reported = 0, "", -REPORT_S
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
                for peer in [peer for peer in self._pending if peer.connection in ready]:
                    self._receive(peer)
                now = time.monotonic()
                for peer in [peer for peer in self._pending if peer.deadline <= now]:
                    self._refuse(peer)
                if self._listener in ready:
                    self._accept()
                self._report()
        finally:
            for peer in self._pending:
                peer.connection.close()
            self._listener.close()
            self._selector.close()
            os.close(self._wake)

    def _patience(self) -> float | None:
        return max(0.0, self._pending[0].deadline - time.monotonic()) if self._pending else None

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # Mostly too many open files in this process.
                if self._pending:
                    self._refuse(self._pending[0])
                else:
                    time.sleep(0.1)
                return
            if len(self._pending) >= self._most:
                self._refuse(self._oldest_of_many())
            try:
                peer = PendingConnection(connection, str(address[0]).removeprefix("::ffff:"), self._secret, self._nodes)
            except OSError:
                connection.close()
                continue
            self._pending.append(peer)
            self._selector.register(connection, selectors.EVENT_READ)

    def _oldest_of_many(self) -> PendingConnection:
        """Return the oldest connection of the address with the most: a flood must not displace other peers."""
        [(address, _)] = Counter(peer.address for peer in self._pending).most_common(1)
        return next(peer for peer in self._pending if peer.address == address)

    def _receive(self, peer: PendingConnection) -> None:
        try:
            node = peer.receive()
        except (HandshakeError, OSError):
            self._refuse(peer)
            return
        if node is not None:
            self._forget(peer)
            self._welcome(node, peer.connection.detach())

    def _forget(self, peer: PendingConnection) -> None:
        self._pending.remove(peer)
        self._selector.unregister(peer.connection)

    def _refuse(self, peer: PendingConnection) -> None:
        self._forget(peer)
        peer.connection.close()
        self._refused += 1
        self._last_refused = peer.address

    def _report(self) -> None:
        now = time.monotonic()
        if not self._refused or now - self._reported < REPORT_S:
            return
        with contextlib.suppress(OSError):
            port = self._listener.getsockname()[1]
            self._note(
                f"WARNING port {port}: closed {self._refused} connections that did not prove to be nodes of this "
                f"run, the last from {self._last_refused}; only its nodes should reach this port"
            )
        self._refused, self._reported = 0, now
