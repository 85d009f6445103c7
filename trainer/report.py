"""Messages of a rank to its launcher: progress, notes and one-line errors, as JSON lines over a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from vitgraft.configs.errors import VitgraftError

PIPE_VARIABLE = "VITGRAFT_REPORT_FD"
_MAX_LINE = 4000  # below PIPE_BUF, so that lines of several ranks never mix


class Reporter:
    """Writes to the launcher's pipe; without one (a role run by hand) notes and errors go to stderr."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    @classmethod
    def from_environment(cls) -> Reporter:
        """Return a reporter on the launcher's pipe, if there is one."""
        value = os.environ.get(PIPE_VARIABLE)
        return cls(int(value) if value else None)

    def progress(self, label: str, done: int, total: int, **facts: float | str) -> None:
        """Send the progress of a task."""
        self._send({"kind": "progress", "label": label, "done": done, "total": total, "facts": facts})

    def note(self, text: str) -> None:
        """Send one line for the user."""
        self._send({"kind": "note", "text": text}, fallback=text)

    def beat(self, role: str, done: int, outstanding: int | None = None) -> None:
        """Send the heartbeat of a role, its work done since the start, and its current step."""
        self._send({"kind": "beat", "role": role, "pid": os.getpid(), "done": done, "outstanding": outstanding})

    def state(self, facts: dict[str, object]) -> None:
        """Send a rank's heartbeat (:mod:`vitgraft.trainer.heartbeat`)."""
        self._send({"kind": "state", **facts})

    def event(self, name: str, text: str) -> None:
        """Send an event for RUN/events.jsonl and the user."""
        self._send({"kind": "event", "name": name, "text": text}, fallback=text)

    def error(self, error: VitgraftError) -> None:
        """Send the error that ends this process: exit code and line, and the cause and the step where known."""
        self._send(error_message(error), fallback=f"vitgraft: {error}")

    def _send(self, message: dict[str, Any], fallback: str | None = None) -> None:
        if self._descriptor is None:
            if fallback is not None:
                print(fallback, file=sys.stderr, flush=True)
            return
        if "text" in message:
            # Names of files may have bytes that are no text.
            text = message["text"].encode(errors="backslashreplace")
            message["text"] = text[: _MAX_LINE - 200].decode(errors="ignore")
        # A launcher that died takes this process with it in a moment; its closed pipe is no error of ours.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._descriptor, (json.dumps(message, ensure_ascii=False) + "\n").encode(errors="surrogatepass"))


def error_message(error: VitgraftError) -> dict[str, Any]:
    """Return the message of an error to the launcher."""
    facts = {"code": error.exit_code, "text": str(error), "cause": error.cause, "step": error.step}
    return {"kind": "error", **facts}
