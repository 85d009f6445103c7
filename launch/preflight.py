"""Checks that the hosts of a run are compatible, before their ranks start. ``vitgraft doctor`` checks more, also the
network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitgraft.configs.schema import Recipe
from vitgraft.launch import diagnosis
from vitgraft.launch.diagnosis import Finding
from vitgraft.launch.links import AgentLink, ask_all
from vitgraft.launch.remote_shell import NoAnswer

FACTS_S = 300.0
"""Reading the manifests of large data sets from a busy file system takes a while."""


def preflight(
    links: Sequence[AgentLink], recipe: Recipe, run: Path, slots: Mapping[str, int]
) -> tuple[dict[str, str], list[str]]:
    """Ask all hosts at once.

    Args:
        run: the run directory as all hosts see it, with its recipe in it.
        slots: ranks that each host is to hold.

    Returns:
        what makes hosts unfit, by host, with the remedy; and warnings.
    """
    question = {"ask": "facts", "recipe": str(run / "config.yaml"), "data": recipe.data.paths(), "run": str(run)}

    def ask(link: AgentLink) -> tuple[dict[str, Any], tuple[float, float]]:
        before, began = time.time(), time.monotonic()
        theirs = link.ask("answer", "answer", FACTS_S, question={"ask": "time"})["answer"]["time"]
        half = (time.monotonic() - began) / 2
        answer = link.ask("answer", "answer", FACTS_S, question=question)["answer"]
        return answer, (theirs - before - half, half)

    def one(link: AgentLink) -> tuple[dict[str, Any], tuple[float, float]] | NoAnswer:
        try:
            return ask(link)
        except NoAnswer as error:
            return error
        except (KeyError, TypeError):  # of another version, or its error
            return NoAnswer("its answer is not understood; install the same vitgraft there")

    answers = dict(zip((link.host for link in links), ask_all(links, one), strict=True))
    unfit = {host: str(said) for host, said in answers.items() if isinstance(said, NoAnswer)}
    said = {host: found for host, found in answers.items() if not isinstance(found, NoAnswer)}
    unfit |= {host: str(facts["error"]) for host, (facts, _) in said.items() if "error" in facts}
    facts = {host: found for host, (found, _) in said.items() if host not in unfit}
    if not facts:
        return unfit, []
    findings = [
        *diagnosis.judge_clock({host: skew for host, (_, skew) in said.items()}),
        *diagnosis.judge_versions(facts),
        *diagnosis.judge_recipe(facts),
        *diagnosis.judge_data(facts),
        *diagnosis.judge_gpus(facts, slots, recipe.launch.device),
        # How much room a run needs, its ranks know best: they refuse to start without.
        *[_as_warning(finding) for finding in diagnosis.judge_space(facts)],
    ]
    for finding in findings:
        if finding.level == "failure":
            for host in [finding.host] if finding.host is not None else list(facts):
                unfit.setdefault(host, f"{finding.check}: {finding.text}")
    warnings = [f"{f.host or 'all hosts'}: {f.check}: {f.text}" for f in findings if f.level == "warning"]
    return unfit, warnings


def _as_warning(finding: Finding) -> Finding:
    return Finding(finding.check, "warning", finding.host, finding.text) if finding.level == "failure" else finding
