"""Pack a COCO instances file and its images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.coco_annotations import AnnotationReader, Crowds
from vitgraft.data_shards.pack.coco_categories import read_categories
from vitgraft.data_shards.pack.coco_json import (
    ListedImage,
    by_id,
    check_size,
    entries_of,
    list_images,
    refuse_other_kind,
)
from vitgraft.data_shards.pack.files import check_folder, read_json
from vitgraft.data_shards.pack.images import OpenedImage, Reading, open_image, settle
from vitgraft.data_shards.pack.items import PackOptions, Prepared, checked, pack_items, reading_of
from vitgraft.data_shards.pack.label_report import NOTHING_TO_LEARN, LabelReport
from vitgraft.data_shards.pack.plain_values import Key

SIZED = "sizes taken from images"


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
        """Return the image, as it is where its format is a packed one."""
        return Prepared(self.opened.member(), self.metadata)


@dataclass
class CocoSet:
    """A checked annotations file. ``degenerate``: ids of annotations left out because their box has no area."""

    classes: list[str]
    category_ids: list[int]
    images: list[CocoImage]
    degenerate: list[Key]
    report: LabelReport


def pack_coco(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    classes: list[str] | None = None,
    crowds: Crowds | None = None,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack. Classes are numbered from 0 by ascending category id.

    Images without annotations are kept. An annotation without segmentation keeps ``segmentation: null``; its mask is
    then its box. Degenerate boxes are left out and listed in the manifest's ``source``.

    Args:
        images: the folder to which ``file_name`` is relative.
        annotations: the instances JSON.
        classes: names by class id, which the categories have; ``None``: the categories by ascending id.
        crowds: what ``iscrowd: 1`` means; ``None``: a crowd, unless a class has no other annotations, which is a fault.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: one line that names file and annotation; nothing was written.
    """
    content = read_coco(images, annotations, classes=classes, crowds=crowds, **options)
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


def read_coco(
    images: Path,
    annotations: Path,
    *,
    classes: list[str] | None = None,
    crowds: Crowds | None = None,
    **options: Unpack[PackOptions],
) -> CocoSet:
    """Read and check an instances file against the images' headers.

    Args:
        classes, crowds: as of :func:`pack_coco`.

    Raises:
        DataError: one line that names file and annotation.
    """
    check_folder(images)
    tree, where = read_json(annotations), str(annotations)
    report = LabelReport("instances", [], on_error=options.get("on_error", "raise"))
    images_listed = entries_of(tree, "images", where)
    refuse_other_kind(tree, False, where)
    entries = by_id(images_listed, "images", where, report, names="file_name")
    if not entries and not report.faults:
        raise DataError(f"{where}: the data set is empty: no images are listed; check the file")
    given = entries_of(tree, "annotations", where) if "annotations" in tree else []
    labelled = by_id(given, "annotations", where, report)
    categories = read_categories(tree, where, labelled.values(), classes, report)
    if not given:
        message = f"{where}: no annotations, so there is nothing to learn or to compare with"
        report.doubt(f"{message}; images alone need no packing: vitgraft predict RUN FOLDER", NOTHING_TO_LEARN)
    listed = list_images(images, "--images", entries, where, report)
    opened = checked(partial(_image, where, reading_of(options)), listed, report, options)
    found = {}
    for item, image in zip(listed, opened, strict=True):
        if image is not None:
            found[item.key] = image
            if None in item.stated:
                report.repair(SIZED, item.name)
    metadata = {key: image.metadata for key, image in found.items()}
    faulty = entries.keys() - found.keys()
    reader = AnnotationReader(metadata, faulty, categories, crowds, report, where)
    for key, annotation in labelled.items():
        with report.collect():
            reader.add(key, annotation)
    report.samples = len(found)
    count_boxes(report, found.values())
    reader.close()
    settle([(image.opened, image.metadata) for image in found.values()], report, options.get("say"))
    report.close(options.get("say"))
    return CocoSet(categories.classes, categories.category_ids, list(found.values()), reader.degenerate, report)


def count_boxes(report: LabelReport, images: Iterable[CocoImage]) -> None:
    """Count instances by class, crowds among them, and images without any."""
    for image in images:
        items = image.metadata["annotations"]
        report.counts.update(item["class"] for item in items)
        report.crowds.update(item["class"] for item in items if item["iscrowd"])
        report.unlabelled += not items


def _image(where: str, reading: Reading, listed: ListedImage) -> CocoImage:
    opened = open_image(listed.path, reading, listed.size)
    check_size(listed, opened, where)
    height, width = opened.size
    keys = {"image_id": listed.key, "file_name": listed.name, "height": height, "width": width}
    return CocoImage(opened, {**keys, "annotations": []})
