"""Read a recipe: YAML plus ``--set`` overrides in, a validated :class:`Recipe` or one-line errors out."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.files import check_reachable, read_text
from vitgraft.configs.schema import Recipe
from vitgraft.configs.yaml_text import dump_yaml, parse_yaml

MAX_RECIPE_BYTES = 1 << 20
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def find_recipe(name: str) -> Path:
    """Return the file that a recipe's name denotes: a path, or a packaged recipe such as ``quickstart/detection``.

    Raises:
        ConfigError: there is no such file; names the nearest packaged recipe.
    """
    path = Path(name)
    if os.path.isfile(path):  # false for names that no file can have, too
        return path
    root = Path(str(resources.files("vitgraft.configs")))
    packaged = root / (name if name.endswith(".yaml") else name + ".yaml")
    if not path.is_absolute() and os.path.isfile(packaged):
        return packaged
    check_reachable(path)
    names = sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.yaml"))
    raise ConfigError(f"{_short_of(name, 300)}: no such recipe file; packaged recipes: {', '.join(names)}")


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        name: a path or the name of a packaged recipe.
        overrides: ``a.b=value`` strings, the values in YAML.

    Raises:
        ConfigError: one line with file, key, value and remedy.
    """
    path = find_recipe(name)
    tree = read_tree(path)
    for override in overrides or []:
        _override(tree, override)
    return validate_recipe(tree, str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """Read a recipe's keys without looking at what they say.

    Raises:
        ConfigError: no such file, or no YAML mapping.
    """
    tree = parse_yaml(read_text(path, MAX_RECIPE_BYTES, ConfigError), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping with model, data and train; found {type(tree).__name__}")
    return tree


def validate_recipe(tree: Any, where: str) -> Recipe:
    """Return the typed recipe, or a ConfigError that names ``where``, key, value and remedy."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every default written out."""
    return dump_yaml(recipe.model_dump(mode="json"))


def default_run(recipe: Recipe) -> Path:
    """Return runs/NAME of a recipe.

    Raises:
        ConfigError: its name leads elsewhere.
    """
    name = Path(recipe.name)
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise ConfigError(f"name: {recipe.name[:100]!r} names no folder under runs/; give --run-dir, or another name")
    return Path("runs") / name


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {_short_of(override)}: expected KEY=VALUE, e.g. --set train.optimizer.lr=1e-4")
    node: Any = tree
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        node = _child(node, parent, ".".join(parents[: depth + 1]), override)
    value = parse_yaml(text, f"--set {_short_of(key)}")
    if isinstance(node, list):
        node[_index(node, leaf, key, override)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise ConfigError(
            f"--set {_short_of(override)}: {_short_of('.'.join(parents))} is {_short(node)}, not a section; check the "
            "key"
        )


def _child(node: Any, key: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, path, override)]
    if not isinstance(node, dict):
        raise ConfigError(
            f"--set {_short_of(override)}: {_short_of(path)} is inside {_short(node)}, which is not a section; check "
            "the key"
        )
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, path: str, override: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(node):
        raise ConfigError(f"--set {_short_of(override)}: {_short_of(path)} needs an index from 0 to {len(node) - 1}")
    return int(key)


def _explain(error: ValidationError, where: str) -> str:
    """Return the first error as one line; the number of further ones is appended."""
    details = error.errors(include_url=False)
    first = details[0]
    loc = _recipe_path(first["loc"])
    key = ".".join(map(str, loc)) or "recipe"
    value = first.get("input")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _keys_at(first["loc"][:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(_keys_at(first['loc'][:-1]))}"
        message = f"unknown key (value {_short(value)}); {hint}"
    elif first["type"] == "missing":
        message = "missing; add this key"
    elif first["type"] == "union_tag_invalid":
        expected = first.get("ctx", {}).get("expected_tags", "")
        tag = first.get("ctx", {}).get("tag", "")
        near = difflib.get_close_matches(str(tag), re.findall(r"'([^']+)'", expected), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        key, message = f"{key}.name", f"{tag!r} is not one of {expected}{hint}"
    elif first["type"] == "union_tag_not_found":
        message = "the key 'name' is missing; say which one it is"
    elif first["type"] == "list_type" and isinstance(value, dict) and all(str(part).isdigit() for part in value):
        message = (
            f"{_short_of('.'.join(value))} is a place in a list that the recipe does not write out; give all of it"
        )
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, found {_short(value)}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {_short_of(key)}: {_short_of(message, 800)}{more}"


def _short(value: Any) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _short_of(text: str, length: int = 100) -> str:
    """Return the text, without its middle where it is long."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def _recipe_path(loc: tuple[int | str, ...]) -> list[int | str]:
    """Return a pydantic location without the tags of unions, i.e. as the user wrote the keys."""
    path: list[int | str] = []
    for model, part in _walk(loc):
        if model is not None or isinstance(part, int):
            path.append(part)
    return path


def _walk(loc: tuple[int | str, ...]) -> list[tuple[type[BaseModel] | None, int | str]]:
    """Return each part of a location with the section it is a key of; ``None`` for a union's tag."""
    steps: list[tuple[type[BaseModel] | None, int | str]] = []
    candidates: list[type[BaseModel]] = [Recipe]
    for part in loc:
        tagged = [m for m in candidates if m.model_fields.get("name") and m.model_fields["name"].default == part]
        if len(candidates) > 1 and tagged:
            candidates = tagged
            steps.append((None, part))
            continue
        owner = candidates[0] if candidates else Recipe
        if isinstance(part, str):
            field = owner.model_fields.get(part)
            candidates = _sections(field.annotation) if field is not None else []
            steps.append((owner, part))
        else:
            steps.append((None, part))
    return steps


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys of the section at a location."""
    candidates: list[type[BaseModel]] = [Recipe]
    for part in loc:
        tagged = [m for m in candidates if m.model_fields.get("name") and m.model_fields["name"].default == part]
        if len(candidates) > 1 and tagged:
            candidates = tagged
        elif isinstance(part, str) and candidates and part in candidates[0].model_fields:
            candidates = _sections(candidates[0].model_fields[part].annotation)
    return sorted(candidates[0].model_fields) if candidates else []


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return all section classes that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType, list, dict):
        return [section for part in typing.get_args(annotation) for section in _sections(part)]
    return []
