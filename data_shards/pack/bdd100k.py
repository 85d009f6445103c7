"""Pack BDD100K: boxes from its JSON, and the masks of its drivable areas and semantic classes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Unpack
from urllib.parse import unquote

import numpy as np

from vitgraft.configs.errors import DataError
from vitgraft.configs.hashing import sha256_file
from vitgraft.data_shards.listing import IMAGE_SUFFIXES, composed, list_files
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.bdd100k_labels import DETECTION, LabelReader
from vitgraft.data_shards.pack.coco import CocoImage, CocoSet, count_boxes, pack_boxes
from vitgraft.data_shards.pack.coco_categories import Categories, as_classes
from vitgraft.data_shards.pack.files import read_json
from vitgraft.data_shards.pack.images import open_image, settle
from vitgraft.data_shards.pack.items import PackOptions, checked, reading_of
from vitgraft.data_shards.pack.label_ids import Labels, packed_ids
from vitgraft.data_shards.pack.label_report import MISSING, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.other_formats import refuse_other_format
from vitgraft.data_shards.pack.pairs import note_passed_over
from vitgraft.data_shards.pack.plain_values import Key
from vitgraft.data_shards.pack.semantic import LabelledImage, pack_label_maps

Task = Literal["detection", "drivable", "semantic"]

# Classes in the order of the official ids.
DRIVABLE = ["direct", "alternative", "background"]
SEMANTIC = ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"]
SEMANTIC += ["terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
_OFFICIAL: dict[Task, list[str]] = {"detection": DETECTION, "drivable": DRIVABLE, "semantic": SEMANTIC}

OLD_DRIVABLE = "_drivable_id"
"""The first release's drivable masks end so; their ids are 0 background, 1 direct, 2 alternative."""
_ENDINGS = (OLD_DRIVABLE, "_train_id")


def pack_bdd100k(
    images: Sequence[Path],
    labels: Path,
    out: Path,
    *,
    task: Task = "detection",
    classes: list[str] | None = None,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack. Images and labels belong together by their file's stem, which is packed once.

    An image without label is left out, as the release has unlabelled images; a label without image is a
    fault. Of several files or entries of one stem the first is taken when all are the same; different labels are a
    fault. An image with an empty list of labels is kept.

    Args:
        images: folders, searched below too (the release has 100k and 10k images, which share some).
        labels: detection: the JSON, or a folder of JSONs; drivable and semantic: the folder of the masks.
        task: drivable and semantic give a data set of kind ``semantic``.
        classes: names by class id, which the official classes have; ``None``: these, in official order.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: one line that names the file; nothing was written.
    """
    source = {"packer": "bdd100k", "task": task, "images": [str(folder) for folder in images], "labels": str(labels)}
    refuse_other_format(labels)
    entries: dict[Key, dict[str, Any]] = {number: {"name": name} for number, name in enumerate(_OFFICIAL[task], 1)}
    categories = as_classes(entries, set(entries), classes, str(labels))
    unit = "instances" if task == "detection" else "pixels"
    report = LabelReport(unit, categories.classes, on_error=options.get("on_error", "raise"))
    if task == "detection":
        return pack_boxes(_boxes(images, labels, categories, report, options), out, source=source, **options)
    return pack_label_maps(_masks(images, labels, task, categories, report), out, report, source=source, **options)


def stem_of(name: str) -> str:
    """Return the name that images, JSON entries and masks of one photograph share."""
    stem = PurePosixPath(composed(name).replace("\\", "/")).stem
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def _images(folders: Sequence[Path], report: LabelReport) -> dict[str, Path]:
    """Return the images by stem; of several the first, in the order of folders and names."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in _files(folder, IMAGE_SUFFIXES, report):
            stem = composed(path.stem)
            if stem in found:
                report.leave_out("images whose stem was there before", path)
            else:
                found[stem] = path
    if not found:
        listed = ", ".join(map(str, folders))
        raise DataError(f"{listed}: the data set is empty: no images ({', '.join(sorted(IMAGE_SUFFIXES))}); check it")
    return found


def _files(folder: Path, suffixes: Collection[str], report: LabelReport) -> list[Path]:
    listing = list_files(folder, suffixes)
    note_passed_over(listing, report)
    return listing.files


def _matched(images: dict[str, Path], labelled: Iterable[str], report: LabelReport) -> list[str]:
    """Return the stems that have a label and an image, sorted; report the others."""
    stems = set(labelled)
    for stem in sorted(images.keys() - stems):
        report.leave_out("images without label", images[stem])
    return sorted(stems & images.keys())


def _boxes(
    folders: Sequence[Path], labels: Path, categories: Categories, report: LabelReport, options: PackOptions
) -> CocoSet:
    images = _images(folders, report)
    files = _files(labels, {".json"}, report) if labels.is_dir() else [labels]
    if not files:
        raise DataError(f"{labels}: no JSON file; give the detection JSON or a folder of such files")
    frames: dict[str, tuple[str, list[Any]]] = {}
    for file in files:
        for frame in _frames(read_json(file), str(file)):
            with report.collect():
                name, items = _name_and_labels(frame, str(file))
                stem, where = stem_of(name), f"{file}: {name[:200]}"
                if stem not in images:
                    stem = unquote(stem)
                if stem not in images:
                    raise LabelFault(f"{where}: no image {stem[:200]} in the image folders; check --images", MISSING)
                if stem not in frames:
                    frames[stem] = where, items
                elif items != frames[stem][1]:
                    raise LabelFault(f"{where}: other labels than {frames[stem][0]}; keep one of them")
                else:
                    report.leave_out("entries whose stem was there before", where)
    content = CocoSet(categories.classes, categories.category_ids, [], [], report)
    reader = LabelReader(categories, report)
    stems = _matched(images, frames, report)
    opened = checked(partial(open_image, reading=reading_of(options)), [images[s] for s in stems], report, options)
    for stem, image in zip(stems, opened, strict=True):
        if image is None:
            continue
        size, (where, items) = image.size, frames[stem]
        metadata = {"image_id": len(content.images) + 1, "file_name": image.path.name}
        metadata |= {"height": size[0], "width": size[1], "annotations": reader.read(items, size, where)}
        content.images.append(CocoImage(image, metadata))
    report.samples = len(content.images)
    count_boxes(report, content.images)
    settle([(image.opened, image.metadata) for image in content.images], report, options.get("say"))
    reader.close(str(labels))
    report.close(options.get("say"))
    return content


def _frames(tree: Any, where: str) -> list[Any]:
    """Return the images with name and labels: a list of frames, ``{"frames": [...]}``, or the first release's one file
    each."""
    if isinstance(tree, dict) and isinstance(tree.get("frames"), list):
        frames: list[Any] = tree["frames"]
        if isinstance(tree.get("name"), str) and len(frames) == 1 and isinstance(frames[0], dict):
            return [{"name": tree["name"], "labels": frames[0].get("objects")}]
        return frames
    if not isinstance(tree, list):
        coco = isinstance(tree, dict) and {"images", "annotations"} <= tree.keys()
        remedy = "this is a COCO file: vitgraft shards pack coco" if coco else "a list of images with name and labels"
        raise DataError(f"{where}: expected BDD100K's detection JSON; {remedy}")
    return tree


def _name_and_labels(frame: Any, where: str) -> tuple[str, list[Any]]:
    name = frame.get("name") if isinstance(frame, dict) else None
    if not isinstance(name, str) or not stem_of(name):
        raise LabelFault(f"{where}: {str(frame)[:80]} has no name; expected BDD100K's detection JSON")
    labels = frame.get("labels")
    if labels is not None and not isinstance(labels, list):
        raise LabelFault(f"{where}: {name[:200]}: labels {str(labels)[:80]}; expected a list")
    return name, labels or []


def _masks(
    folders: Sequence[Path], labels: Path, task: Task, categories: Categories, report: LabelReport
) -> list[LabelledImage]:
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
    numbers = tuple(categories.numbers.get(number, -1) for number in range(1, len(_OFFICIAL[task]) + 1))
    leave = report.on_error == "skip"
    for name in categories.outside.values() if leave else ():
        report.leave_out("classes that are none of --classes, whose pixels do not count", name)
    ids = partial(mask_ids, task=task, numbers=tuple(IGNORE if leave and n < 0 else n for n in numbers))
    return [
        LabelledImage(images[stem], masks[stem], partial(ids, masks[stem]), {"file_name": images[stem].name})
        for stem in _matched(images, masks, report)
    ]


def mask_ids(path: Path, task: Task, numbers: Sequence[int]) -> Labels:
    """Return the packed form of a mask; drivable areas: 0 direct, 1 alternative, 2 background, 255 ignored.

    Args:
        numbers: class id, 255 for what does not count or -1 for no class, by official id.

    Raises:
        DataError: not a label map, or an id that is no class.
    """
    official = _OFFICIAL[task]
    ids = packed_ids(path, len(official), remedy=f"masks of --task {task} have the ids of its classes, from 0, and 255")
    if task == "drivable" and path.stem.endswith(OLD_DRIVABLE):
        ids = np.where(ids == IGNORE, IGNORE, (ids.astype(np.int32) + 2) % 3).astype(np.uint8)
    table = np.full(IGNORE + 1, IGNORE, dtype=np.int32)
    table[: len(numbers)] = numbers
    packed = table[ids]
    if packed.min() < 0:
        name = official[int(ids[packed < 0][0])]
        message = f"{path}: class {name!r} is none of the classes; add it to --classes"
        raise LabelFault(f"{message}, or leave its pixels out with --on-error skip", UNKNOWN)
    return packed.astype(np.uint8)
