"""Facts of a host's GPUs from nvidia-smi and the kernel's log. Loads no CUDA, so it does not disturb their users."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any
from xml.etree import ElementTree

_TIMEOUT_S = 20.0
_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")


def read_gpus() -> dict[str, Any]:
    """``gpus``: one dictionary each (see :func:`parse_smi`); ``gpu_error``: why they are not known, or ``None``;
    ``xids``: the errors that the driver logged since the host started, where its log can be read."""
    if shutil.which("nvidia-smi") is None:
        return {"gpus": [], "gpu_error": None, "xids": []}
    try:
        done = subprocess.run(
            ["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"gpus": [], "gpu_error": f"nvidia-smi did not answer within {_TIMEOUT_S:g} s", "xids": read_xids()}
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"gpus": [], "gpu_error": f"nvidia-smi: {last[0]}", "xids": read_xids()}
    try:
        gpus = parse_smi(done.stdout)
    except ElementTree.ParseError as error:
        return {"gpus": [], "gpu_error": f"nvidia-smi gave no XML: {error}", "xids": read_xids()}
    return {"gpus": gpus, "gpu_error": None, "xids": read_xids()}


def parse_smi(text: str) -> list[dict[str, Any]]:
    """Return the GPUs in the output of ``nvidia-smi -q -x``.

    Each has ``name``, ``driver``, ``memory_mib``, ``uncorrected`` (ECC errors since the driver was loaded; ``None``
    where they are not counted), ``repair_pending`` and ``repair_failed`` (of its memory, by remapping rows or retiring
    pages).
    """
    root = ElementTree.fromstring(text)
    driver = root.findtext("driver_version", "unknown")
    return [
        {
            "name": gpu.findtext("product_name", "unknown"),
            "driver": driver,
            "memory_mib": _number(gpu.findtext("fb_memory_usage/total", "")) or 0,
            "uncorrected": _uncorrected(gpu),
            "repair_pending": _yes(gpu, "remapped_rows/remapped_row_pending")
            or _yes(gpu, "retired_pages/pending_retirement"),
            "repair_failed": _yes(gpu, "remapped_rows/remapped_row_failure"),
        }
        for gpu in root.findall("gpu")
    ]


def _uncorrected(gpu: ElementTree.Element) -> int | None:
    """Sum over what this generation counts: older drivers say double_bit/total, newer one row for each memory."""
    volatile = gpu.find("ecc_errors/volatile")
    if volatile is None:
        return None
    old = volatile.find("double_bit/total")
    rows = [old] if old is not None else [row for row in volatile if "_uncorrectable" in row.tag]
    counts = [_number(row.text or "") for row in rows]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _number(text: str) -> int | None:
    found = re.match(r"\d+", text)
    return int(found.group()) if found else None


def _yes(gpu: ElementTree.Element, path: str) -> bool:
    return gpu.findtext(path, "No").strip().lower() == "yes"


def read_xids() -> list[str]:
    """Return the driver's errors in the kernel's log, e.g. ``PCI:0000:19:00: 79``; empty where it may not be read."""
    if shutil.which("dmesg") is None:
        return []
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    return parse_xids(done.stdout)


def parse_xids(log: str) -> list[str]:
    """Return the distinct ``GPU: NUMBER`` of a kernel log, in order."""
    return list(dict.fromkeys(f"{gpu}: {number}" for gpu, number in _XID.findall(log)))
