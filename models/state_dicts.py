"""Choice of the state dict to load among the dictionaries in a file of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.models.pickles import Global, Record
from vitgraft.models.tensor_records import is_foreign_tensor, is_tensor
from vitgraft.models.weight_names import shown

_USUAL = ("state_dict", "model", "module", "model_state_dict", "model_state", "teacher")
"""Names of the state dict in files that hold others too, the first that is there taken. Of the pairs of student and
teacher that DINO and its successors save, evaluations use the teacher."""
_DEPTH = 4
_OTHERS = 8


def kind_of(value: Any) -> str:
    """Return a description of the type of a value read from a file, for a message."""
    if isinstance(value, Record):
        return shown(value, 100)
    return f"name of {shown(value, 100)}" if isinstance(value, Global) else type(value).__name__


def chosen_state(content: Any, key: str | None, where: str) -> tuple[dict[str, Any], str | None]:
    """Return the state dict in a file's content: names and values, tensors or their records among them.

    Args:
        content: what the file holds.
        key: the path of a dictionary in it (``teacher``, ``model.encoder``), or a prefix of its names; ``None``: the
            only one there is, or the usual one.
        where: file and key of the recipe, for errors.

    Returns:
        The dictionary, and a sentence on the choice where there was one.

    Raises:
        CheckpointError: no state dict there.
        ConfigError: several, none of them the usual one, or none of the name ``key``.
    """
    top = _items(content)
    if top is None:
        if is_tensor(content):
            raise CheckpointError(f"{where} holds a single tensor; expected a dictionary of tensors by their names")
        if isinstance(content, Record):
            raise CheckpointError(
                f"{where} holds a whole Python object ({kind_of(content)}), which is not loaded, since that could run "
                "code; save its state_dict()"
            )
        raise CheckpointError(f"{where} holds a {kind_of(content)}; expected a dictionary of tensors")
    states = dict(_states(top))
    if key is not None:
        return _named(states, key, where), f"taken: {key}"
    if not states:
        raise CheckpointError(
            f"{where} holds no tensors; expected a state dict, maybe under a name such as {', '.join(_USUAL[:3])}"
        )
    path = _usual(states)
    if path is None:
        raise ConfigError(f"{where} holds several state dicts; choose one of {_choices(states)} as FILE#NAME")
    others = [other for other in states if other != path and _is_state(states[other])]
    if not others:
        return states[path], f"taken: {path}" if path and path.split(".")[-1] not in _USUAL[:3] else None
    what = path or "the tensors that stand beside them"
    return states[path], f"taken: {what}; the file also holds {_choices(others)}, which FILE#NAME chooses"


def _states(top: dict[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every dictionary that holds a tensor, with its path; each once, however often the file refers to it."""
    level: list[tuple[str, dict[Any, Any]]] = [("", top)]
    seen = {id(top)}
    for _ in range(_DEPTH):
        below: list[tuple[str, dict[Any, Any]]] = []
        for path, values in level:
            named = {name: value for name, value in values.items() if isinstance(name, str)}
            if any(isinstance(v, Tensor) or is_tensor(v) or is_foreign_tensor(v) for v in named.values()):
                yield path, named
            for name, value in named.items():
                inside = _items(value)
                if inside is not None and id(inside) not in seen and not is_tensor(value):
                    seen.add(id(inside))
                    below.append((f"{path}.{name}" if path else name, inside))
        level = below


def _items(value: Any) -> dict[Any, Any] | None:
    """Return the items of a dictionary, or of an object of a class derived from it."""
    if isinstance(value, Record):
        return value.items or None
    return value if isinstance(value, dict) else None


def _is_state(state: dict[str, Any]) -> bool:
    """Tell whether names are a module's: one has a dot, unlike those of loose tensors such as a loss's centre."""
    return any("." in name for name in state)


def _usual(states: dict[str, dict[str, Any]]) -> str | None:
    """Return the path of the state dict to take; ``None`` when that is not clear."""
    proper = [path for path in states if _is_state(states[path])]
    usual = [path for name in _USUAL for path in proper if path == name or path.startswith(f"{name}.")]
    if usual:
        return usual[0]
    paths = proper or list(states)
    return paths[0] if len(paths) == 1 or paths[0] == "" else None


def _named(states: dict[str, dict[str, Any]], key: str, where: str) -> dict[str, Any]:
    if key in states:
        return states[key]
    for state in states.values():
        inside = {name.removeprefix(f"{key}."): value for name, value in state.items() if name.startswith(f"{key}.")}
        if inside:
            return inside
    raise ConfigError(
        f"{where} holds nothing of the name {key[:100]!r}; it holds {_choices(states) or _choices(_tops(states))}"
    )


def _tops(states: dict[str, dict[str, Any]]) -> list[str]:
    """Return the distinct first parts of the names in the state dicts."""
    return list(dict.fromkeys(name.split(".")[0] for state in states.values() for name in state))


def _choices(paths: Any) -> str:
    names = [shown(path, 60) for path in paths if path]
    return ", ".join(names[:_OTHERS]) + (f" and {len(names) - _OTHERS} more" if len(names) > _OTHERS else "")
