"""What the packers share: reading text and image files from outside, which may hold anything."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import DataError

MAX_JSON_BYTES = 4 << 30
MAX_LIST_BYTES = 1 << 30


def read_bytes(path: Path) -> bytes:
    """A whole file.

    Raises:
        DataError: missing or unreadable.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None


def read_text(path: Path, limit: int = MAX_LIST_BYTES) -> str:
    """A UTF-8 file of bounded size.

    Raises:
        DataError: missing, unreadable, too large or not UTF-8.
    """
    try:
        if path.stat().st_size > limit:
            raise DataError(f"{path}: larger than {limit} bytes; is this the right file?")
        return read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its name and permissions") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None


def read_json(path: Path) -> Any:
    """A JSON file of bounded size.

    Raises:
        DataError: missing, unreadable or not JSON; names the line.
    """
    try:
        return json.loads(read_text(path, MAX_JSON_BYTES))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; fix or download the file again") from None
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply; is this the right file?") from None
    except ValueError:
        # Python's own limit.
        raise DataError(f"{path}: JSON with a number of more than 4300 digits; is this the right file?") from None


def inside(folder: Path, name: Any, where: str) -> Path:
    """``folder/name`` for a name that a file from outside gives: it may not lead out of the folder.

    Raises:
        DataError: not a relative path that stays inside.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: file name {name!r}; expected a path relative to {folder}")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: file name {name!r} leads out of {folder}; expected a path inside it")
    return folder / path


def is_file(path: Path) -> bool:
    """Whether there is such a file; false for names that no file can have, of which ``Path.is_file`` raises."""
    return os.path.isfile(path)


def is_text(value: str) -> bool:
    """Whether this can be written as UTF-8: half a surrogate pair, from JSON or a file's name, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_folder(folder: Path) -> None:
    """Raises DataError unless ``folder`` is one."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; check the path")


def check_classes(classes: list[str], where: str) -> None:
    """Raises DataError unless there is at least one class name, all are text, and none occurs twice."""
    if not classes or not all(name.strip() for name in classes):
        raise DataError(f"{where}: no class names, or an empty one; give one name for each class")
    wrong = next((name for name in classes if not is_text(name)), None)
    if wrong is not None:
        raise DataError(f"{where}: class {wrong!r} holds what is no character; write the names as UTF-8")
    twice = next((name for name, count in Counter(classes).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{where}: class {twice!r} is listed twice; give each class one name")
