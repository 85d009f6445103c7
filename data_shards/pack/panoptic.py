"""Pack COCO panoptic: a JSON of segments and PNGs of their ids become label maps over things and stuff."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import check_lossless
from vitgraft.data_shards.images import decode_image
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.coco_categories import Categories, read_categories, refuse_outside
from vitgraft.data_shards.pack.coco_json import (
    ListedImage,
    by_id,
    check_size,
    entries_of,
    key_of,
    list_images,
    refuse_other_kind,
)
from vitgraft.data_shards.pack.files import check_folder, read_json
from vitgraft.data_shards.pack.image_names import FileFinder
from vitgraft.data_shards.pack.images import Reading, open_image
from vitgraft.data_shards.pack.items import PackOptions, checked, reading_of
from vitgraft.data_shards.pack.label_report import MISSING, SEGMENTS, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.plain_values import Key, as_flag, as_integer, as_key, is_missing
from vitgraft.data_shards.pack.semantic import LabelledImage, pack_label_maps

MEMBER = "panoptic.png"
"""The segment ids stay in each sample as the PNG that they came in."""


def pack_panoptic(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    masks: Path | None = None,
    classes: list[str] | None = None,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack. Classes are all categories, things and stuff, numbered from 0 by ascending id.

    Segments of categories that are no class are left out and their pixels ignored, where faults are left out.

    A segment's id is R + 256 G + 65536 B of its pixels; 0 is void and packed as 255. The packed metadata keeps each
    image's ``segments`` (id, class, isthing, iscrowd), and the sample its PNG as ``panoptic.png``.

    Args:
        images: the folder to which the images' ``file_name`` is relative.
        annotations: the panoptic JSON.
        masks: the folder to which the annotations' ``file_name`` is relative; ``None``: beside the JSON, with its stem.
        classes: names by class id, which the categories have; ``None``: the categories by ascending id.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: one line that names file and segment; nothing was written.
    """
    masks = annotations.with_suffix("") if masks is None else masks
    check_folder(images)
    tree, where = read_json(annotations), str(annotations)
    listed = entries_of(tree, "images", where)
    refuse_other_kind(tree, True, where)
    if not os.path.isdir(masks):
        raise DataError(f"{masks}: no such folder; --masks names that of the panoptic PNGs")
    report = LabelReport("pixels", [], on_error=options.get("on_error", "raise"))
    entries = by_id(listed, "images", where, report, names="file_name")
    if not entries and not report.faults:
        raise DataError(f"{where}: the data set is empty: no images are listed; check the file")
    given = _by_image(entries_of(tree, "annotations", where), entries, where, report)
    segments = [segment for annotation in given.values() for segment in _segments(annotation)]
    categories = read_categories(tree, where, segments, classes, report)
    outside = Counter(as_key(segment.get("category_id")) for segment in segments)
    refuse_outside(
        categories, {key: outside[key] for key in categories.outside if outside[key]}, "segments", where, report
    )
    finder, pairs = FileFinder(masks, "--masks", report), []
    for item in list_images(images, "--images", {key: entries[key] for key in given}, where, report):
        with report.collect():
            name = given[item.key].get("file_name")
            name = PurePosixPath(item.name).with_suffix(".png").name if is_missing(name) else name
            pairs.append((given[item.key], item, finder.find(name, f"{where}: image {item.key!s:.80}")))
    # The label maps, which take longer, are checked next: that is what is told.
    quietly = options.copy()
    quietly.pop("checked", None)
    reading = replace(reading_of(options), decode=False)
    items = []
    for labelled in checked(partial(_item, categories, where, reading), pairs, report, quietly):
        if labelled is not None:
            items.append(labelled)
            crowds = [segment["class"] for segment in labelled.metadata["segments"] if segment["iscrowd"]]
            report.crowds.update(crowds)
    for key in entries.keys() - given.keys():
        report.leave_out("images without annotation", entries[key].get("file_name"))
    numbered = zip(categories.category_ids, categories.classes, strict=True)
    source = {
        "packer": "panoptic",
        "images": str(images),
        "annotations": str(annotations),
        "masks": str(masks),
        "categories": [{"id": number, "name": name} for number, name in numbered],
    }
    return pack_label_maps(items, out, report, source=source, **options)


def _by_image(
    annotations: list[Any], entries: Mapping[Key, Any], where: str, report: LabelReport
) -> dict[Key, dict[str, Any]]:
    """Return the annotations by the images' ids; faults go to the report."""
    given: dict[Key, dict[str, Any]] = {}
    for place, annotation in enumerate(annotations):
        with report.collect():
            if not isinstance(annotation, dict):
                raise LabelFault(f"{where}: annotations: {annotation!r:.80} at place {place}; expected an object")
            number = key_of(annotation, "image_id", f"{where}: annotation at place {place}", report)
            if number not in entries:
                raise LabelFault(f"{where}: image_id {number!r:.80} is not among the images; fix the file", MISSING)
            if number in given:
                raise LabelFault(f"{where}: image {number!s:.80} has two annotations; keep one")
            given[number] = annotation
    return given


def _segments(annotation: dict[str, Any]) -> list[dict[str, Any]]:
    segments = annotation.get("segments_info")
    return [segment for segment in segments if isinstance(segment, dict)] if isinstance(segments, list) else []


def _item(
    categories: Categories, where: str, reading: Reading, found: tuple[dict[str, Any], ListedImage, Path]
) -> LabelledImage:
    annotation, listed, mask = found
    check_size(listed, open_image(listed.path, reading, listed.size), where)
    where = f"{where}: image {listed.key!s:.80}"
    segments = annotation.get("segments_info")
    if not isinstance(segments, list):
        raise LabelFault(f"{where}: segments_info {str(segments)[:80]}; expected a list of segments")
    packed: dict[int, dict[str, Any]] = {}
    table: dict[int, int] = {}
    for segment in segments:
        given, category = (segment.get("id"), segment.get("category_id")) if isinstance(segment, dict) else (0, 0)
        number, category = as_integer(given), as_key(category)
        if number is None or not 0 < number < 1 << 24 or number in table:
            raise LabelFault(f"{where}: segment id {str(given)[:80]}; expected distinct integers from 1 to 16777215")
        table[number] = IGNORE
        if category in categories.outside:
            continue
        if category not in categories.numbers:
            message = f"{where}: segment {number}: category_id {segment.get('category_id')!r:.80}"
            raise LabelFault(f"{message} is not among the categories; fix the file", UNKNOWN)
        table[number] = categories.numbers[category]
        packed[number] = {
            "id": number,
            "class": table[number],
            "isthing": int(category in categories.things),
            "iscrowd": int(bool(as_flag(segment.get("iscrowd")))),
        }
    metadata = {"image_id": listed.key, "file_name": listed.name, "segments": list(packed.values())}
    return LabelledImage(listed.path, mask, partial(panoptic_ids, mask, table), metadata, {MEMBER: mask})


def segment_ids(path: Path) -> npt.NDArray[np.int32]:
    """Return the ids of a panoptic PNG: (H, W), 0 void.

    Raises:
        DataError: broken or too large.
    """
    check_lossless(path)
    red, green, blue = decode_image(path, str(path)).numpy().astype(np.int32)
    ids: npt.NDArray[np.int32] = red + 256 * green + 65536 * blue
    return ids


def panoptic_ids(path: Path, classes: dict[int, int]) -> npt.NDArray[np.uint8]:
    """Return the label map as packed: class ids, 255 where the PNG is void.

    Args:
        classes: class id by segment id, as the JSON has it; 255 for what does not count.

    Raises:
        DataError: broken, or a segment id that is in the PNG or in ``classes`` alone.
    """
    ids = segment_ids(path)
    present, places = np.unique(ids, return_inverse=True)
    found = {int(number) for number in present} - {0}
    if alone := sorted(found ^ classes.keys()):
        number = alone[0]
        place = ("PNG", "JSON") if number in found else ("JSON", "PNG")
        raise LabelFault(
            f"{path}: segment {number} is in the {place[0]} and not in the {place[1]} ({len(alone)} such segments); "
            "expected R + 256 G + 65536 B of the pixels to be the segments' ids",
            SEGMENTS,
        )
    lookup = np.array([IGNORE if number == 0 else classes[int(number)] for number in present], dtype=np.uint8)
    return lookup[places].reshape(ids.shape)
