"""Number of cores this process may use: its CPU affinity, and the CPU quota of its container (cgroup version 1 or
2), which the kernel enforces by throttling all its threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

THREADS_VARIABLE = "OMP_NUM_THREADS"


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    quota = deciding_quota()
    return _affinity() if quota is None else max(1, math.floor(quota))


def deciding_quota() -> float | None:
    """Return the CPU quota, in cores, where it allows less than the affinity; else ``None``."""
    quota = cpu_quota()
    return quota if quota is not None and quota < _affinity() else None


def asked_threads(environment: Mapping[str, str]) -> int | None:
    """Return the threads that a user's ``OMP_NUM_THREADS`` requests; ``None``: not set, or invalid for OpenMP."""
    # A list is for nested parallel regions; the first is the outermost.
    first = environment.get(THREADS_VARIABLE, "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and 0 < int(first[:9]) <= 1 << 16 else None


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """Return the CPU quota, in cores, of the process's control group and its visible ancestors.

    Args:
        proc: of the process: its files ``cgroup`` and ``mountinfo``.
    """
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" ") for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return None
    quotas = []
    for version, root, point in _hierarchies(mounts):
        for _, controllers, path in (group for group in groups if len(group) == 3):
            if (controllers == "") if version == 2 else ("cpu" in controllers.split(",")):
                quotas += [quota for folder in _folders(point, root, path) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hierarchies(mounts: list[list[str]]) -> Iterator[tuple[int, str, Path]]:
    """Yield version, root within the hierarchy and mount point of each hierarchy that limits CPUs."""
    for words in mounts:
        # ID PARENT DEVICE ROOT POINT OPTIONS [TAGS…] - TYPE SOURCE SUPER_OPTIONS
        if "-" not in words[6:] or len(words) < words.index("-", 6) + 4:
            continue
        kind, _, options = words[words.index("-", 6) + 1 :][:3]
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            yield (2 if kind == "cgroup2" else 1), words[3], Path(words[4].encode().decode("unicode_escape"))


def _folders(point: Path, root: str, path: str) -> list[Path]:
    """Return the group's folder and those above it, up to the mount point.

    A container may see its own group at the mount point, whatever its name is outside.
    """
    inside = path.removeprefix(root) if root != "/" else path
    folder = point / inside.lstrip("/")
    if ".." in folder.parts or not folder.is_dir():
        return [point]
    return [folder, *(above for above in folder.parents if above == point or point in above.parents)]


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        cores = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
    return cores if cores > 0 else None  # version 1 writes -1 where there is none
