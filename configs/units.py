"""Quantities as text, formatted alike everywhere."""

from __future__ import annotations

import math


def counted(number: int, noun: str) -> str:
    """Return a number with its unit: ``1 thread``, ``1,200 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration: ``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``; ``?`` where it is unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
