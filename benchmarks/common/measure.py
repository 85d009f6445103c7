"""Rounds of readers that take turns, and what a results file says of them and of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Run(NamedTuple):
    """One reader's work in one round: how long it took, how many samples, and a digest of all of them."""

    seconds: float
    samples: int
    digest: str


Reader = Callable[[int], Run]


def take_turns(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    """Samples per second of each reader in each round.

    Each round begins with another reader, so that whatever else the machine does falls on all of them. A first round
    warms the page cache and does not count.

    Args:
        readers: by name; called with the number of the round.

    Raises:
        RuntimeError: two readers delivered different samples.
    """
    rates: dict[str, list[float]] = {name: [] for name in readers}
    expected: tuple[int, str] | None = None
    for number in range(rounds + 1):
        turn = number % len(readers)
        for name, reader in [*readers.items()][turn:] + [*readers.items()][:turn]:
            run = reader(number)
            expected = expected or (run.samples, run.digest)
            if (run.samples, run.digest) != expected:
                raise RuntimeError(f"round {number}: {name} did not deliver the samples of the others")
            if number:
                rates[name].append(run.samples / run.seconds)
    return rates


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(rates: dict[str, list[float]], mine: str) -> dict[str, dict[str, float]]:
    """Of each other reader: mine / its, round by round."""
    return {
        name: spread([own / other for own, other in zip(rates[mine], values, strict=True)])
        for name, values in rates.items()
        if name != mine
    }


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, load and versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("vitgraft", *packages)}},
    }


def write(name: str, summary: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")


def show(title: str, summary: dict[str, Any], absent: str | None = None) -> None:
    """Print the table of a summary with ``samples_per_second`` and ``ratio``.

    Args:
        absent: a peer that is not installed, and how to have it.
    """
    table = Table(title=title)
    for column in ("reader", "samples/s", "vitgraft / it", "min", "max"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, rate in summary["samples_per_second"].items():
        ratio = summary["ratio"].get(name)
        cells = [f"{ratio[key]:.2f}" for key in ("median", "min", "max")] if ratio else ["", "", ""]
        table.add_row(name, f"{rate['median']:,.0f}", *cells)
    if absent:
        table.add_row(absent, "absent", "", "", "")
    Console(width=120).print(table)


def _cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
