"""Read untrusted files, and open files in folders that other users can write to.

Everything that comes from outside (annotations, lists, recipes, manifests, what another process left in a run) is read
by these functions: regular files only, bounded, UTF-8, finite numbers, one line on what is wrong. A fifo or a device
does not block, a file that grows while it is read stays within its bound.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from vitgraft.configs.errors import ConfigError, DataError, VitgraftError

MAX_SMALL_BYTES = 64 << 20
"""Bound of files that vitgraft itself writes as text: events, results, recipes, manifests of checkpoints."""
_SAFE = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_CHUNK = 64 << 20


def open_regular(path: Path | str, flags: int = os.O_RDONLY, mode: int = 0o666, *, follow: bool = True) -> int:
    """Open a regular file without blocking on a fifo and without following a link where ``follow`` is false.

    Args:
        flags: as for ``os.open``.
        mode: permissions of a file that this call makes.
        follow: whether the last part of the path may be a symbolic link. False wherever others can write the folder.

    Returns:
        A descriptor, close-on-exec.

    Raises:
        OSError: as ``os.open``; ELOOP for a link, EINVAL for what is no regular file, EISDIR for a folder.
    """
    descriptor = os.open(path, flags | _SAFE | (0 if follow else os.O_NOFOLLOW), mode)
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def home_path(path: str | Path) -> Path:
    """Return a path whose ``~`` is the user's home folder; where there is no such user or home, ``~`` is a name."""
    return Path(os.path.expanduser(path))


def check_reachable(path: Path) -> None:
    """See that nothing but the path itself can be why a file is not found there.

    Raises:
        ConfigError: this user may not look into a folder on the way.
    """
    try:
        os.stat(path)
    except PermissionError as error:
        raise ConfigError(f"{path}: {error.strerror}; check the permissions of the folders above it") from None
    except (OSError, ValueError):
        pass


def is_own(facts: os.stat_result) -> bool:
    """Tell whether a file or folder belongs to this user and is writable by no other."""
    return facts.st_uid == os.geteuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def lock_within(descriptor: int, seconds: float, *, shared: bool = False) -> bool:
    """Take a lock on an open file, waiting for at most ``seconds``.

    Args:
        shared: take it together with other readers.

    Returns:
        False where another process still held it at the end.

    Raises:
        OSError: the file system has no locks.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def lock_holder(descriptor: int) -> str:
    """Describe the holder of a lock on an open file: the process, as far as it is visible to this host and
    container."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(os.fstat(descriptor).st_ino)
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            parts = line.split()
            # "1: FLOCK ADVISORY WRITE 4711 08:01:131 0 EOF", and with an arrow the ones who wait.
            if parts[1] == "FLOCK" and parts[5].rpartition(":")[2] == inode and int(parts[4]) > 0:
                name = Path(f"/proc/{int(parts[4])}/comm").read_text(encoding="utf-8", errors="replace").strip()
                return f"process {parts[4]} ({name})"
    return "a process of another host, user or container"


def read_bytes(path: Path, limit: int, error: type[VitgraftError] = DataError) -> bytes:
    """Read a whole regular file of at most ``limit`` bytes.

    Raises:
        ``error``: missing, unreadable, no regular file, too large.
    """
    try:
        descriptor = open_regular(path)
    except (OSError, ValueError) as problem:
        _refuse(path, problem, error)
    try:
        parts: list[bytes] = []
        left = limit + 1
        while left and (part := os.read(descriptor, min(left, _CHUNK))):
            parts.append(part)
            left -= len(part)
    except OSError as problem:
        _refuse(path, problem, error)
    finally:
        os.close(descriptor)
    if not left:
        raise error(f"{path}: larger than {limit:,} bytes; is this the right file?")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _refuse(path: Path, problem: OSError | ValueError, error: type[VitgraftError]) -> NoReturn:
    if isinstance(problem, FileNotFoundError):
        raise error(f"{path}: no such file; check the path") from None
    if isinstance(problem, ValueError):  # a name with a zero byte
        raise error(f"{str(path)!r}: no name that a file can have; check the path") from None
    if problem.errno in (errno.EINVAL, errno.ENXIO):
        raise error(f"{path}: not a regular file; give a file") from None
    if problem.errno == errno.EISDIR:
        raise error(f"{path}: a folder; give a file") from None
    raise error(f"{path}: cannot be read: {problem.strerror}; check its name and permissions") from None


def read_text(path: Path, limit: int, error: type[VitgraftError] = DataError) -> str:
    """Read a UTF-8 file of at most ``limit`` bytes; a byte-order mark is dropped.

    Raises:
        ``error``: as :func:`read_bytes`, or not UTF-8.
    """
    data = read_bytes(path, limit, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start}); convert it") from None


def parse_json(text: str | bytes, where: str, error: type[VitgraftError] = DataError, *, finite: bool = True) -> Any:
    """Parse JSON text.

    Args:
        where: the text's name for people.
        finite: refuse NaN, Infinity and numbers too large for a float; where false they are floats that the caller
            checks, or has no use for.

    Raises:
        ``error``: not JSON, nested too deeply, not UTF-8, or a number that cannot be taken.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise error(f"{where}: the number {digits[:40]} is not finite; fix the file")
        return value

    def constant(name: str) -> NoReturn:
        raise error(f"{where}: {name} is not a number of JSON; fix the file")

    try:
        return json.loads(text, parse_float=number, parse_constant=constant) if finite else json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"{where}:{problem.lineno}: not valid JSON: {problem.msg}; fix or fetch the file again") from None
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 text ({problem.reason} at byte {problem.start}); convert it") from None
    except RecursionError:
        raise error(f"{where}: JSON nested too deeply; is this the right file?") from None
    except ValueError:  # Python's own limit
        raise error(f"{where}: JSON with a number of more than 4300 digits; is this the right file?") from None


def read_json(path: Path, limit: int, error: type[VitgraftError] = DataError, *, finite: bool = True) -> Any:
    """Read a JSON file: :func:`read_bytes` and :func:`parse_json`, a byte-order mark dropped."""
    return parse_json(read_text(path, limit, error), str(path), error, finite=finite)


def json_rows(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file that several processes append to, such as events and metrics.

    A line that is torn, damaged, or not an object is passed over: one bad byte in a log must not keep a run from going
    on. Numbers may be NaN or infinite: a loss can be.
    """
    for line in data.split(b"\n"):
        try:
            row = parse_json(line, "row", finite=False) if line.strip() else None
        except DataError:
            continue
        if isinstance(row, dict):
            yield row
