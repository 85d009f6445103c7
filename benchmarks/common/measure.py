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


def judged(found: dict[str, dict[str, float]], bounds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Of each bound on a median of :func:`ratios`, by reader: its value, and whether it is kept; absent peers are not.

    Args:
        bounds: the least that each ratio should be.
    """
    return {
        name: {"bound": bound, "kept": found[name]["median"] >= bound}
        for name, bound in bounds.items()
        if name in found
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


def show(title: str, summary: dict[str, Any], columns: dict[str, str], absent: str | None = None) -> None:
    """Print the table of a summary with ``samples_per_second``, ratios and ``bounds``.

    Args:
        columns: the ratios to print: heading by their key in the summary.
        absent: a peer that is not installed, and how to have it.
    """
    table = Table(title=title)
    table.add_column("reader")
    table.add_column("samples/s", justify="right")
    for heading in columns.values():
        for part in (heading, "min to max", "bound"):
            table.add_column(part, justify="right")
    for name, rate in summary["samples_per_second"].items():
        table.add_row(name, f"{rate['median']:,.0f}", *(cell for key in columns for cell in _cells(summary, key, name)))
    if absent:
        table.add_row(absent, "absent")
    Console(width=140).print(table)


def _cells(summary: dict[str, Any], key: str, name: str) -> list[str]:
    ratio, bound = summary[key].get(name), summary["bounds"].get(key, {}).get(name)
    cells = [f"{ratio['median']:.2f}", f"{ratio['min']:.2f} to {ratio['max']:.2f}"] if ratio else ["", ""]
    return [*cells, f"{bound['bound']:.2f} {'kept' if bound['kept'] else 'MISSED'}" if bound else ""]


def _cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
