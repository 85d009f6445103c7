"""``vitgraft doctor``: run the same checks on every host before a run, and report what would fail, where and why."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgraft.configs.load import default_run, find_recipe, load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch import diagnosis
from vitgraft.launch.deepspeed_launch import forwarded_environment
from vitgraft.launch.diagnosis import Finding
from vitgraft.launch.host_facts import nearest_existing
from vitgraft.launch.hosts import Host, read_hostfile, ssh_arguments
from vitgraft.launch.remote_shell import Conversation, NoAnswer, Question, ask_all, ssh_command
from vitgraft.launch.ui import Screen

ASKED = (sys.executable, "-P", "-m", "vitgraft.launch.host_facts")
FACTS_S, NETWORK_S, REDUCE_S = 300.0, 60.0, 60.0
"""Time-outs of reading the data, a measurement of the network and an all-reduce, in seconds."""
_CONNECT_S = 5.0
_FAREWELL_S = 5.0
_SENDING_S = 0.5
_MAX_DISTANCE = 3


@dataclass(frozen=True)
class Examination:
    """Subject of the checks. ``recipe_name``: the name or path by which all hosts find the recipe."""

    hosts: Sequence[Host] | None
    recipe: Recipe | None
    recipe_name: str | None
    run: Path | None
    ssh_args: Sequence[str]
    timeout: float
    asked: Sequence[str] = ASKED


def case_of(recipe_name: str | None, hostfile: Path | None, run: Path | None, timeout: float) -> Examination:
    """Return the examination that a command line asks for.

    Raises:
        ConfigError: a wrong recipe, hostfile or ssh argument.
    """
    recipe = None
    if recipe_name is not None:
        path = find_recipe(recipe_name)
        recipe = load_recipe(recipe_name)
        # A packaged recipe is found by its name on every host; a file, by its path.
        recipe_name = str(path.absolute()) if Path(recipe_name).is_file() else recipe_name
        run = run or default_run(recipe)
    return Examination(
        hosts=None if hostfile is None else read_hostfile(hostfile),
        recipe=recipe,
        recipe_name=recipe_name,
        run=None if run is None else run.absolute(),
        ssh_args=ssh_arguments(recipe.launch.ssh_args if recipe is not None else [], os.environ),
        timeout=timeout,
    )


@dataclass
class Patients:
    """Hosts that still answer, in order, and the findings."""

    talks: list[Conversation]
    screen: Screen
    findings: list[Finding] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of the hosts that still answer."""
        return [talk.host for talk in self.talks]

    def ask(self, check: str, question: Callable[[str], Question], timeout: float) -> dict[str, dict[str, Any]]:
        """Ask all hosts; those that do not answer get a finding and are not asked again."""
        self.screen.note(f"{check}: asking {len(self.talks)} hosts" if len(self.talks) > 1 else f"{check} …")
        answers: dict[str, dict[str, Any]] = {}
        for host, answer in ask_all(self.talks, question, timeout).items():
            if isinstance(answer, NoAnswer):
                self.findings.append(Finding(check, "failure", host, str(answer)))
            else:
                answers[host] = answer
        for talk in [talk for talk in self.talks if talk.host not in answers]:
            self.talks.remove(talk)
            talk.close()
        return answers

    def refuse(self, check: str, answers: Mapping[str, dict[str, Any]], remedy: str) -> bool:
        """Note the answers that are errors; whether there were any."""
        wrong = {host: answer["error"] for host, answer in answers.items() if "error" in answer}
        self.findings += [Finding(check, "failure", host, f"{error}; {remedy}") for host, error in wrong.items()]
        return bool(wrong)


def examine(case: Examination, screen: Screen) -> list[Finding]:
    """Ask all hosts (this one alone without a hostfile); every check gives at least one finding."""
    patients = Patients([_start(name, case) for name in _names(case)], screen)
    try:
        _examine(case, patients)
    finally:
        for talk in patients.talks:
            talk.hang_up()
        for talk in patients.talks:
            talk.close(_FAREWELL_S)
    return patients.findings


def _names(case: Examination) -> list[str]:
    return [os.uname().nodename] if case.hosts is None else [host.name for host in case.hosts]


def _start(host: str, case: Examination) -> Conversation:
    command = list(case.asked)
    if case.hosts is not None:
        command = ssh_command(host, command, case.ssh_args, case.timeout)
    return Conversation(host, command)


def _examine(case: Examination, patients: Patients) -> None:
    skews = _clocks(case, patients)
    if not patients.talks:
        return
    patients.findings += diagnosis.judge_clock(skews)
    _enter(case, patients)
    facts = patients.ask("facts", lambda _: _facts_question(case), FACTS_S)
    if patients.refuse("facts", facts, "a defect of vitgraft, or of that host's python; run its host_facts by hand"):
        return
    if not facts:
        return
    device = case.recipe.launch.device if case.recipe is not None else "auto"
    slots = {host.name: host.slots for host in case.hosts or ()}
    patients.findings += diagnosis.judge_versions(facts)
    patients.findings += diagnosis.judge_recipe(facts)
    patients.findings += diagnosis.judge_data(facts)
    patients.findings += diagnosis.judge_space(facts)
    patients.findings += diagnosis.judge_cores(facts)
    patients.findings += diagnosis.judge_gpus(facts, slots, device)
    _storage(case, patients)
    _network(case, patients, facts)


def _clocks(case: Examination, patients: Patients) -> dict[str, tuple[float, float]]:
    """Contact the hosts, and return each clock's offset and its error bound, half the shortest of a few round trips."""
    patients.ask("reach", lambda _: {"ask": "time"}, case.timeout)
    if patients.talks:
        patients.findings.append(Finding("reach", "ok", None, f"{', '.join(patients.names)} answered"))
    skews: dict[str, tuple[float, float]] = {}
    for talk in list(patients.talks):
        for _ in range(3):
            before, began = time.time(), time.monotonic()
            try:
                theirs = talk.ask({"ask": "time"}, case.timeout)["time"]
            except NoAnswer:
                break  # it is found out with the next question
            half = (time.monotonic() - began) / 2
            if talk.host not in skews or half < skews[talk.host][1]:
                skews[talk.host] = (theirs - before - half, half)
    return skews


def _enter(case: Examination, patients: Patients) -> None:
    question = {"ask": "enter", "folder": str(Path.cwd()), "environment": forwarded_environment(os.environ)}
    answers = patients.ask("folder", lambda _: question, case.timeout)
    missing = {host: answer["missing"] for host, answer in answers.items() if answer["missing"] is not None}
    if case.recipe is None:
        return  # nothing was named that could be relative to it
    patients.findings += [
        Finding("folder", "failure", host, f"{what}; start from a folder that all hosts see, ranks start there too")
        for host, what in missing.items()
    ]


def _facts_question(case: Examination) -> Question:
    data = case.recipe.data.paths() if case.recipe is not None else {}
    run = str(case.run) if case.run is not None else None
    return {"ask": "facts", "recipe": case.recipe_name, "data": data, "run": run}


def _storage(case: Examination, patients: Patients) -> None:
    """Check that a file written by each host is visible on all."""
    if case.run is None:
        patients.findings.append(Finding("storage", "skipped", None, "no RECIPE or --run-dir was named"))
        return
    folder, token = str(nearest_existing(case.run)), secrets.token_hex(8)
    written = patients.ask("storage", lambda host: {"ask": "write", "folder": folder, "token": token, "name": host}, 30)
    remedy = "the run directory must lie on storage that all hosts share and may write to"
    try:
        if patients.refuse("storage", written, remedy):
            return
        question = {"ask": "read", "folder": folder, "token": token, "names": patients.names}
        seen = patients.ask("storage", lambda _: question, 30)
    finally:
        patients.ask("storage", lambda host: {"ask": "remove", "folder": folder, "token": token, "name": host}, 30)
    unseen = {host: ", ".join(answer["unseen"]) for host, answer in seen.items() if answer["unseen"]}
    wrong = [
        Finding("storage", "failure", host, f"{folder}: does not see what {others} wrote there; {remedy}")
        for host, others in unseen.items()
    ]
    fine = f"{folder} can be written" if len(seen) == 1 else f"{folder} is shared and can be written"
    patients.findings += wrong or [Finding("storage", "ok", None, fine)]


def _network(case: Examination, patients: Patients, facts: Mapping[str, Mapping[str, Any]]) -> None:
    wanted = case.recipe.launch.port if case.recipe is not None else 0
    first = patients.names[0]
    listening = patients.ask("ports", lambda host: {"ask": "listen", "port": wanted if host == first else 0}, NETWORK_S)
    if patients.refuse("ports", listening, "choose another launch.port, or 0 for a free one"):
        return
    if wanted:
        patients.findings.append(Finding("ports", "ok", first, f"launch.port {wanted} is free"))
    if len(patients.names) < 2:
        for check in ("network", "bandwidth", "all-reduce"):
            patients.findings.append(Finding(check, "skipped", None, "there is one host"))
        return
    homeless = [host for host in patients.names if facts[host]["address"] is None]
    if homeless:
        text = "no address but loopback, so the others cannot reach it; see to its network"
        patients.findings += [Finding("network", "failure", host, text) for host in homeless]
        return
    places = {host: (facts[host]["address"], listening[host]["port"]) for host in patients.names}
    if _all_reach(patients, places):
        _bandwidth(patients, places)
        _all_reduce(patients, places, wanted)


def _all_reach(patients: Patients, places: Mapping[str, tuple[str, int]]) -> bool:
    def question(host: str) -> Question:
        return {"ask": "reach", "peers": {peer: places[peer] for peer in places if peer != host}, "timeout": _CONNECT_S}

    answers = patients.ask("network", question, NETWORK_S)
    if patients.refuse("network", answers, "see to its network"):
        return False
    failed = {host: answer["failed"] for host, answer in answers.items()}
    wrong = diagnosis.judge_reach(failed, lambda peer: "{}:{}".format(*places[peer]))
    patients.findings += wrong or [Finding("network", "ok", None, "every host reaches every other")]
    if wrong:
        for check in ("bandwidth", "all-reduce"):
            patients.findings.append(Finding(check, "skipped", None, "not every host reaches every other"))
    return not wrong and len(answers) == len(places)


def _bandwidth(patients: Patients, places: Mapping[str, tuple[str, int]]) -> None:
    """Measure bandwidth while all hosts send at once, each to the next, then to the one after it, as ring collectives
    do."""
    names, rates = list(places), []
    for distance in range(1, min(len(names) - 1, _MAX_DISTANCE) + 1):
        target = {host: names[(number + distance) % len(names)] for number, host in enumerate(names)}

        def question(host: str, target: Mapping[str, str] = target) -> Question:
            address, port = places[target[host]]
            return {"ask": "send", "address": address, "port": port, "seconds": _SENDING_S}

        answers = patients.ask("bandwidth", question, NETWORK_S)
        patients.refuse("bandwidth", answers, "see to link and interface")
        rates += [
            (host, target[host], said["bytes_per_second"]) for host, said in answers.items() if "error" not in said
        ]
    if rates:
        patients.findings += diagnosis.judge_bandwidth(rates)


def _all_reduce(patients: Patients, places: Mapping[str, tuple[str, int]], wanted: int) -> None:
    names = patients.names
    if names != list(places):
        patients.findings.append(Finding("all-reduce", "skipped", None, "a host has stopped answering"))
        return
    ports = patients.ask("all-reduce", lambda _: {"ask": "hush"}, NETWORK_S)
    port = wanted or _free_port(patients)
    if port is None or len(ports) < len(names):
        return
    leader = places[names[0]][0]

    def question(host: str) -> Question:
        facts = {"rank": names.index(host), "world": len(names), "leader": leader, "port": port}
        return {"ask": "all_reduce", **facts, "own": places[host][0], "timeout": REDUCE_S}

    answers = patients.ask("all-reduce", question, 2 * REDUCE_S)
    remedy = "see GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, firewall and routes"
    if not patients.refuse("all-reduce", answers, remedy) and answers:
        slowest = max(answer["seconds"] for answer in answers.values())
        text = f"4 MiB over {len(names)} hosts in {slowest * 1e3:.0f} ms (gloo)"
        patients.findings.append(Finding("all-reduce", "ok", None, text))


def _free_port(patients: Patients) -> int | None:
    try:
        port: int = patients.talks[0].ask({"ask": "free_port"}, NETWORK_S)["port"]
    except NoAnswer as reason:
        patients.findings.append(Finding("all-reduce", "failure", patients.names[0], str(reason)))
        return None
    return port
