"""Lists of a COCO file by their ids, and checks of its values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.pack.image_names import FileFinder
from vitgraft.data_shards.pack.images import OpenedImage
from vitgraft.data_shards.pack.label_report import SIZES, LabelFault, LabelReport
from vitgraft.data_shards.pack.plain_values import STRINGS, Key, as_integer, as_key, is_missing, order

NUMBERED = "ids made up"


def entries_of(tree: Any, key: str, where: str) -> list[Any]:
    """Return one of the lists of a COCO file.

    Raises:
        DataError: this is no COCO file, or it has no such list.
    """
    if isinstance(tree, list):
        kind = "COCO results (predictions)" if tree and isinstance(tree[0], dict) and "score" in tree[0] else "a list"
        raise DataError(f"{where}: {kind}; expected a COCO file: an object with images, annotations and categories")
    if not isinstance(tree, dict):
        raise DataError(f"{where}: expected a COCO file: an object with images, annotations and categories")
    entries = tree.get(key)
    if not isinstance(entries, list):
        there = ", ".join(repr(str(name)[:30]) for name in list(tree)[:8]) or "nothing"
        raise DataError(f"{where}: no list {key!r} (it holds {there}); expected a COCO file")
    return entries


def refuse_other_kind(tree: dict[str, Any], panoptic: bool, where: str) -> None:
    """Raise DataError for a panoptic file where instances are expected, or the reverse."""
    given = tree.get("annotations")
    first = next((entry for entry in given if isinstance(entry, dict)), {}) if isinstance(given, list) else {}
    if not panoptic and "segments_info" in first:
        raise DataError(f"{where}: COCO panoptic, not COCO instances: vitgraft shards pack panoptic")
    if panoptic and "segments_info" not in first and first.keys() & {"bbox", "segmentation"}:
        raise DataError(f"{where}: COCO instances, not COCO panoptic: vitgraft shards pack coco")


def by_id(entries: list[Any], key: str, where: str, report: LabelReport, names: str = "") -> dict[Key, dict[str, Any]]:
    """Return the objects of a list by their ids; faults go to the report.

    Args:
        names: a key of the entries whose text stands for an id that is absent; without it they are numbered.
    """
    found: dict[Key, dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        with report.collect():
            if not isinstance(entry, dict):
                raise LabelFault(f"{where}: {key}: {str(entry)[:80]!r} at place {place}; expected an object")
            given = entry.get("id")
            if is_missing(given):
                number: Key | None = as_key(entry.get(names)) if names else f"at place {place}"
                report.repair(NUMBERED, f"{key} at place {place}")
            else:
                number = as_key(given)
            if number is None:
                raise LabelFault(f"{where}: {key}: id {given!r:.80} at place {place}; expected an integer or text")
            if isinstance(given, str) and isinstance(number, int):
                report.repair(STRINGS, f"{where}: {key}: id {given!r:.80}")
            if number in found:
                raise LabelFault(f"{where}: {key}: id {number!r:.80} occurs twice; make ids unique")
            found[number] = entry
    return found


def key_of(entry: dict[str, Any], name: str, where: str, report: LabelReport) -> Key:
    """Return the id that an entry refers to.

    Raises:
        LabelFault: none.
    """
    key = as_key(entry.get(name))
    if key is None:
        given = f"{entry[name]!r:.80}" if name in entry else "is absent"
        raise LabelFault(f"{where}: {name} {given}; expected an id of the file, an integer or text")
    if isinstance(key, int) and isinstance(entry[name], str):
        report.repair(STRINGS, f"{where}: {name}")
    return key


class ListedImage(NamedTuple):
    """An image of a COCO file. ``name``: relative to the folder of the images. ``stated``: (height, width), ``None``
    where the file states none."""

    key: Key
    name: str
    path: Path
    stated: tuple[int | None, int | None]

    @property
    def size(self) -> tuple[int, int] | None:
        """The stated size, where both sides are."""
        height, width = self.stated
        return None if height is None or width is None else (height, width)


def list_images(
    folder: Path, option: str, entries: Mapping[Key, dict[str, Any]], where: str, report: LabelReport
) -> list[ListedImage]:
    """Find the files of all images, by ascending id; faults go to the report.

    Args:
        option: names the folder in messages.
    """
    finder = FileFinder(folder, option, report)
    listed = []
    for key in sorted(entries, key=order):
        place = f"{where}: image {key!s:.80}"
        with report.collect():
            path = finder.find(entries[key].get("file_name"), place)
            stated = _stated_size(entries[key], place, report)
            listed.append(ListedImage(key, str(path.relative_to(folder)), path, stated))
    return listed


def check_size(listed: ListedImage, opened: OpenedImage, where: str) -> None:
    """Raise LabelFault unless an image has the size that is stated."""
    stated = tuple(own if side is None else side for side, own in zip(listed.stated, opened.size, strict=True))
    if stated != opened.size:
        raise LabelFault(
            f"{listed.path}: image {listed.key!s:.80} is {opened} (width x height), {where} says "
            f"{stated[1]}x{stated[0]}; the annotations belong to another version of it",
            SIZES,
        )


def _stated_size(entry: dict[str, Any], where: str, report: LabelReport) -> tuple[int | None, int | None]:
    sides: list[int | None] = []
    for name in ("height", "width"):
        value = entry.get(name)
        if is_missing(value) or value == 0:
            sides.append(None)
            continue
        side = as_integer(value)
        if side is None:
            raise LabelFault(f"{where}: {name} {value!r:.80}; expected pixels", SIZES)
        if isinstance(value, str):
            report.repair(STRINGS, f"{where}: {name}")
        sides.append(side)
    return sides[0], sides[1]
