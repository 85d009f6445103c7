"""Pack a COCO instances file and its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import covered
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.files import check_classes, check_folder, inside, is_file, read_json
from vitgraft.data_shards.pack.images import OpenedImage, Reading, open_image, settle
from vitgraft.data_shards.pack.items import PackOptions, Prepared, checked, pack_items, reading_of
from vitgraft.data_shards.pack.label_report import BOXES, MASKS, MISSING, SIZES, UNKNOWN, LabelFault, LabelReport

TOLERANCE = 1.0
"""Boxes may stick out of the image by this many pixels and are then clipped; more is an error."""

MAX_NUMBER = 1e15


@dataclass
class CocoImage:
    """One image of a checked annotations file, its annotations in the form that is packed."""

    opened: OpenedImage
    metadata: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """See :class:`~vitgraft.data_shards.pack.items.Item`."""
        return (self.opened.path,)

    def prepare(self) -> Prepared:
        """The image, as it is where its format is a packed one."""
        return Prepared(self.opened.member(), self.metadata)


@dataclass
class CocoSet:
    """A checked annotations file. ``degenerate``: ids of annotations left out because their box has no area."""

    classes: list[str]
    category_ids: list[int]
    images: list[CocoImage]
    degenerate: list[int]
    report: LabelReport


def pack_coco(
    images: Path,
    annotations: Path,
    out: Path,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack. Classes are numbered from 0 by ascending category id.

    Images without annotations are kept. An annotation without segmentation keeps ``segmentation: null``; its mask in
    training is then its box. Degenerate boxes are left out and listed in the manifest's ``source``.

    Args:
        images: the folder to which ``file_name`` is relative.
        annotations: the instances JSON.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: one line that names file and annotation; nothing was written.
    """
    content = read_coco(images, annotations, **options)
    source = {
        "packer": "coco",
        "images": str(images),
        "annotations": str(annotations),
        "degenerate_boxes_left_out": content.degenerate,
    }
    return pack_boxes(content, out, source=source, **options)


def pack_boxes(content: CocoSet, out: Path, *, source: dict[str, Any], **options: Unpack[PackOptions]) -> Manifest:
    """Write checked images and their annotations as a data set for detection."""
    return pack_items(
        content.images,
        out,
        "detection",
        content.report,
        source=source,
        category_ids=content.category_ids,
        **options,
    )


def read_coco(images: Path, annotations: Path, **options: Unpack[PackOptions]) -> CocoSet:
    """Read and check an instances file against the images' headers.

    Raises:
        DataError: one line that names file and annotation.
    """
    check_folder(images)
    tree = read_json(annotations)
    where = str(annotations)
    if not isinstance(tree, dict) or not isinstance(tree.get("annotations"), list):
        raise DataError(f"{where}: expected a COCO instances file with images, annotations and categories")
    categories = by_id(tree, "categories", where)
    listed = by_id(tree, "images", where)
    if not listed:
        raise DataError(f"{where}: the data set is empty: no images are listed; check the file")
    ids = sorted(categories)
    classes = [str(categories[i].get("name", "")) for i in ids]
    check_classes(classes, where)
    report = LabelReport("instances", classes, samples=len(listed), on_error=options.get("on_error", "raise"))
    entries = [entry for _, entry in sorted(listed.items())]
    opened = checked(partial(_image, images, where, reading_of(options)), entries, report, options)
    found = {image.metadata["image_id"]: image for image in opened if image is not None}
    degenerate: list[int] = []
    numbers = {category: number for number, category in enumerate(ids)}
    faulty = listed.keys() - found.keys()
    for annotation in by_id(tree, "annotations", where).values():
        with report.collect():
            if _id(annotation, "image_id", f"{where}: annotation {annotation['id']}") not in faulty:
                _annotate(annotation, found, numbers, degenerate, where)
    count_boxes(report, found.values())
    for number in degenerate:
        report.leave_out("boxes without area", f"annotation {number}")
    settle([(image.opened, image.metadata) for image in found.values()], report, options.get("say"))
    report.close(options.get("say"))
    return CocoSet(classes, ids, list(found.values()), degenerate, report)


def count_boxes(report: LabelReport, images: Iterable[CocoImage]) -> None:
    """Count instances by class, and images without any."""
    for image in images:
        items = image.metadata["annotations"]
        report.counts.update(item["class"] for item in items)
        report.unlabelled += not items


def by_id(tree: dict[str, Any], key: str, where: str) -> dict[int, dict[str, Any]]:
    """The objects of one list of a COCO file, by their ids.

    Raises:
        DataError: no such list, or an id that is missing or occurs twice.
    """
    entries = tree.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{where}: no list {key!r}; expected a COCO file")
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise DataError(f"{where}: {key}: {str(entry)[:80]} has no integer id; fix the file")
        if entry["id"] in found:
            raise DataError(f"{where}: {key}: id {entry['id']} occurs twice; make ids unique")
        found[entry["id"]] = entry
    return found


def _image(images: Path, where: str, reading: Reading, entry: dict[str, Any]) -> CocoImage:
    path = inside(images, entry.get("file_name"), f"{where}: image {entry['id']}")
    if not is_file(path):
        message = f"{path}: no such image, though {where} lists it (id {entry['id']}); check --images"
        raise LabelFault(message, MISSING)
    stated = (entry.get("height"), entry.get("width"))
    opened = open_image(path, reading, stated)
    height, width = opened.size
    if stated != (height, width):
        raise LabelFault(
            f"{path}: image {entry['id']} is {opened} (width x height), {where} says "
            f"{entry.get('width')}x{entry.get('height')}; the annotations belong to another version of it",
            SIZES,
        )
    keys = {"image_id": entry["id"], "file_name": entry["file_name"], "height": height, "width": width}
    return CocoImage(opened, {**keys, "annotations": []})


def _annotate(
    annotation: dict[str, Any],
    images: Mapping[int, CocoImage],
    numbers: Mapping[int, int],
    degenerate: list[int],
    where: str,
) -> None:
    """Check one annotation and add it to its image."""
    where = f"{where}: annotation {annotation['id']}"
    image = images.get(annotation["image_id"])
    if image is None:
        raise LabelFault(f"{where}: image_id {annotation['image_id']} is not among the images; fix the file", MISSING)
    if _id(annotation, "category_id", where) not in numbers:
        raise LabelFault(
            f"{where}: category_id {annotation.get('category_id')} is not among the categories "
            f"({', '.join(map(str, list(numbers)[:10]))}{', ...' if len(numbers) > 10 else ''}); fix the file",
            UNKNOWN,
        )
    metadata = image.metadata
    box = _box(annotation.get("bbox"), metadata, where)
    if box is None:
        degenerate.append(annotation["id"])
        return
    rle = _rle(annotation.get("segmentation"), metadata["height"], metadata["width"], where)
    area = annotation.get("area")
    metadata["annotations"].append(
        {
            "id": annotation["id"],
            "bbox": box,
            "class": numbers[annotation["category_id"]],
            "area": float(area) if area is not None and is_number(area) and area >= 0 else box[2] * box[3],
            "iscrowd": int(bool(annotation.get("iscrowd", 0))),
            "segmentation": rle,
        }
    )


def _id(annotation: dict[str, Any], key: str, where: str) -> int:
    value = annotation.get(key)
    if not isinstance(value, int):
        raise LabelFault(
            f"{where}: {key} {str(value)[:80]}; expected an integer id, as images and categories have them"
        )
    return value


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    # Not math.isfinite: JSON has integers that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def _box(box: Any, metadata: dict[str, Any], where: str) -> list[float] | None:
    """The box inside the image, or ``None`` when it has no area."""
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(v) for v in box):
        raise LabelFault(f"{where}: bbox {str(box)[:80]}; expected four numbers [x, y, width, height]", BOXES)
    x, y, w, h = (float(v) for v in box)
    if w <= 0 or h <= 0:
        return None
    height, width = metadata["height"], metadata["width"]
    if min(x, y) < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        raise LabelFault(
            f"{where}: bbox {box} reaches out of {metadata['file_name']} ({width}x{height} pixels) by more than "
            f"{TOLERANCE:g} pixel; boxes are [x, y, width, height] in pixels",
            BOXES,
        )
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + w, float(width)), min(y + h, float(height))
    if right <= left or bottom <= top:
        return None
    # A box that lies inside keeps its exact numbers: x + w - x would round.
    inside_image = (left, top) == (x, y) and x + w <= width and y + h <= height
    return [x, y, w, h] if inside_image else [left, top, right - left, bottom - top]


def _rle(segmentation: Any, height: int, width: int, where: str) -> dict[str, Any] | None:
    """Polygons or run lengths as compressed run lengths; ``None`` stays ``None``."""
    from pycocotools import mask as coco_mask

    if segmentation is None or segmentation == []:
        return None
    try:
        if isinstance(segmentation, list):
            if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
                raise ValueError("a polygon needs at least three points x, y")
            if not all(is_number(v) for p in segmentation for v in p):
                raise ValueError("a polygon holds something that is not a number")
            _near_image([v for p in segmentation for v in p], height, width)
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        else:
            counts, size = segmentation["counts"], list(segmentation["size"])
            if size != [height, width]:
                raise ValueError(f"size {size}, image {[height, width]}")
            if isinstance(counts, list):
                if not all(isinstance(v, int) and v >= 0 for v in counts) or sum(counts) != height * width:
                    raise ValueError(f"run lengths add up to {sum(counts)}, the image has {height * width} pixels")
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                rle = {"size": size, "counts": counts.encode("ascii")}
                if (total := covered(rle["counts"])) != height * width:
                    raise ValueError(f"run lengths add up to {total}, the image has {height * width} pixels")
                coco_mask.decode(rle)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{where}: segmentation cannot be read: {error}; expected polygons or run lengths"
        raise LabelFault(message, MASKS) from None
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _near_image(values: list[float], height: int, width: int) -> None:
    """Far-away points make pycocotools walk (and allocate) every pixel of the polygon's outline."""
    reach = 4 * max(height, width)
    if min(values) < -reach or max(values) > reach + max(height, width):
        raise ValueError("a polygon reaches far out of the image")
