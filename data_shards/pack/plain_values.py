"""Numbers and ids of JSON in a normal form, also where they are written as strings."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_NUMBER = 1e15
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,2})?")

STRINGS = "read from strings"
"""Text of a report on values that were written as strings."""

Key = int | str
"""An id."""


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number."""
    # Not math.isfinite: JSON has integers that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def as_number(value: Any) -> float | None:
    """Return the finite number that a value is or spells, else ``None``."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    return float(value) if is_number(value) else None


def as_integer(value: Any) -> int | None:
    """Return the integer that a value is or spells (``7``, ``7.0``, ``"7"``), else ``None``."""
    if isinstance(value, str):
        return int(value) if _INTEGER.fullmatch(value.strip()) else None
    return int(value) if is_number(value) and value == int(value) else None


def as_flag(value: Any) -> bool | None:
    """Return what a value that is true or false says (``true``, ``1``, ``"1"``; none is false), else ``None``."""
    if isinstance(value, bool):
        return value
    number = 0 if is_missing(value) else as_integer(value)
    return bool(number) if number in (0, 1) else None


def as_key(value: Any) -> Key | None:
    """Return an id: an integer where it can be read as one, other text as it is; ``None``: no id."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = as_integer(value)
    return number if number is not None else value if isinstance(value, str) and value.strip() else None


def order(key: Key) -> tuple[bool, Key]:
    """Sort ids by this: integers before text."""
    return isinstance(key, str), key


def is_missing(value: Any) -> bool:
    """Tell whether a value says that there is none: null, an empty list, object or text, or NaN."""
    if isinstance(value, float):
        return math.isnan(value)  # what tables write where a field is empty
    return value is None or (isinstance(value, list | dict | str) and not value)
