"""Untrusted YAML as plain data: bounded, without objects or duplicate keys.

A few hundred bytes of aliases can stand for billions of nodes, and a number for gigabytes of digits. So nodes are
counted while they are composed, each alias with all that it stands for, before anything is built from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from vitgraft.configs.errors import ConfigError

MAX_SIZE = 1 << 18
"""Characters of all values of one text plus eight for each, with aliases expanded."""
MAX_DEPTH = 50
_MAX_NUMBER = 100
"""Characters of a number."""
_PREFIX = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_OCTAL = re.compile(r"[-+]?0_*[0-9]")
_FLOAT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text into None, bool, int, float, str, list and dict, none of them shared between two places.

    Numbers are those of YAML 1.2 (PyYAML alone reads ``1e-4`` as a string), finite, and integers have at most 64 bits.
    A date is a string.

    Args:
        where: the text's name for people.

    Raises:
        ConfigError: names the line and what is wrong there.
    """
    loader = None
    try:
        loader = _Loader(text)
        return _unshared(loader.get_single_data())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context)[:300]
        if problem.startswith("found character '\\t'"):
            problem = "a tab where YAML takes spaces only"
        said = problem if isinstance(error, _Refused) else f"not valid YAML: {problem}; fix the syntax"
        raise ConfigError(f"{where}{line}: {said}") from None
    except yaml.YAMLError as error:  # a character that no YAML may have
        raise ConfigError(f"{where}: not valid YAML: {error}; fix the syntax") from None
    except ValueError:  # \U with a number that is no character
        raise ConfigError(f"{where}: not valid YAML: an escape that is no character; fix the syntax") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(tree: Any) -> str:
    """Write plain data so that :func:`parse_yaml`, and other readers of YAML, read the same from it."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Composes with a budget, builds plain values only."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._size = self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self._next()
            mark = alias.start_mark
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _refused(f"the alias *{alias.anchor} stands within what it names; write it out", mark)
            self._count(self._sizes[id(node)], mark)
            return node
        mark, before = self._next().start_mark, self._size
        self._count(8 + len(getattr(self._next(), "value", "")), mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} deep; is this the right file?", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        # What an anchor names stays alive until the text is read, so that no other node takes its id.
        self._sizes[id(node)] = self._size - before
        return node

    def _next(self) -> Any:
        return self.peek_event()  # type: ignore[no-untyped-call]

    def _count(self, size: int, mark: yaml.Mark) -> None:
        self._size += size
        if self._size > MAX_SIZE:
            raise _refused(
                f"larger than {MAX_SIZE:,} characters, each alias counted with all that it stands for; is this the "
                "right file?",
                mark,
            )

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            # A tag can make a list or a mapping of a word, too.
            if not isinstance(key, yaml.ScalarNode) or key.tag in (f"{_PREFIX}seq", f"{_PREFIX}map"):
                raise _refused(
                    "a key that is a list or a mapping; expected a word; is this the right file?", key.start_mark
                )
            merge = key.tag == f"{_PREFIX}merge"
            value, line = "<<" if merge else self.construct_object(key), key.start_mark.line + 1
            if value in lines:
                raise _refused(
                    f"the key {_short(key.value)} is given twice, in line {lines[value]} and in line {line}; keep one",
                    key.start_mark,
                )
            lines[value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings which :func:`parse_yaml` would read as another type."""


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is refused; ``problem`` names the remedy."""


def _refused(problem: str, mark: yaml.Mark) -> _Refused:
    return _Refused(problem=problem, problem_mark=mark)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _scalar(what: str, build: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a constructor that reports an invalid scalar with its line."""

    def construct(loader: Any, node: Any) -> Any:
        text = loader.construct_scalar(node)
        if what != "text" and len(text) > _MAX_NUMBER:
            raise _refused(
                f"a number of {len(text):,} characters; expected {_MAX_NUMBER} at most; correct it", node.start_mark
            )
        if what == "an integer" and _OCTAL.match(text):
            raise _refused(
                f"{_short(text)} begins with a zero, which some read as octal; write it without", node.start_mark
            )
        try:
            value = build(loader, node)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError):
            raise _refused(f"{_short(text)} is not {what}; correct it", node.start_mark) from None
        if isinstance(value, int) and not isinstance(value, bool) and not -(1 << 63) <= value < 1 << 63:
            raise _refused(f"{_short(text)} does not fit into 64 bits; correct it", node.start_mark)
        if isinstance(value, float) and not math.isfinite(value):
            raise _refused(f"{_short(text)} is not finite; give a finite number", node.start_mark)
        return value

    return construct


def _text(loader: Any, node: Any) -> str:
    value = str(loader.construct_scalar(node))
    if "\0" in value:
        raise ValueError
    value.encode()  # half of a surrogate pair is no character
    return value


def _unshared(value: Any) -> Any:
    """Return a copy of the tree in which aliases are separate copies, so that a change of one changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


_SAFE = yaml.constructor.SafeConstructor
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(f"{_PREFIX}float", _FLOAT, list("-+0123456789."))
# Dates are text, and 1:30 is not ninety. Integers are tried before floats.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, _INTEGER if tag.endswith(":int") else pattern)
        for tag, pattern in sorted(pairs, key=lambda pair: pair[0].endswith(":float"))
        if not tag.endswith((":timestamp", ":value"))
    ]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    f"{_PREFIX}null": _SAFE.construct_yaml_null,
    f"{_PREFIX}bool": _scalar("true or false", _SAFE.construct_yaml_bool),
    f"{_PREFIX}int": _scalar("an integer", _SAFE.construct_yaml_int),
    f"{_PREFIX}float": _scalar("a number", _SAFE.construct_yaml_float),
    f"{_PREFIX}str": _scalar("text", _text),
    f"{_PREFIX}seq": _SAFE.construct_yaml_seq,
    f"{_PREFIX}map": _SAFE.construct_yaml_map,
    None: _SAFE.construct_undefined,
}
