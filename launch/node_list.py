"""SLURM's compact lists of nodes, e.g. ``node[01-03,7],gpu2-[1-2]``. Pure functions.

``scontrol show hostnames`` prints the same, where SLURM's commands are installed; inside a container they seldom are.
"""

from __future__ import annotations

import itertools
import re

from vitgraft.configs.errors import ConfigError

MAX_NODES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand_node_list(text: str) -> list[str]:
    """The names in a compact list, in its order: ``n[08-10]`` is n08, n09, n10, and ``r[0-1]n[1-2]`` is r0n1 to r1n2.

    Raises:
        ConfigError: not such a list, or one of more than ``MAX_NODES`` nodes.
    """
    names: list[str] = []
    for item in _COMMA_OUTSIDE_BRACKETS.split(text.strip()):
        # Outside and inside of brackets in turn: literal, ranges, literal, ranges, …, literal.
        parts = re.split(r"\[([^\[\]]*)\]", item)
        choices = [_numbers(part, text) if at % 2 else [part] for at, part in enumerate(parts)]
        found = list(itertools.islice(itertools.product(*choices), MAX_NODES + 1 - len(names)))
        names += ["".join(words) for words in found]
        if len(names) > MAX_NODES:
            raise ConfigError(f"a list of more than {MAX_NODES} nodes: {text[:80]!r}; give --leader instead")
    for name in names:
        if not _NAME.fullmatch(name):
            raise _bad(text, f"{name!r} is no name of a node")
    return names


def _numbers(text: str, whole: str) -> list[str]:
    """``08-10,12`` as 08, 09, 10, 12: the zeros in front are those of a range's first number."""
    numbers: list[str] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise _bad(whole, f"{part!r} is neither a number nor a range")
        first, last = found[1], found[2] or found[1]
        if int(last) < int(first):
            raise _bad(whole, f"the range {part} runs backwards")
        if int(last) - int(first) + len(numbers) >= MAX_NODES:
            raise ConfigError(f"a list of more than {MAX_NODES} nodes: {whole[:80]!r}; give --leader instead")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _bad(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"{text[:80]!r} is no list of nodes as SLURM writes it: {why}; give --nodes, --node-rank and --leader instead"
    )
