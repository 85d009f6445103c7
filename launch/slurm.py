"""The job file for SLURM that ``vitgraft launch slurm`` prints. Pure functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from vitgraft.configs.errors import ConfigError, PreemptedRun
from vitgraft.configs.schema import Recipe
from vitgraft.configs.worlds import check_world

MAX_SIGNAL_SECONDS = 65535
_EARLY_S = 60
"""SLURM may send the signal so much earlier than it was asked to."""
_TIME = re.compile(r"(?:(\d{1,5})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?")
# Options of sbatch that the job file relies on, and what sets them instead.
_OURS = {
    "nodes": "--nodes",
    "ntasks": "one task a node",
    "ntasks-per-node": "one task a node",
    "cpus-per-task": "--cpus-per-task",
    "signal": "--signal-seconds",
    "time": "--time",
    "chdir": "the folder of this command",
    "array": "one job a run directory",
    "requeue": "it goes on after a stop",
    "no-requeue": "it goes on after a stop",
    "no-kill": "it is queued again when a node fails",
    "open-mode": "one log of all starts",
    "export": "the environment of sbatch",
}


@dataclass(frozen=True)
class SlurmJob:
    """What a job file says. ``train`` is the command that every node runs; ``folder`` is where."""

    name: str
    folder: str
    nodes: int
    train: Sequence[str]
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    signal_seconds: int = 120
    sbatch: Sequence[str] = ()


def job_file(job: SlurmJob) -> str:
    """The complete file for sbatch.

    Raises:
        ConfigError: a value that cannot be written there, an option of sbatch that the file sets itself, or a job so
            short that it would be told to stop as soon as it starts.
    """
    _check_time(job)
    directives = "".join(f"#SBATCH {_directive(option)}\n" for option in _options(job))
    cpus = [] if job.cpus_per_task is None else [f"--cpus-per-task={job.cpus_per_task}"]
    srun = [
        "srun",
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes}",
        "--ntasks-per-node=1",
        *cpus,
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--export=ALL",
    ]
    for word in job.train:
        _check_text(word, "the command for the nodes")
    return _FILE.format(
        directives=directives,
        signal=f"USR1@{job.signal_seconds}",
        srun=shlex.join(srun),
        train=shlex.join(job.train),
        requeue=PreemptedRun.exit_code,
    )


def check_job_world(recipe: Recipe, nodes: int, gpus_per_node: int | None) -> None:
    """That the ranks of all nodes can carry the global batch, as far as their number is known before the job starts.

    Raises:
        ConfigError: lists the worlds that can.
    """
    launch = recipe.launch
    each = launch.processes or (2 if launch.device == "cpu" else gpus_per_node)
    if each is None:
        return
    if gpus_per_node is not None and launch.device != "cpu":
        each = min(each, gpus_per_node)
    train, why = recipe.train, f"--nodes {nodes}: with {each} ranks on each, "
    check_world(train.global_batch, train.accumulation, nodes * each, why=why)


def _options(job: SlurmJob) -> list[str]:
    options = [
        f"--job-name={job.name}",
        f"--chdir={job.folder}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        # Without a number a task gets one CPU; ranks, loaders and checkpointer of a node want all of them.
        "--exclusive" if job.cpus_per_task is None else f"--cpus-per-task={job.cpus_per_task}",
    ]
    optional = {
        "gpus-per-node": job.gpus_per_node,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
    }
    options += [f"--{name}={value}" for name, value in optional.items() if value is not None]
    options += [f"--signal=USR1@{job.signal_seconds}", "--requeue", "--open-mode=append", "--export=ALL"]
    for option in job.sbatch:
        _check_option(option)
    return [*options, *job.sbatch]


def _check_option(option: str) -> None:
    found = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=.*)?", option, re.DOTALL)
    if found is None:
        raise ConfigError(f"--sbatch {option!r}: expected a long option of sbatch, e.g. --sbatch=--qos=long")
    if found[1] in _OURS:
        raise ConfigError(f"--sbatch {option}: the job file sets it itself ({_OURS[found[1]]}); leave it out")


def _check_time(job: SlurmJob) -> None:
    """A job that is told to stop as soon as it starts would be queued again and again and never make a step."""
    if not 1 <= job.signal_seconds <= MAX_SIGNAL_SECONDS:
        raise ConfigError(f"--signal-seconds {job.signal_seconds}: expected 1 to {MAX_SIGNAL_SECONDS}")
    if job.time is None:
        return
    seconds = _seconds(job.time)
    if 0 < seconds <= job.signal_seconds + _EARLY_S:
        raise ConfigError(
            f"--time {job.time}: with --signal-seconds {job.signal_seconds}, and SLURM may be {_EARLY_S} s early, the "
            "job would be told to stop as soon as it starts; give more time"
        )


def _seconds(time: str) -> int:
    """SLURM's times: MINUTES, M:S, H:M:S, DAYS-H, D-H:M, D-H:M:S."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError(f"--time {time}: expected minutes, H:M:S or DAYS-H:M:S, e.g. --time 12:00:00")
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def _directive(option: str) -> str:
    """An option as sbatch reads it: quotes group, a backslash takes the next character as it is, a # ends the line."""
    _check_text(option, "an option of sbatch")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _check_text(text: str, what: str) -> None:
    if not text.isprintable():
        raise ConfigError(f"{text!r}: {what} cannot hold line breaks and control characters; remove them")


_FILE = """\
#!/bin/bash
{directives}
# Submit with: sbatch FILE. vitgraft, recipe, data and run directory must be under the same paths on all nodes.
#
# One task a node: vitgraft train starts the ranks of its node, and starts them again when one fails, without SLURM.
# The first node leads, the others connect to it.
#
# Before the time is up, --signal={signal} sends SIGUSR1 to the tasks, which stop together behind a committed
# checkpoint and leave with {requeue}. Not B:USR1: that goes to this shell alone, and bash heeds it when srun has ended.
# - Preemption with a time of grace (GraceTime) begins with SIGTERM to the tasks: the same. Without, SLURM ends them at
#   once and, by --requeue, queues the job again where the site preempts so; it goes on from its last checkpoint.
# - A node fails: SLURM ends the job and, by --requeue, queues it again. That is why --no-kill is missing: with it the
#   job would stay short of a node to its end.
# - scancel JOBID, or the time is up before the checkpoint is written: SIGTERM to the tasks and to this shell, SIGKILL
#   after the site's KillWait (30 s by default). The job is not queued again: it was cancelled, or was told too late;
#   then raise --signal-seconds. scancel --signal=USR1 JOBID makes it stop and be queued again at any time.
# All starts are appended to one log (--open-mode); the environment of sbatch is passed on (--export).
# Load modules here.

stopped=
trap 'stopped=yes' TERM

# --kill-on-bad-exit=0, --wait=0: that a task has ended is no reason to end the others; vitgraft decides that.
# --cpu-bind=none: the task's CPUs are for all of its ranks. No shell in between: it would keep the signals to itself.
{srun} \\
    {train}
code=$?

if [ "$code" -eq {requeue} ] && [ -z "$stopped" ]; then
    echo "vitgraft: stopped behind a committed checkpoint; job $SLURM_JOB_ID is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "vitgraft: scontrol could not queue it; submit this file again to go on" >&2
fi
exit "$code"
"""
