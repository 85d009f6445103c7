"""Mutual authentication of a leader and its nodes: each answers the other's random challenge by its HMAC under the
run's secret, which is never sent itself. Until then the size and duration of all that is received are bounded."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from typing import Any

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import parse_json

HANDSHAKE_S = 10.0
"""Bound of a whole handshake, however slowly the other end speaks."""
MAX_LINE = 4096


class HandshakeError(Exception):
    """The peer has not proved that it knows the run's secret."""


class PendingConnection:
    """The leader's side of one handshake. It never waits: :meth:`receive` is called when something has come.

    Args:
        connection: just accepted; closed by the caller in the end.
        nodes: how many the run has; the others are 1 to ``nodes`` - 1.

    Raises:
        OSError: it is gone already.
    """

    def __init__(self, connection: socket.socket, address: str, secret: bytes, nodes: int) -> None:
        self.connection, self.address = connection, address
        self.deadline = time.monotonic() + HANDSHAKE_S
        self._secret, self._nodes = secret, nodes
        self._challenge = secrets.token_hex(32)
        self._line = b""
        connection.setblocking(False)
        connection.sendall(_line({"challenge": self._challenge}))

    def receive(self) -> int | None:
        """Return the node's number once it has proved that it is one and was answered; ``None``: not yet.

        Raises:
            HandshakeError: it is none.
            OSError: the connection broke.
        """
        try:
            block = self.connection.recv(MAX_LINE + 1 - len(self._line))
        except BlockingIOError:
            return None
        self._line += block
        if not block or len(self._line) > MAX_LINE:
            raise HandshakeError
        if b"\n" not in self._line:
            return None
        message = _message(self._line)
        node, challenge = message.get("node"), message.get("challenge")
        known = _proves(message.get("answer"), self._secret, "node", self._challenge)
        if not known or type(node) is not int or not 0 < node < self._nodes or not isinstance(challenge, str):
            raise HandshakeError
        self.connection.sendall(_line({"answer": _answer(self._secret, "leader", challenge)}))
        return node


def introduce(address: tuple[str, int], secret: bytes, node: int) -> int:
    """Connect to the leader as this node; returns the descriptor of the connection.

    Raises:
        OSError: the connection is refused, or times out.
        HandshakeError: who listens there does not know the secret; the message says so.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    with socket.create_connection(address, timeout=HANDSHAKE_S) as connection:
        challenge = secrets.token_hex(32)
        asked = _receive(connection, deadline).get("challenge")
        if not isinstance(asked, str):
            raise HandshakeError("who listens there is no leader of vitgraft")
        connection.sendall(_line({"node": node, "answer": _answer(secret, "node", asked), "challenge": challenge}))
        if not _proves(_receive(connection, deadline).get("answer"), secret, "leader", challenge):
            raise HandshakeError("who listens there does not know the run's secret")
        return connection.detach()


def _receive(connection: socket.socket, deadline: float) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        # What is left, and never 0, which would mean not to wait at all.
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            # One at a time: what follows the line is not ours to read.
            block = connection.recv(1)
        except TimeoutError:
            raise TimeoutError(f"who listens there does not answer within {HANDSHAKE_S:g} s") from None
        if not block or len(line) >= MAX_LINE:
            raise HandshakeError("who listens there is no leader of this run")
        line += block
    return _message(line)


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = parse_json(line, "handshake")
    except DataError:
        raise HandshakeError("who listens there is no leader of vitgraft") from None
    return message if isinstance(message, dict) else {}


def _line(message: dict[str, Any]) -> bytes:
    return (json.dumps(message) + "\n").encode()


def _answer(secret: bytes, side: str, challenge: str) -> str:
    # The side is part of it, so that an answer cannot be reflected to its sender.
    return hmac.new(secret, f"{side} {challenge}".encode(errors="replace"), "sha256").hexdigest()


def _proves(answer: object, secret: bytes, side: str, challenge: str) -> bool:
    given = answer.encode(errors="replace") if isinstance(answer, str) else b""
    return hmac.compare_digest(given, _answer(secret, side, challenge).encode())
