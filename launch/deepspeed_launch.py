"""Arguments of DeepSpeed's runner, which starts tickets on all hosts over pdsh and ssh, and environment of the ranks.
Pure functions.

The runner joins all of it to one line that everybody on those hosts can read and a shell there interprets. So nothing
of the user's environment is in it: that goes to the ranks through their agents.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.cores import THREADS_VARIABLE
from vitgraft.configs.errors import ConfigError
from vitgraft.launch.hosts import Host, Slots, write_hostfile

ENV_FILE_VARIABLE = "DS_ENV_FILE"
FORWARDED = (
    "AWS_",
    "CUDA_",
    "DS_",
    "DEEPSPEED_",
    "FI_",
    "GLOO_",
    "GOOGLE_",
    "HF_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "TORCH",
    "UCX_",
    "VITGRAFT_",
)
"""Names that start so go from the starting node to all ranks and roles."""
_EXPORTED_BY_THE_RUNNER = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
_OF_ONE_PROCESS = re.compile(r"VITGRAFT_(PARENT_PID|REPORT_FD|HANDOVER)|DS_ENV_FILE|CUDA_VISIBLE_DEVICES")
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class Meeting:
    """Rendezvous of the ranks: an address of the first host that all others reach, and a free port there."""

    address: str
    port: int


def deepspeed_hostfile(slots: Slots) -> str:
    """Return a hostfile with slots up to the highest used (:func:`slot_filter` leaves out others)."""
    return write_hostfile(Host(name, max(used) + 1) for name, used in slots.items())


def slot_filter(slots: Slots) -> str:
    """Return the ``--include`` of DeepSpeed that means exactly these slots."""
    return "@".join(f"{name}:{','.join(map(str, used))}" for name, used in slots.items())


def runner_command(hostfile: Path, slots: Slots, meeting: Meeting, module: str, arguments: Sequence[str]) -> list[str]:
    """Return the command of DeepSpeed's runner over pdsh, which starts ``python -m MODULE ARGUMENTS`` for each slot;
    ``arguments`` are words without a meaning to a shell."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(hostfile),
        "--include",
        slot_filter(slots),
        "--no_ssh_check",
        "--launcher",
        "pdsh",
        # One host would else be taken for the one where the runner runs, and get none of the environment.
        "--force_multi",
        "--master_addr",
        meeting.address,
        "--master_port",
        str(meeting.port),
        "--module",
        module,
        *arguments,
    ]


def rank_arguments(run: Path, attempt: int, device: str, resume: Path | None) -> list[str]:
    """Return the command-line arguments of the ranks; ``run`` and ``resume`` are paths valid on every host."""
    arguments = ["--run-dir", str(run), "--attempt", str(attempt), "--device", device]
    return [*arguments, "--resume", str(resume)] if resume is not None else arguments


def rank_environment(environment: Mapping[str, str], *, device: str, threads: int) -> dict[str, str]:
    """Return the environment variables of the ranks of all hosts: those forwarded, and those that vitgraft sets."""
    return {
        **forwarded_environment(environment),
        THREADS_VARIABLE: str(threads),
        "DS_ACCELERATOR": device,
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
    }


def forwarded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the starting node that matter on all hosts (NCCL_*, GLOO_*, …; see ``FORWARDED``)."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(FORWARDED) and not _OF_ONE_PROCESS.fullmatch(name)
    }


def launchers_variables(device: str) -> str:
    """Return the text of the file that ``DS_ENV_FILE`` names: the variables of DeepSpeed's launcher and the tickets on
    a host, besides those of its shell. They appear on command lines, so only the necessary ones are given."""
    return f"DS_ACCELERATOR={device}\n"


def runner_environment(environment: Mapping[str, str], env_file: Path, ssh_args: Sequence[str]) -> dict[str, str]:
    """Return the runner's environment, in which pdsh starts ssh with ``ssh_args`` (of :func:`ssh_arguments`).

    Left out is what the runner would export on every host by itself, unquoted and for all to read.
    """
    dropped = ("PDSH_", *_EXPORTED_BY_THE_RUNNER)
    kept = {name: value for name, value in environment.items() if not name.startswith(dropped)}
    # Given in full, as pdsh's own arguments begin with the local user's name, which outdoes a configuration of ssh.
    # And one to a host that vanishes must end some time, whoever else is left to end it.
    alive = ["-oServerAliveInterval=10", "-oServerAliveCountMax=3"]
    words = ["-a", "-x", "-oBatchMode=yes", *ssh_args, *alive, "%h"]
    return {
        **kept,
        ENV_FILE_VARIABLE: str(env_file),
        "PDSH_RCMD_TYPE": "ssh",
        "PDSH_SSH_ARGS": " ".join(words),
        "PYTHONSAFEPATH": "1",
    }


def check_folder(folder: Path) -> None:
    """Check that the runner can change to its folder on all hosts, which it does without quoting.

    Raises:
        ConfigError: a space or another character that means something to a shell.
    """
    if not _PLAIN.fullmatch(str(folder)):
        raise ConfigError(
            f"{folder}: DeepSpeed cannot change to this folder on other hosts, for its path has unusual characters; "
            "start from another folder"
        )
