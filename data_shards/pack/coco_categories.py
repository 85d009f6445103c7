"""The categories of a COCO file as classes: in its own order, or in that of a list of names."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vitgraft.data_shards.listing import composed
from vitgraft.data_shards.pack.coco_json import by_id, entries_of
from vitgraft.data_shards.pack.files import check_classes
from vitgraft.data_shards.pack.label_report import UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.plain_values import Key, as_flag, as_key, is_missing, order

GROUPS = "unused categories above others or of the same name"
MERGED = "categories merged with the one below of the same name"

Entries = Mapping[Key, dict[str, Any]]


class Categories(NamedTuple):
    """``classes``: names by class id. ``category_ids``: the ids that they have in the file, as the manifest keeps them.
    ``numbers``: class id by category. ``outside``: names of categories that are no class. ``things``: the
    categories of things; others are stuff. ``notes``: (reason, name) of those that are left out or merged."""

    classes: list[str]
    category_ids: list[int]
    numbers: dict[Key, int]
    outside: dict[Key, str]
    things: set[Key]
    notes: list[tuple[str, str]]


def as_classes(entries: Entries, annotated: set[Key], classes: Sequence[str] | None, where: str) -> Categories:
    """Number the categories.

    Without ``classes`` they are numbered by ascending id. One without annotations that stands above others (it is their
    ``supercategory``), or has the name of one with annotations, is no class. One that has the name of its supercategory
    is the same class as that.

    Args:
        annotated: the categories that annotations have.
        classes: the names of the classes, which categories have by their names.

    Raises:
        DataError: no names, or two categories of one name.
    """
    things = {key for key, entry in entries.items() if as_flag(entry.get("isthing"))}
    names = {key: _name(entry) for key, entry in entries.items()}
    ids = sorted(names, key=order)
    if classes is not None:
        by_name = {_plain(name): number for number, name in enumerate(classes)}
        numbers = {key: by_name[_plain(names[key])] for key in ids if _plain(names[key]) in by_name}
        outside = {key: names[key] for key in ids if key not in numbers}
        return Categories(list(classes), _ids(len(classes), numbers), numbers, outside, things, [])
    above = {key: str(entry.get("supercategory") or "") for key, entry in entries.items()}
    parents = Counter(filter(None, above.values()))
    notes: list[tuple[str, str]] = []

    def drop(key: Key, reason: str) -> None:
        ids.remove(key)
        notes.append((reason, f"{names[key]!r} (id {key!r})"))

    for key in [key for key in ids if key not in annotated]:
        if parents[names[key]] > (above[key] == names[key]):
            drop(key, GROUPS)
    same: dict[str, list[Key]] = {}
    for key in ids:
        same.setdefault(names[key], []).append(key)
    twins: dict[Key, Key] = {}
    for name, keys in same.items():
        for key in [key for key in keys if key not in annotated and annotated.intersection(keys)]:
            keys.remove(key)
            drop(key, GROUPS)
        # A category below one of its own name is what is meant; the one above may be missing in another split.
        below = [key for key in keys if above[key] == name]
        if len(keys) > 1 and below:
            for key in [key for key in keys if key != below[-1]]:
                twins[key] = below[-1]
                drop(key, MERGED)
    check_classes([names[key] for key in ids], where)
    numbers = {key: number for number, key in enumerate(ids)}
    category_ids = [key for key in ids if isinstance(key, int)]
    return Categories(
        [names[key] for key in ids],
        category_ids if len(category_ids) == len(ids) else list(range(1, len(ids) + 1)),
        numbers | {key: numbers[twin] for key, twin in twins.items()},
        {},
        things,
        notes,
    )


def read_categories(
    tree: dict[str, Any],
    where: str,
    annotations: Iterable[dict[str, Any]],
    classes: Sequence[str] | None,
    report: LabelReport,
) -> Categories:
    """Read the categories of a COCO file and make them the report's classes.

    Args:
        annotations: objects with ``category_id``.
        classes: as of :func:`as_classes`.

    Raises:
        DataError: no such list, no names, or two categories of one name.
    """
    entries = by_id(entries_of(tree, "categories", where), "categories", where, report)
    annotated = {as_key(annotation.get("category_id")) for annotation in annotations}
    found = as_classes(entries, {key for key in annotated if key is not None}, classes, where)
    report.classes = found.classes
    for reason, name in found.notes:
        (report.repair if reason == MERGED else report.leave_out)(reason, name)
    return found


def refuse_outside(
    categories: Categories, counts: Mapping[Key, int], unit: str, where: str, report: LabelReport
) -> None:
    """Note one fault for each category that is no class, whose annotations are left out.

    Args:
        counts: annotations of such categories; ``unit``: what they are called.
    """
    for key, count in counts.items():
        name, classes = categories.outside[key][:80], len(categories.classes)
        message = f"{where}: category {name!r} ({count} {unit}) is none of the {classes} classes"
        remedy = f"add it to --classes, or leave its {unit} out with --on-error skip"
        report.fault(LabelFault(f"{message}; {remedy}", UNKNOWN))
        report.leave_out(f"{unit} of categories that are no class", f"category {name!r}", count)


def _name(entry: dict[str, Any]) -> str:
    name = entry.get("name")
    return "" if is_missing(name) else name if isinstance(name, str) else str(name)[:200]


def _plain(name: str) -> str:
    """Return a name's form for comparison: without surrounding blanks, and with normalised Unicode."""
    return composed(name.strip())


def _ids(count: int, numbers: Mapping[Key, int]) -> list[int]:
    """Return the file's ids of the classes; where it has none, or one that is no integer, an id that it does not
    use."""
    found = {number: key for key, number in numbers.items() if isinstance(key, int)}
    used = set(found.values())
    free = (number for number in itertools.count(1) if number not in used)
    return [found[number] if number in found else next(free) for number in range(count)]
