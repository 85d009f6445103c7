"""How much memory this process may still take: of the host, and of the containers it runs in."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can be used without pushing anything else out (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return min([fields["MemAvailable"], *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group (version 2) around this process leaves, its page cache counted as free."""
    left: list[int] = []
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return left
    folder = _CGROUPS / own.removeprefix("0::").lstrip("/")
    while folder != _CGROUPS.parent:
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text())
                rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(int(limit) - used + int(rows["file"]) - int(rows["shmem"]))
        except (OSError, ValueError, KeyError):
            pass  # the root group has no limit; version 1 has other files
        folder = folder.parent
    return left
