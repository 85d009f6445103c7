"""Append-only JSON-lines files of a run: torn last lines, and which row of which attempt counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def drop_torn_line(path: Path) -> None:
    """Cut off the incomplete last line that a kill may have left."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def audited_history(path: Path) -> dict[int, dict[str, Any]]:
    """The last attempt's row for each step: what the run that counts did."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["step"] not in rows or row["attempt"] >= rows[row["step"]]["attempt"]:
            rows[row["step"]] = row
    return rows
