"""Queries to programs on other hosts over ssh, with time-outs."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.host_facts import ANSWER

Question = Mapping[str, Any]
_SSH_FAILED, _NOT_FOUND = 255, 127


class NoAnswer(Exception):
    """Error of a host that did not answer; the message has the cause and the remedy."""


def ssh_command(host: str, words: Sequence[str], ssh_args: Sequence[str], connect_s: float) -> list[str]:
    """Return a non-interactive ssh command to a host. ``ssh_args`` take precedence over the options set here."""
    options = ["-a", "-x", "-oBatchMode=yes", f"-oConnectTimeout={max(1, round(connect_s))}"]
    # A host that vanishes is noticed after half a minute of silence.
    options += ["-oServerAliveInterval=10", "-oServerAliveCountMax=3"]
    return ["ssh", *ssh_args, *options, host, shlex.join(words)]


class Conversation:
    """A running program that answers each line of JSON with one, here or on another host."""

    def __init__(self, host: str, command: Sequence[str]) -> None:
        self.host = host
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._buffer = b""
        self._over: NoAnswer | None = None
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self._complaints, start_new_session=True
            )
        except FileNotFoundError:
            self._complaints.close()
            raise ConfigError(
                f"{command[0]}: not installed here, and other hosts are asked by it; install it"
            ) from None

    def ask(self, question: Question, timeout: float) -> dict[str, Any]:
        """Return the answer to one question.

        Raises:
            NoAnswer: the program ended or is silent for ``timeout`` seconds; nothing more can be asked then.
        """
        if self._over is not None:
            raise self._over
        try:
            return self._ask(question, timeout)
        except NoAnswer as reason:
            self._over = reason
            self.close()
            raise

    def _ask(self, question: Question, timeout: float) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write((json.dumps(question) + "\n").encode())
            stdin.flush()
        except BrokenPipeError:
            raise NoAnswer(self._ended()) from None
        line = self._next_answer(time.monotonic() + timeout)
        if line is None:
            raise NoAnswer(
                f"no answer within {timeout:g} s; see whether the host is up, and whether its file system answers"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End the program at once; from any thread."""
        self._process.kill()

    def hang_up(self) -> None:
        """Close the program's input, which ends it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def close(self, patience: float = 0.0) -> None:
        """End the program; it may take ``patience`` seconds to end by itself."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._complaints.close()

    def _next_answer(self, deadline: float) -> str | None:
        stdout = self._process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._buffer.partition(b"\n")
                if newline:
                    self._buffer = rest
                    text = line.decode(errors="replace")
                    if text.startswith(ANSWER):
                        return text.removeprefix(ANSWER)
                    continue
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                block = os.read(stdout.fileno(), 1 << 16)
                if not block:
                    raise NoAnswer(self._ended())
                self._buffer += block

    def _ended(self) -> str:
        """Return why the program has ended, in one line."""
        code = self._process.wait()
        self._complaints.seek(0)
        return explain(code, self._complaints.read().decode(errors="replace"), self.host)


def explain(code: int, complaints: str, host: str) -> str:
    """Return why a program on another host has ended, and the remedy, from its exit code and stderr."""
    lines = complaints.strip().splitlines()
    said = lines[-1].strip() if lines else f"ended with code {code}"
    if code == _SSH_FAILED:
        return f"{said}; ssh {host} must work without a password (launch.ssh_args, VITGRAFT_SSH_CONFIG)"
    if code == _NOT_FOUND or "No such file" in said or "ModuleNotFoundError" in said or "No module named" in said:
        return f"{said}; vitgraft must be installed there under the same path as here"
    return said


def ask_all(
    conversations: Sequence[Conversation], question: Callable[[str], Question], timeout: float
) -> dict[str, dict[str, Any] | NoAnswer]:
    """Ask all hosts at once, each ``question(host)``; a host without an answer gives its error."""

    def one(conversation: Conversation) -> dict[str, Any] | NoAnswer:
        try:
            return conversation.ask(question(conversation.host), timeout)
        except NoAnswer as reason:
            return reason

    if not conversations:
        return {}
    with ThreadPoolExecutor(max_workers=len(conversations)) as pool:
        try:
            answers = list(pool.map(one, conversations))
        except BaseException:
            # Ctrl-C must not wait for the slowest host: with its program a question ends.
            for conversation in conversations:
                conversation.kill()
            raise
    return {conversation.host: answer for conversation, answer in zip(conversations, answers, strict=True)}
