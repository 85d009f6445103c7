"""Pack COCO panoptic: a JSON of segments and PNGs of their ids become label maps over things and stuff."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.images import decode_image
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.coco import by_id
from vitgraft.data_shards.pack.files import check_classes, check_folder, inside, is_file, read_json
from vitgraft.data_shards.pack.images import Reading, open_image
from vitgraft.data_shards.pack.items import PackOptions, checked, reading_of
from vitgraft.data_shards.pack.label_report import MISSING, SEGMENTS, SIZES, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.semantic import LabelledImage, pack_label_maps

MEMBER = "panoptic.png"
"""The segment ids stay in each sample as the PNG that they came in."""


def pack_panoptic(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    masks: Path | None = None,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack. Classes are all categories, things and stuff, numbered from 0 by ascending id.

    A segment's id is R + 256 G + 65536 B of its pixels; 0 is void and packed as 255. The packed metadata keeps each
    image's ``segments`` (id, class, isthing, iscrowd), and the sample its PNG as ``panoptic.png``.

    Args:
        images: the folder to which the images' ``file_name`` is relative.
        annotations: the panoptic JSON.
        masks: the folder to which the annotations' ``file_name`` is relative; ``None``: beside the JSON, with its stem.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: one line that names file and segment; nothing was written.
    """
    masks = annotations.with_suffix("") if masks is None else masks
    check_folder(images)
    check_folder(masks)
    tree, where = read_json(annotations), str(annotations)
    if not isinstance(tree, dict) or not isinstance(tree.get("annotations"), list):
        raise DataError(f"{where}: expected a COCO panoptic file with images, annotations and categories")
    categories = by_id(tree, "categories", where)
    listed = by_id(tree, "images", where)
    if not listed:
        raise DataError(f"{where}: the data set is empty: no images are listed; check the file")
    ids = sorted(categories)
    classes = [str(categories[number].get("name", "")) for number in ids]
    check_classes(classes, where)
    report = LabelReport("pixels", classes, on_error=options.get("on_error", "raise"))
    things = {number: bool(categories[number].get("isthing")) for number in ids}
    given: dict[int, dict[str, Any]] = {}
    for annotation in tree["annotations"]:
        with report.collect():
            number = annotation.get("image_id") if isinstance(annotation, dict) else None
            if not isinstance(number, int) or number not in listed:
                raise LabelFault(f"{where}: image_id {str(number)[:80]} is not among the images; fix the file", MISSING)
            if number in given:
                raise LabelFault(f"{where}: image {number} has two annotations; keep one")
            given[number] = annotation
    pairs = [(annotation, listed[number]) for number, annotation in sorted(given.items())]
    # The label maps, which take longer, are checked next: that is what is told.
    quietly = options.copy()
    quietly.pop("checked", None)
    items = checked(
        partial(_item, images, masks, things, where, replace(reading_of(options), decode=False)), pairs, report, quietly
    )
    for number in sorted(listed.keys() - given.keys()):
        report.leave_out("images without annotation", listed[number].get("file_name"))
    source = {
        "packer": "panoptic",
        "images": str(images),
        "annotations": str(annotations),
        "masks": str(masks),
        "categories": [{"id": number, "name": str(categories[number]["name"])} for number in ids],
    }
    return pack_label_maps([item for item in items if item is not None], out, report, source=source, **options)


def _item(
    images: Path,
    masks: Path,
    things: dict[int, bool],
    where: str,
    reading: Reading,
    pair: tuple[dict[str, Any], dict[str, Any]],
) -> LabelledImage:
    annotation, image = pair
    where = f"{where}: image {image['id']}"
    path = inside(images, image.get("file_name"), where)
    mask = inside(masks, annotation.get("file_name"), where)
    for file, option in ((path, "--images"), (mask, "--masks")):
        if not is_file(file):
            raise LabelFault(f"{file}: no such file, though {where} lists it; check {option}", MISSING)
    stated = (image.get("height"), image.get("width"))
    opened = open_image(path, reading, stated)
    if stated != opened.size:
        raise LabelFault(
            f"{path}: {opened}, {where} says {image.get('width')}x{image.get('height')}; "
            "the annotations belong to another version of it",
            SIZES,
        )
    segments = annotation.get("segments_info")
    if not isinstance(segments, list):
        raise LabelFault(f"{where}: segments_info {str(segments)[:80]}; expected a list of segments")
    numbers = {category: number for number, category in enumerate(things)}
    packed: dict[int, dict[str, Any]] = {}
    for segment in segments:
        number, category = (segment.get("id"), segment.get("category_id")) if isinstance(segment, dict) else (0, 0)
        if not isinstance(number, int) or not 0 < number < 1 << 24 or number in packed:
            raise LabelFault(f"{where}: segment id {str(number)[:80]}; expected distinct integers from 1 to 16777215")
        if not isinstance(category, int) or category not in things:
            message = f"{where}: segment {number}: category_id {str(category)[:80]} is not among the categories"
            raise LabelFault(f"{message}; fix the file", UNKNOWN)
        packed[number] = {
            "id": number,
            "class": numbers[category],
            "isthing": int(things[category]),
            "iscrowd": int(bool(segment.get("iscrowd", 0))),
        }
    table = {number: segment["class"] for number, segment in packed.items()}
    metadata = {"image_id": image["id"], "file_name": image["file_name"], "segments": list(packed.values())}
    return LabelledImage(path, mask, partial(panoptic_ids, mask, table), metadata, {MEMBER: mask})


def segment_ids(path: Path) -> npt.NDArray[np.int32]:
    """The ids of a panoptic PNG: (H, W), 0 void.

    Raises:
        DataError: broken or too large.
    """
    red, green, blue = decode_image(path, str(path)).numpy().astype(np.int32)
    ids: npt.NDArray[np.int32] = red + 256 * green + 65536 * blue
    return ids


def panoptic_ids(path: Path, classes: dict[int, int]) -> npt.NDArray[np.uint8]:
    """The label map as packed: class ids, 255 where the PNG is void.

    Args:
        classes: class id by segment id, as the JSON has it.

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
