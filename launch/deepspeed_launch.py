"""One command from one node: what DeepSpeed's runner is given to start the ranks of all hosts over pdsh and ssh.

Pure functions: the runner's command line, its own environment, and the file by which the ranks get theirs. The runner
joins all of it to one line that a shell on each host reads, after pdsh has replaced its percent signs; so whatever
comes from a user is quoted here for both. (Facts of ``deepspeed.launcher`` 0.19: its pdsh backend puts words with a
space, and values with anything unusual, between double quotes without escaping what these do not protect.)
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.hosts import Host, Slots, write_hostfile

ENV_FILE_VARIABLE = "DS_ENV_FILE"
FORWARDED = (
    "CUDA_",
    "DS_",
    "DEEPSPEED_",
    "FI_",
    "GLOO_",
    "HF_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "TORCH",
    "UCX_",
    "VITGRAFT_",
)
"""Names that start so go from the starting node to all ranks. ``PYTHON…`` and ``UCX…`` DeepSpeed forwards by itself."""
_OF_ONE_PROCESS = re.compile(r"VITGRAFT_(PARENT_PID|REPORT_FD|HANDOVER)|DS_ENV_FILE|CUDA_VISIBLE_DEVICES")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet: an address of the first host that all others reach, and a free port there."""

    address: str
    port: int


def deepspeed_hostfile(slots: Slots) -> str:
    """A hostfile of these hosts, with slots up to the highest that is used (:func:`slot_filter` leaves out others)."""
    return write_hostfile(Host(name, max(used) + 1) for name, used in slots.items())


def slot_filter(slots: Slots) -> str:
    """The ``--include`` of DeepSpeed that means exactly these slots."""
    return "@".join(f"{name}:{','.join(map(str, used))}" for name, used in slots.items())


def runner_command(hostfile: Path, slots: Slots, meeting: Meeting, module: str, arguments: Sequence[str]) -> list[str]:
    """DeepSpeed's runner over pdsh, starting ``python -m MODULE ARGUMENTS`` once for each slot.

    Raises:
        ConfigError: an argument holds control characters, which no shell line can carry.
    """
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
        *map(_pdsh_word, arguments),
    ]


def rank_arguments(run: Path, attempt: int, device: str, resume: Path | None) -> list[str]:
    """What each rank is told; ``run`` and ``resume`` are paths that every host sees."""
    arguments = ["--run-dir", str(run), "--attempt", str(attempt), "--device", device]
    return [*arguments, "--resume", str(resume)] if resume is not None else arguments


def rank_environment(environment: Mapping[str, str], *, device: str, threads: int) -> dict[str, str]:
    """What the ranks of all hosts find in their environment: what is forwarded, and what vitgraft sets."""
    return {
        **forwarded_environment(environment),
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": device,
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
    }


def forwarded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the starting node that matter on all hosts (NCCL_*, GLOO_*, …; see ``FORWARDED``)."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(FORWARDED) and not _OF_ONE_PROCESS.fullmatch(name)
    }


def environment_file(environment: Mapping[str, str]) -> str:
    """The text of the file that ``DS_ENV_FILE`` names, by which the runner exports variables on every host.

    Raises:
        ConfigError: a name or value that a line cannot carry.
    """
    lines = []
    for name, value in environment.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r}: no name of an environment variable; rename it")
        _check_printable(value, name)
        if value != value.strip():
            raise ConfigError(f"{name}={value!r}: white space at an end is lost on the way to other hosts; remove it")
        # The runner adds double quotes around anything that is not plain, and a backslash is not.
        lines.append(f"{name}={_in_double_quotes(value, quotes_too=True)}\n")
    return "".join(lines)


def runner_environment(environment: Mapping[str, str], env_file: Path, ssh_args: Sequence[str]) -> dict[str, str]:
    """The environment of the runner itself, in which pdsh starts ssh with ``ssh_args`` (of :func:`ssh_arguments`).

    ``PYTHON…`` variables are left out, for the runner would forward them unquoted.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(("PYTHON", "PDSH_"))}
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
    """That the ranks can start in the folder where the runner starts: it changes there without quoting.

    Raises:
        ConfigError: a space or another character that means something to a shell.
    """
    if not _PLAIN.fullmatch(str(folder)):
        raise ConfigError(
            f"{folder}: DeepSpeed cannot change to this folder on other hosts, for its path has unusual characters; "
            "start from another folder"
        )


def _pdsh_word(word: str) -> str:
    """A word that pdsh, the runner and the shell of a host leave as it is."""
    _check_printable(word, "an argument of the ranks")
    if " " in word:
        return _in_double_quotes(word, quotes_too=False)  # the runner adds those, and escapes the ones inside
    return shlex.quote(word.replace("%", "%%"))


def _in_double_quotes(text: str, *, quotes_too: bool) -> str:
    special = r'([\\$`"])' if quotes_too else r"([\\$`])"
    return re.sub(special, r"\\\1", text.replace("%", "%%"))


def _check_printable(text: str, what: str) -> None:
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ConfigError(f"{what}: {text!r} holds control characters, which no command line carries; rename it")
