"""Non-blocking exchange of JSON objects, one a line, between processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import parse_json

MAX_UNSENT = 16 << 20
"""Bytes that wait for a reader; one that takes nothing for so long is as good as gone."""
MAX_MESSAGE = 2 << 20
"""Bytes of a line; the end that sends longer ones is as good as gone, too."""
_AT_ONCE = 4 << 20
"""Largest number of bytes read in one call, so that a fast sender does not starve the others."""
_BLOCK = 1 << 16


class Wire:
    """One end of a connection. ``closed``: nothing more can come, or the other end takes nothing though it lives.

    A write that fails closes nothing: what the other end has said before it went is still to be read.

    Args:
        read, write: descriptors, which may be the same; they are made non-blocking.
    """

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.closed = False
        self._mute = self._released = False
        self._came = bytearray()
        self._unsent = bytearray()
        for descriptor in {read, write}:
            os.set_blocking(descriptor, False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it now, or with the next :meth:`flush` as far as the other end does not read."""
        if self._mute:
            return
        self._unsent += (json.dumps(message, ensure_ascii=False) + "\n").encode(errors="surrogatepass")
        self.flush()

    def flush(self) -> None:
        """Send what is still unsent, without waiting."""
        try:
            while self._unsent and not self._mute and not self.closed:
                del self._unsent[: os.write(self.write, self._unsent[:_BLOCK])]
        except BlockingIOError:
            self.closed = len(self._unsent) > MAX_UNSENT
        except OSError:
            self._mute = True
            self._unsent.clear()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages since the last call, without waiting. Lines that are no JSON objects (such as output of a
        login shell) are dropped."""
        taken = 0
        while not self.closed and taken < _AT_ONCE:
            try:
                block = os.read(self.read, _BLOCK)
            except BlockingIOError:
                break
            except OSError:
                block = b""
            self.closed = not block
            self._came += block
            taken += len(block)
        *lines, self._came = self._came.split(b"\n")
        if max(map(len, (*lines, self._came))) > MAX_MESSAGE:
            self.closed = True
            lines = [line for line in lines if len(line) <= MAX_MESSAGE]
            self._came.clear()
        messages = []
        for line in lines:
            with contextlib.suppress(DataError):
                message = parse_json(bytes(line), "message", finite=False)
                if isinstance(message, dict):
                    messages.append(message)
        return messages

    def close(self) -> None:
        """Close the descriptors, which ends the other side's input. Idempotent, as their numbers may be reused."""
        self.closed = self._mute = True
        if self._released:
            return
        self._released = True
        for descriptor in {self.read, self.write}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
