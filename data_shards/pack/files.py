"""Reading of untrusted files and checks of names, shared by the packers."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from vitgraft.configs import files
from vitgraft.configs.errors import DataError
from vitgraft.data_shards.listing import composed
from vitgraft.data_shards.pack.other_formats import refuse_other_format
from vitgraft.data_shards.stream import MAX_SAMPLE_BYTES

MAX_JSON_BYTES = 4 << 30
MAX_LIST_BYTES = 1 << 30


def read_bytes(path: Path) -> bytes:
    """Read a file that becomes a member of a sample.

    Raises:
        DataError: missing, unreadable, no regular file, or larger than a sample.
    """
    return files.read_bytes(path, MAX_SAMPLE_BYTES)


def read_text(path: Path, limit: int = MAX_LIST_BYTES) -> str:
    """Read a UTF-8 file of bounded size.

    Raises:
        DataError: missing, unreadable, too large or not UTF-8.
    """
    return files.read_text(path, limit)


def read_json(path: Path) -> Any:
    """Read labels in JSON. Numbers may be NaN or infinite, as some tools write where they have none: the packers check
    those that they take.

    Raises:
        DataError: missing, unreadable, not JSON, or labels of another format; names the line.
    """
    refuse_other_format(path)
    return files.read_json(path, MAX_JSON_BYTES, finite=False)


def inside(folder: Path, name: Any, where: str) -> Path:
    """Return ``folder/name`` for a name that a file from outside gives: it may not lead out of the folder.

    Raises:
        DataError: not a relative path that stays inside.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: file name {str(name)[:80]!r}; expected a path relative to {folder}")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: file name {name!r} leads out of {folder}; expected a path inside it")
    return folder / path


def is_file(path: Path) -> bool:
    """Tell whether there is such a file; false for names that no file can have, of which ``Path.is_file`` raises."""
    return os.path.isfile(path)


def is_text(value: str) -> bool:
    """Tell whether this can be written as UTF-8: half a surrogate pair, from JSON or a file's name, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_folder(folder: Path) -> None:
    """Raise DataError unless ``folder`` is one."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; check the path")


def check_classes(classes: list[str], where: str) -> None:
    """Raise DataError unless there is at least one class name, all are text, and none occurs twice."""
    if not classes or not all(name.strip() for name in classes):
        raise DataError(f"{where}: no class names, or an empty one; give one name for each class")
    wrong = next((name for name in classes if not is_text(name)), None)
    if wrong is not None:
        raise DataError(f"{where}: class {wrong[:80]!r} holds what is no character; write the names as UTF-8")
    twice = next(
        (name for name, count in Counter(composed(name.strip()) for name in classes).items() if count > 1), None
    )
    if twice is not None:
        raise DataError(f"{where}: class {twice[:80]!r} is listed twice; give each class one name")
