"""Pack BDD100K: boxes from its JSON, and the masks of its drivable areas and semantic classes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Unpack

import numpy as np

from vitgraft.configs.errors import DataError
from vitgraft.configs.hashing import sha256_file
from vitgraft.data_shards.listing import IMAGE_SUFFIXES, list_files
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.coco import TOLERANCE, CocoImage, CocoSet, count_boxes, is_number, pack_boxes
from vitgraft.data_shards.pack.files import read_json
from vitgraft.data_shards.pack.images import open_image, settle
from vitgraft.data_shards.pack.items import PackOptions, checked, reading_of
from vitgraft.data_shards.pack.label_ids import Labels, packed_ids
from vitgraft.data_shards.pack.label_report import (
    BOXES,
    MISSING,
    SIZES,
    UNKNOWN,
    LabelFault,
    LabelReport,
)
from vitgraft.data_shards.pack.pairs import note_passed_over
from vitgraft.data_shards.pack.semantic import LabelledImage, pack_label_maps

Task = Literal["detection", "drivable", "semantic"]

# Classes in the order of the official ids, the data set's names for them in other releases, and the uncertain regions,
# which official conversions turn into crowds of a class (bdd100k/configs/det.toml, bdd100k/label/to_coco.py).
DETECTION = ["pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
DETECTION += ["traffic light", "traffic sign"]
ALIASES = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}
UNCERTAIN = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
DRIVABLE = ["direct", "alternative", "background"]
SEMANTIC = ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"]
SEMANTIC += ["terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]

OLD_DRIVABLE = "_drivable_id"
"""The first release's drivable masks end so; their ids are 0 background, 1 direct, 2 alternative."""
_ENDINGS = (OLD_DRIVABLE, "_train_id")


def pack_bdd100k(
    images: Sequence[Path],
    labels: Path,
    out: Path,
    *,
    task: Task = "detection",
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack. Images and labels belong together by their file's stem, which is packed once.

    An image without label is left out, as the release has images that nobody labelled; a label without image is a
    fault. Of several files or entries of one stem the first is taken when all are the same; different labels are a
    fault. An image with an empty list of labels is kept.

    Args:
        images: folders, searched below too (the release has 100k and 10k images, which share some).
        labels: detection: the JSON, or a folder of JSONs; drivable and semantic: the folder of the masks.
        task: drivable and semantic give a data set of kind ``semantic``.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: one line that names the file; nothing was written.
    """
    source = {"packer": "bdd100k", "task": task, "images": [str(folder) for folder in images], "labels": str(labels)}
    if task == "detection":
        return pack_boxes(_boxes(images, labels, options), out, source=source, **options)
    report = LabelReport(
        "pixels", DRIVABLE if task == "drivable" else SEMANTIC, on_error=options.get("on_error", "raise")
    )
    return pack_label_maps(_masks(images, labels, task, report), out, report, source=source, **options)


def stem_of(name: str) -> str:
    """What images, JSON entries and masks of one photograph share."""
    stem = PurePosixPath(name).stem
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def _images(folders: Sequence[Path], report: LabelReport) -> dict[str, Path]:
    """Images by stem; of several the first, in the order of folders and names."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in _files(folder, IMAGE_SUFFIXES, report):
            if path.stem in found:
                report.leave_out("images whose stem was there before", path)
            else:
                found[path.stem] = path
    if not found:
        listed = ", ".join(map(str, folders))
        raise DataError(f"{listed}: the data set is empty: no images ({', '.join(sorted(IMAGE_SUFFIXES))}); check it")
    return found


def _files(folder: Path, suffixes: Collection[str], report: LabelReport) -> list[Path]:
    listing = list_files(folder, suffixes)
    note_passed_over(listing, report)
    return listing.files


def _matched(images: dict[str, Path], labelled: Iterable[str], report: LabelReport) -> list[str]:
    """The stems that have a label and an image, sorted; notes the others."""
    stems = set(labelled)
    for stem in sorted(images.keys() - stems):
        report.leave_out("images without label", images[stem])
    return sorted(stems & images.keys())


def _boxes(folders: Sequence[Path], labels: Path, options: PackOptions) -> CocoSet:
    report = LabelReport("instances", DETECTION, on_error=options.get("on_error", "raise"))
    images = _images(folders, report)
    files = _files(labels, {".json"}, report) if labels.is_dir() else [labels]
    if not files:
        raise DataError(f"{labels}: no JSON file; give the detection JSON or a folder of such files")
    frames: dict[str, tuple[str, list[Any]]] = {}
    for file in files:
        for name, items in _frames(read_json(file), str(file)):
            stem, where = stem_of(name), f"{file}: {name}"
            with report.collect():
                if stem not in images:
                    raise LabelFault(f"{where}: no image {stem} in the image folders; check --images", MISSING)
                if stem not in frames:
                    frames[stem] = where, items
                elif items != frames[stem][1]:
                    raise LabelFault(f"{where}: other labels than {frames[stem][0]}; keep one of them")
                else:
                    report.leave_out("entries whose stem was there before", where)
    content = CocoSet(DETECTION, list(range(1, len(DETECTION) + 1)), [], [], report)
    number = 0
    stems = _matched(images, frames, report)
    opened = checked(partial(open_image, reading=reading_of(options)), [images[s] for s in stems], report, options)
    for stem, image in zip(stems, opened, strict=True):
        if image is None:
            continue
        size, (where, items) = image.size, frames[stem]
        annotations: list[dict[str, Any]] = []
        for item in items:
            with report.collect():
                annotation = _annotation(item, size, where, report)
                if annotation is not None:
                    number += 1
                    annotations.append({"id": number, **annotation})
        metadata = {"image_id": len(content.images) + 1, "file_name": image.path.name}
        metadata |= {"height": size[0], "width": size[1], "annotations": annotations}
        content.images.append(CocoImage(image, metadata))
    report.samples = len(content.images)
    count_boxes(report, content.images)
    settle([(image.opened, image.metadata) for image in content.images], report, options.get("say"))
    report.close(options.get("say"))
    return content


def _frames(tree: Any, where: str) -> Iterator[tuple[str, list[Any]]]:
    """(name, labels) of each image: a list of frames, ``{"frames": [...]}``, or the first release's one file each."""
    if isinstance(tree, dict) and isinstance(tree.get("frames"), list):
        if isinstance(tree.get("name"), str) and len(tree["frames"]) == 1 and isinstance(tree["frames"][0], dict):
            tree = [{"name": tree["name"], "labels": tree["frames"][0].get("objects")}]
        else:
            tree = tree["frames"]
    if not isinstance(tree, list):
        raise DataError(f"{where}: expected BDD100K's detection JSON, a list of images with name and labels")
    for frame in tree:
        name = frame.get("name") if isinstance(frame, dict) else None
        if not isinstance(name, str) or not stem_of(name):
            raise DataError(f"{where}: {str(frame)[:80]} has no name; expected BDD100K's detection JSON")
        labels = frame.get("labels")
        if labels is not None and not isinstance(labels, list):
            raise DataError(f"{where}: {name}: labels {str(labels)[:80]}; expected a list")
        yield name, labels or []


def _annotation(item: Any, size: tuple[int, int], where: str, report: LabelReport) -> dict[str, Any] | None:
    """One label in the form that is packed; ``None`` for one without box, or whose box has no area."""
    if not isinstance(item, dict):
        raise LabelFault(f"{where}: label {str(item)[:80]}; expected an object with category and box2d")
    where, category = f"{where}: label {str(item.get('id'))[:40]}", item.get("category")
    corners = item.get("box2d")
    if corners is None:
        report.leave_out("labels without box2d (lanes, areas)", where)
        return None
    if not isinstance(category, str) or ALIASES.get(category, category) not in {*DETECTION, *UNCERTAIN}:
        expected = ", ".join(DETECTION)
        raise LabelFault(f"{where}: category {str(category)[:80]!r} is not among {expected}; fix the file", UNKNOWN)
    if not isinstance(corners, dict) or not all(is_number(corners.get(key)) for key in ("x1", "y1", "x2", "y2")):
        raise LabelFault(f"{where}: box2d {str(corners)[:80]}; expected numbers x1, y1, x2, y2", BOXES)
    left, top, right, bottom = (float(corners[key]) for key in ("x1", "y1", "x2", "y2"))
    height, width = size
    if min(left, top) < -TOLERANCE or right > width + TOLERANCE or bottom > height + TOLERANCE:
        raise LabelFault(
            f"{where}: box2d {corners} reaches out of the image ({width}x{height} pixels) by more than {TOLERANCE:g} "
            "pixel; the labels belong to another version of it",
            SIZES,
        )
    # Corners lie in the box, as in the official conversion: a box from 3 to 3 is one pixel wide.
    left, top = max(left, 0.0), max(top, 0.0)
    box = [left, top, min(right + 1, float(width)) - left, min(bottom + 1, float(height)) - top]
    if right < left or bottom < top or min(box[2:]) <= 0:
        report.leave_out("boxes without area", where)
        return None
    attributes = item.get("attributes")
    crowd = category in UNCERTAIN or (isinstance(attributes, dict) and bool(attributes.get("crowd")))
    name = ALIASES.get(category, UNCERTAIN.get(category, category))
    return {
        "label_id": str(item.get("id")),
        "bbox": box,
        "class": DETECTION.index(name),
        "area": box[2] * box[3],
        "iscrowd": int(crowd),
        "segmentation": None,
    }


def _masks(folders: Sequence[Path], labels: Path, task: Task, report: LabelReport) -> list[LabelledImage]:
    images = _images(folders, report)
    masks: dict[str, Path] = {}
    for path in _files(labels, {".png"}, report):
        stem = stem_of(path.name)
        with report.collect():
            if stem not in images:
                raise LabelFault(f"{path}: no image {stem} in the image folders; check --images", MISSING)
            if stem not in masks:
                masks[stem] = path
            elif sha256_file(path) != sha256_file(masks[stem]):
                raise LabelFault(f"{path}: another mask than {masks[stem]}; give the folder of class ids alone")
            else:
                report.leave_out("masks whose stem was there before", path)
    if not masks and not report.faults:
        raise DataError(f"{labels}: the data set is empty: no PNG masks; check --labels")
    ids = partial(drivable_ids if task == "drivable" else packed_ids, classes=len(report.classes))
    return [
        LabelledImage(images[stem], masks[stem], partial(ids, masks[stem]), {"file_name": images[stem].name})
        for stem in _matched(images, masks, report)
    ]


def drivable_ids(path: Path, classes: int = len(DRIVABLE)) -> Labels:
    """A drivable mask as packed: 0 direct, 1 alternative, 2 background, 255 ignored, whatever its release.

    Raises:
        DataError: not a label map, or another id.
    """
    ids = packed_ids(path, classes)
    if path.stem.endswith(OLD_DRIVABLE):
        ids = np.where(ids == IGNORE, IGNORE, (ids.astype(np.int32) + 2) % 3).astype(np.uint8)
    return ids
