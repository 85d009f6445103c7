"""How the doctor's findings are shown, and what follows from them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.diagnosis import Finding


def show(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print the findings: a table on a terminal, else one line each; or JSON."""
    if as_json:
        ok = not any(finding.level == "failure" for finding in findings)
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=1))
    elif sys.stdout.isatty():
        table = Table("check", "host", "result", "what", box=None)
        colours = {"ok": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}
        for finding in findings:
            shown = f"[{colours[finding.level]}]{finding.level}[/]"
            table.add_row(finding.check, finding.host or "all", shown, finding.text.replace("[", r"\["))
        Console().print(table)
    else:
        for finding in findings:
            print(f"{finding.level:8s} {finding.check:11s} {finding.host or 'all hosts'}: {finding.text}")


def require_health(findings: Sequence[Finding]) -> None:
    """Stop here when something would stop a run.

    Raises:
        ConfigError: says how many failures there are and on which hosts.
    """
    failures = [finding for finding in findings if finding.level == "failure"]
    if failures:
        hosts = ", ".join(dict.fromkeys(finding.host or "all hosts" for finding in failures))
        first = failures[0]
        raise ConfigError(
            f"doctor: {len(failures)} of the checks failed on {hosts}; the first: {first.check}: {first.text}"
        )
