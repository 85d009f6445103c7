"""Identity of a recipe: its difference from the defaults, equal for recipes that compute the same.

A key that is new, at a default that means "as before", changes no hash of an older run. That holds only while defaults
stay: ``tests/golden/defaults.json`` has them all, and a test fails where one changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vitgraft.configs.schema.section import Section


def differences(section: Section) -> dict[str, Any]:
    """Return the keys of a section whose values are not the defaults, of the sections within it likewise.

    ``name``, which says what a section is, is always there. Values are as in JSON.
    """
    return _pruned(section, section.model_dump(mode="json"))


def _pruned(section: Section, dumped: dict[str, Any]) -> dict[str, Any]:
    tree = {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key == "name" or value != field.get_default(call_default_factory=True, validated_data={}):
            tree[key] = _below(value, dumped[key])
    return tree


def _below(value: Any, dumped: Any) -> Any:
    if isinstance(value, Section):
        return _pruned(value, dumped)
    if isinstance(value, list) and any(isinstance(item, Section) for item in value):
        # A list of one may be written as that one.
        items = dumped if isinstance(dumped, list) else [dumped]
        return [_below(item, below) for item, below in zip(value, items, strict=True)]
    return dumped


def remove_keys(tree: dict[str, Any], keys: Iterable[str], *, unset_only: bool = False) -> None:
    """Remove dotted keys from a dumped recipe, in every entry of a list on their way.

    Args:
        unset_only: only where the value is null.
    """
    for key in keys:
        *parents, leaf = key.split(".")
        nodes = [tree]
        for parent in parents:
            found = [node[parent] for node in nodes if node.get(parent) is not None]
            nodes = [item for node in found for item in (node if isinstance(node, list) else [node])]
        for node in nodes:
            if not unset_only or node.get(leaf) is None:
                node.pop(leaf, None)
