"""The cores that a process may keep busy, from what the kernel says of control groups and affinity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitgraft.configs import cores
from vitgraft.configs.cores import asked_threads, cpu_quota, deciding_quota, usable_cores


def host(folder: Path, groups: str, mounts: dict[str, str], quotas: dict[str, str]) -> Path:
    """A /proc/self under ``folder``. ``mounts``: ROOT POINT, with what the file system is; ``quotas``: files."""
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(groups)
    lines = []
    for number, (where, what) in enumerate(mounts.items()):
        root, point = where.split()
        lines.append(f"{30 + number} 23 0:{number} {root} {folder}{point} rw,relatime shared:{number} - {what}\n")
    (folder / "proc" / "mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/sda1 rw\nodd\n" + "".join(lines))
    for name, text in quotas.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc"


V2 = {"/ /cg": "cgroup2 cgroup2 rw"}
V1 = {"/docker/abc /cg/memory": "cgroup cgroup rw,memory", "/docker/abc /cg/cpu": "cgroup cgroup rw,cpu,cpuacct"}


@pytest.mark.parametrize(
    ("groups", "mounts", "quotas", "expected"),
    [
        # Docker and Kubernetes: the container sees its own group as the root.
        ("0::/\n", V2, {"cg/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", V2, {"cg/cpu.max": "max 100000\n"}, None),
        ("0::/\n", V2, {}, None),
        # A job of a scheduler: the least of its own group and of those above it.
        ("0::/job/step\n", V2, {"cg/job/cpu.max": "400000 100000", "cg/job/step/cpu.max": "max 100000"}, 4.0),
        ("0::/job/step\n", V2, {"cg/job/cpu.max": "400000 100000", "cg/job/step/cpu.max": "200000 100000"}, 2.0),
        # A group that is not seen here: the mount point is all that is known.
        ("0::/../../elsewhere\n", V2, {"cg/cpu.max": "300000 100000"}, 3.0),
        # Version 1: its own files, in the hierarchy of the CPUs, seen from inside and from outside.
        (
            "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
            V1,
            {"cg/cpu/cpu.cfs_quota_us": "250000\n", "cg/cpu/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (
            "2:cpu,cpuacct:/docker/abc/inner\n",
            V1,
            {"cg/cpu/inner/cpu.cfs_quota_us": "50000\n", "cg/cpu/inner/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "2:cpu,cpuacct:/docker/abc\n",
            V1,
            {"cg/cpu/cpu.cfs_quota_us": "-1\n", "cg/cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/\n", V2, {"cg/cpu.max": "some text that is no quota"}, None),
        ("0::/\n", V2, {"cg/cpu.max": "100000 0"}, None),
    ],
)
def test_quotas(
    tmp_path: Path, groups: str, mounts: dict[str, str], quotas: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(host(tmp_path, groups, mounts, quotas)) == expected


def test_no_proc_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "usable", "decides"), [(None, 8, None), (64.0, 8, None), (8.0, 8, None), (2.5, 2, 2.5), (0.5, 1, 0.5)]
)
def test_the_less_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int, decides: float | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert (usable_cores(), deciding_quota()) == (usable, decides)


@pytest.mark.parametrize(
    ("value", "threads"),
    [(None, None), ("3", 3), (" 3,2 ", 3), ("", None), ("0", None), ("-1", None), ("many", None), ("9" * 5000, None)],
)
def test_the_threads_that_a_user_asks_for(value: str | None, threads: int | None) -> None:
    assert asked_threads({} if value is None else {"OMP_NUM_THREADS": value}) == threads
