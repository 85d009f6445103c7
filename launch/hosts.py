"""Hosts of a job: the hostfile, the selected hosts and slots, and the arguments of ssh. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.files import read_text

SSH_CONFIG_VARIABLE = "VITGRAFT_SSH_CONFIG"
_SSH_FLAG = re.compile(r"-[46Cqv]+")
_SSH_WITH_VALUE = ("-B", "-J", "-b", "-c", "-i", "-l", "-m", "-o", "-p")
_SSH_KEYS = re.compile(
    "AddressFamily|BatchMode|BindAddress|BindInterface|CertificateFile|CheckHostIP|Ciphers|Compression|"
    "ConnectionAttempts|ConnectTimeout|GlobalKnownHostsFile|GSSAPIAuthentication|GSSAPIDelegateCredentials|"
    "HostKeyAlgorithms|HostKeyAlias|HostName|IdentitiesOnly|IdentityAgent|IdentityFile|IPQoS|KexAlgorithms|LogLevel|"
    "MACs|NumberOfPasswordPrompts|PasswordAuthentication|Port|PreferredAuthentications|ProxyJump|"
    "PubkeyAcceptedAlgorithms|PubkeyAuthentication|ServerAliveCountMax|ServerAliveInterval|StrictHostKeyChecking|"
    "TCPKeepAlive|UpdateHostKeys|User|UserKnownHostsFile",
    re.IGNORECASE,
)
"""Of ssh_config(5), those that run nothing, load nothing and read no further configuration."""
_SSH_VALUE = re.compile(r"[\w@:/.,+~^*?=\[\]][\w@:/.,+~^*?=\[\]-]*")
MAX_HOSTFILE_BYTES = 1 << 20
MAX_SLOTS = 1024
_EXAMPLE = "write e.g. node-1 slots=8"
# What DeepSpeed's filters and pdsh's lists of hosts can carry: both give meaning to @ : , and brackets.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

Slots = dict[str, tuple[int, ...]]
"""The chosen slots of each host, in the hostfile's order."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: ``slots`` ranks fit there. A ``spare`` takes part only when another host is left out."""

    name: str
    slots: int
    spare: bool = False


def parse_hostfile(text: str, where: str) -> list[Host]:
    """Return the hosts of a hostfile: lines ``NAME slots=N [spare=true|false]``, ``#`` starts a comment.

    Raises:
        ConfigError: names ``where`` and the line: what is wrong with it, and the remedy.
    """
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        host = _parse_line(words, f"{where}:{number}")
        if host.name in hosts:
            raise ConfigError(
                f"{where}:{number}: {host.name} is already in line {lines[host.name]}; keep one line for each host"
            )
        hosts[host.name], lines[host.name] = host, number
    if not any(not host.spare for host in hosts.values()):
        found = "only spare hosts" if hosts else "no hosts"
        raise ConfigError(f"{where}: {found}; {_EXAMPLE}")
    return list(hosts.values())


def _parse_line(words: Sequence[str], where: str) -> Host:
    name, *settings = words
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} is no host name; use letters, digits, dots and dashes (a user or port of ssh belongs "
            "in launch.ssh_args or a configuration of ssh)"
        )
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in ("slots", "spare"):
            raise ConfigError(f"{where}: {setting!r} is not understood; {_EXAMPLE}, or node-1 slots=8 spare=true")
        if key in found:
            raise ConfigError(f"{where}: {key} is there twice; keep one")
        found[key] = value
    if "slots" not in found:
        raise ConfigError(f"{where}: {name} has no slots; {_EXAMPLE}")
    slots = found["slots"]
    if not (slots.isascii() and slots.isdigit() and 1 <= int(slots[:6]) <= MAX_SLOTS):
        raise ConfigError(f"{where}: slots={slots}: expected a number from 1 to {MAX_SLOTS}, the ranks that fit there")
    spare = found.get("spare", "false")
    if spare not in ("true", "false"):
        raise ConfigError(f"{where}: spare={spare}: expected true or false")
    return Host(name, int(slots), spare == "true")


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a file.

    Raises:
        ConfigError: it cannot be read, or as :func:`parse_hostfile`.
    """
    return parse_hostfile(read_text(path, MAX_HOSTFILE_BYTES, ConfigError), str(path))


def write_hostfile(hosts: Iterable[Host]) -> str:
    """Return the text of a hostfile; :func:`parse_hostfile` reads it back, and without spares DeepSpeed reads it
    too."""
    return "".join(f"{host.name} slots={host.slots}{' spare=true' if host.spare else ''}\n" for host in hosts)


def choose_slots(hosts: Sequence[Host], include: str = "", exclude: str = "") -> Slots:
    """Return the slots that ``--include`` or ``--exclude`` leaves, e.g. ``node-1@node-2:0,2``; DeepSpeed reads them
    alike.

    Without ``include`` spares stay out; one that it names takes part.

    Raises:
        ConfigError: both are given, one names an unknown host or slot, or nothing is left.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude: give one of them; each says by itself which slots are meant")
    every = {host.name: tuple(range(host.slots)) for host in hosts}
    if include:
        wanted = _parse_filter(include, "--include", every)
        return {name: wanted[name] for name in every if name in wanted}
    regular = {host.name: every[host.name] for host in hosts if not host.spare}
    if not exclude:
        return regular
    unwanted = _parse_filter(exclude, "--exclude", every)
    left = {name: tuple(s for s in slots if s not in unwanted.get(name, ())) for name, slots in regular.items()}
    chosen = {name: slots for name, slots in left.items() if slots}
    if not chosen:
        raise ConfigError(f"--exclude {exclude}: leaves no slot of the hostfile; leave some in")
    return chosen


def _parse_filter(text: str, option: str, every: Slots) -> Slots:
    found: dict[str, set[int]] = {}
    for part in text.split("@"):
        name, colon, slots = part.partition(":")
        if name not in every:
            raise ConfigError(f"{option} {text}: {name!r} is not in the hostfile; it has {', '.join(every)}")
        numbers = slots.split(",") if colon else [str(slot) for slot in every[name]]
        for number in numbers:
            if not (number.isascii() and number.isdigit() and int(number[:6]) in every[name]):
                raise ConfigError(
                    f"{option} {text}: {name} has no slot {number!r}; it has 0 to {len(every[name]) - 1}, "
                    "given as NAME:SLOT,SLOT"
                )
            found.setdefault(name, set()).add(int(number))
    return {name: tuple(sorted(slots)) for name, slots in found.items()}


def ssh_arguments(of_recipe: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the arguments of every ssh: ``launch.ssh_args``, and the configuration file in VITGRAFT_SSH_CONFIG.

    Raises:
        ConfigError: an argument with white space, quotes or a percent sign, which pdsh would not pass on; or one of the
            recipe by which ssh could run a program here, load a library or read another configuration.
    """
    config = environment.get(SSH_CONFIG_VARIABLE, "")
    words = [*(["-F", config] if config else []), *of_recipe]
    for word in words:
        if not word or re.search(r"[\s'\"\\%]", word):
            raise ConfigError(
                f"launch.ssh_args, {SSH_CONFIG_VARIABLE}: {word!r}: pdsh passes on no empty words, spaces, quotes or "
                "percent signs; put it into a configuration file of ssh and name that"
            )
    _refuse_programs(of_recipe)
    return words


def _refuse_programs(words: Sequence[str]) -> None:
    """Refuse ssh options of an untrusted recipe that could run a program; the user's own configuration may."""
    left = list(words)
    while left:
        word = left.pop(0)
        if _SSH_FLAG.fullmatch(word):
            continue
        option, value = word[:2], word[2:]
        known = option in _SSH_WITH_VALUE and bool(value or left)
        value = value or (left.pop(0) if known else "")
        if option == "-o":
            key, _, value = value.partition("=")
            known = known and _SSH_KEYS.fullmatch(key) is not None
        # Of a chain of hosts, or a user, ssh makes a command line for itself.
        if not known or not _SSH_VALUE.fullmatch(value):
            raise ConfigError(
                f"launch.ssh_args: {word}: a recipe may set user, port, key, jump hosts and the like, and nothing by "
                f"which ssh runs a program; put it into a configuration file of ssh and name that by "
                f"{SSH_CONFIG_VARIABLE}"
            )
