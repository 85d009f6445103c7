"""Findings from the facts of all hosts, one for each check. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, TypeVar

GIB = 1 << 30
MIN_DISK, LOW_DISK = 1 * GIB, 20 * GIB
MIN_MEMORY, LOW_MEMORY = 1 * GIB, 4 * GIB
LOW_SHM = 256 << 20
MAX_SKEW_S, SKEW_S = 60.0, 1.0
SLOW_BYTES_PER_S = 50e6

Level = Literal["ok", "warning", "failure", "skipped"]
Facts = Mapping[str, Mapping[str, Any]]
"""Facts of each host (:func:`vitgraft.launch.host_facts.facts`), the first host first."""
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One check on one host (``None``: on all of them); ``text``: the finding and, unless ok, the remedy.

    ``failure``: a run would not work; ``warning``: it would, worse than it should.
    """

    check: str
    level: Level
    host: str | None
    text: str


def agreed(values: Mapping[str, T]) -> tuple[T, list[str]]:
    """Return the most frequent value (the earliest of equals), and the hosts that have another."""
    counts = Counter(values.values())
    best = max(counts.values())
    common = next(value for value in values.values() if counts[value] == best)
    return common, [host for host, value in values.items() if value != common]


def judge_versions(facts: Facts) -> list[Finding]:
    """Check that Python, packages and vitgraft's own sources are the same everywhere, and nothing is missing."""
    python, others = agreed({host: said["python"] for host, said in facts.items()})
    found = [
        Finding("python", "failure", host, f"python {facts[host]['python']}, elsewhere {python}; install the same")
        for host in others
    ]
    found = found or [Finding("python", "ok", None, f"python {python}")]
    wrong = []
    names = sorted({name for said in facts.values() for name in said["packages"]})
    for name in names:
        versions = {host: said["packages"].get(name, "missing") for host, said in facts.items()}
        common, others = agreed(versions)
        if common == "missing":
            others = [host for host in facts if versions[host] == common]
            common = next((version for version in versions.values() if version != "missing"), "needed")
        wrong += [
            Finding("packages", "failure", host, f"{name} {versions[host]}, elsewhere {common}; install the same there")
            for host in others
        ]
    found += wrong or [Finding("packages", "ok", None, f"{len(names)} packages agree")]
    _, others = agreed({host: said["code"] for host, said in facts.items()})
    text = "vitgraft's source files differ from those of the other hosts; install the same revision there"
    found += [Finding("vitgraft", "failure", host, text) for host in others]
    return found if others else [*found, Finding("vitgraft", "ok", None, "the same source files")]


def judge_recipe(facts: Facts) -> list[Finding]:
    """Check that the recipe is readable and identical everywhere."""
    if all(said["recipe"] is None for said in facts.values()):
        return [Finding("recipe", "skipped", None, "no RECIPE was named")]
    remedy = "keep the recipe on storage that all hosts share, or copy it there"
    return _judge_alike("recipe", "hash", {host: said["recipe"] for host, said in facts.items()}, remedy)


def judge_data(facts: Facts) -> list[Finding]:
    """Check that every data set is readable and identical everywhere."""
    keys = list(dict.fromkeys(key for said in facts.values() for key in said["data"]))
    found = []
    for key in keys:
        of_hosts = {host: said["data"][key] for host, said in facts.items()}
        remedy = "keep the data on storage that all hosts share, or copy it whole"
        found += [
            Finding("data", finding.level, finding.host, f"{key}: {finding.text}")
            for finding in _judge_alike("data", "fingerprint", of_hosts, remedy)
        ]
    return found or [Finding("data", "skipped", None, "no RECIPE was named")]


def _judge_alike(check: str, key: str, answers: Mapping[str, Mapping[str, Any]], remedy: str) -> list[Finding]:
    found = [
        Finding(check, "failure", host, f"{answer['error']}" if len(answers) == 1 else f"{answer['error']}; {remedy}")
        for host, answer in answers.items()
        if "error" in answer
    ]
    values = {host: answer[key] for host, answer in answers.items() if "error" not in answer}
    if not values:
        return found
    common, others = agreed(values)
    found += [
        Finding(check, "failure", host, f"{key} {values[host][:12]}, elsewhere {common[:12]}; {remedy}")
        for host in others
    ]
    return found or [Finding(check, "ok", None, f"{key} {common[:12]}")]


def judge_space(facts: Facts) -> list[Finding]:
    """Check the free space on the run's disk, in memory and in /dev/shm."""
    found = []
    for host, said in facts.items():
        disk, memory, shm = said["run_free"], said["memory_free"], said["shm_free"]
        if disk is not None and disk < LOW_DISK:
            level: Level = "failure" if disk < MIN_DISK else "warning"
            text = f"{_gib(disk)} free where the run is written, expected {_gib(LOW_DISK)}; make room"
            found.append(Finding("disk", level, host, text))
        if memory < LOW_MEMORY:
            level = "failure" if memory < MIN_MEMORY else "warning"
            text = f"{_gib(memory)} of memory free, expected {_gib(LOW_MEMORY)}; end what else runs there"
            found.append(Finding("memory", level, host, text))
        if shm is None or shm < LOW_SHM:
            has = "no /dev/shm" if shm is None else f"{_gib(shm)} free in /dev/shm"
            text = f"{has}, expected {_gib(LOW_SHM)}, for NCCL and loader processes; give it more (docker: --shm-size)"
            found.append(Finding("shm", "warning", host, text))
    if found:
        return found
    least = min(facts.values(), key=lambda said: said["memory_free"])
    return [
        Finding("space", "ok", None, f"at least {_gib(least['memory_free'])} of memory; disk and /dev/shm have room")
    ]


def judge_cores(facts: Facts) -> list[Finding]:
    """Check that hosts have equal numbers of cores, none restricted by a container."""
    common, others = agreed({host: said["cores"] for host, said in facts.items()})
    found = [
        Finding(
            "cores", "warning", host, f"a CPU quota of {said['quota']:g} cores; give the container all that it needs"
        )
        for host, said in facts.items()
        if said["quota"] is not None
    ]
    found += [
        Finding(
            "cores", "warning", host, f"{facts[host]['cores']} cores, elsewhere {common}; the least set the threads"
        )
        for host in others
        if facts[host]["quota"] is None
    ]
    return found or [Finding("cores", "ok", None, f"{common} cores")]


def judge_gpus(facts: Facts, slots: Mapping[str, int], device: str) -> list[Finding]:
    """Check that there are GPUs for all slots, alike and healthy. ``device``: the recipe's launch.device."""
    found: list[Finding] = []
    with_gpus = [host for host, said in facts.items() if said["gpus"]]
    for host, said in facts.items():
        count, wanted = len(said["gpus"]), slots.get(host, 0)
        if said["gpu_error"] is not None:
            text = f"{said['gpu_error']}; see to the driver, or leave the host out"
            found.append(Finding("gpus", "failure" if device != "cpu" else "warning", host, text))
        elif device == "cuda" and count == 0:
            found.append(Finding("gpus", "failure", host, "no GPU, but launch.device is cuda; use auto or cpu"))
        elif device == "auto" and with_gpus and count == 0:
            text = f"no GPU, but {with_gpus[0]} has {len(facts[with_gpus[0]]['gpus'])}; leave the host out or see to it"
            found.append(Finding("gpus", "failure", host, text))
        elif device != "cpu" and 0 < count < wanted:
            text = f"{count} GPUs for slots={wanted}; correct the hostfile, or see where the others are"
            found.append(Finding("gpus", "failure", host, text))
        found += _judge_health(host, said)
    for key, what in (("name", "GPU"), ("driver", "driver")):
        models = {host: facts[host]["gpus"][0][key] for host in with_gpus}
        if models:
            common, others = agreed(models)
            found += [
                Finding(
                    "gpus", "warning", host, f"{what} {models[host]}, elsewhere {common}; the slowest sets the pace"
                )
                for host in others
            ]
    total = sum(len(said["gpus"]) for said in facts.values())
    return found or [Finding("gpus", "ok", None, f"{total} GPUs" if total else "none; runs use the CPU")]


def _judge_health(host: str, said: Mapping[str, Any]) -> list[Finding]:
    found = []
    for number, gpu in enumerate(said["gpus"]):
        if gpu["uncorrected"] or gpu["repair_failed"]:
            what = "its memory could not be repaired" if gpu["repair_failed"] else f"{gpu['uncorrected']} ECC errors"
            text = (
                f"GPU {number}: {what} (uncorrected); reset it or have it replaced, and leave the host out until then"
            )
            found.append(Finding("gpus", "failure", host, text))
        elif gpu["repair_pending"]:
            text = f"GPU {number}: a repair of its memory is pending; reset it when nothing runs"
            found.append(Finding("gpus", "warning", host, text))
    if said["xids"]:
        text = f"the driver logged Xid {', '.join(said['xids'][:4])} since the host started; see dmesg there"
        found.append(Finding("gpus", "warning", host, text))
    return found


def judge_clock(skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Check the clocks. ``skews``: seconds that each host's clock is ahead of this one's, and the error bound."""
    found = []
    for host, (ahead, bound) in skews.items():
        certain = max(0.0, abs(ahead) - bound)
        if certain > SKEW_S:
            way = "ahead of" if ahead > 0 else "behind"
            text = f"its clock is {abs(ahead):.1f} s ({bound:.1f} s uncertain) {way} this host's; synchronise it (NTP)"
            found.append(Finding("clock", "failure" if certain > MAX_SKEW_S else "warning", host, text))
    worst = max((abs(ahead) + bound for ahead, bound in skews.values()), default=0.0)
    return found or [Finding("clock", "ok", None, f"within {worst:.2f} s")]


def judge_reach(failed: Mapping[str, Mapping[str, str]], what: Callable[[str], str]) -> list[Finding]:
    """Check connections. ``failed``: for each host its unreachable peers, and why; ``what(peer)``: its address."""
    return [
        Finding(
            "network", "failure", host, f"cannot connect to {peer} ({what(peer)}): {reason}; see to firewall and routes"
        )
        for host, peers in failed.items()
        for peer, reason in peers.items()
    ]


def judge_bandwidth(rates: Sequence[tuple[str, str, float]]) -> list[Finding]:
    """Check the bandwidth. ``rates``: (from, to, bytes per second)."""
    usual = median(rate for _, _, rate in rates)
    found = []
    for start, end, rate in rates:
        if rate < SLOW_BYTES_PER_S or rate < usual / 3:
            text = f"sends {rate / 1e6:.0f} MB/s to {end}, others {usual / 1e6:.0f}; see to link and interface"
            found.append(Finding("bandwidth", "warning", start, text))
    slowest = min(rate for _, _, rate in rates)
    return found or [Finding("bandwidth", "ok", None, f"at least {slowest / 1e6:.0f} MB/s from host to host")]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
