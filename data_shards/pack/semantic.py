"""Pack images and label maps."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import decode_label, image_format, image_size
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.files import check_classes, check_folder, read_bytes
from vitgraft.data_shards.pack.label_report import SIZES, UNKNOWN, LabelFault, LabelReport, Say
from vitgraft.data_shards.pack.writer import DatasetWriter, Progress

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class LabelledImage:
    """An image, the file of its label map, and what makes class ids of that.

    ``ids``: (H, W) uint8, 255 ignored, as packed; read anew at each call, so that a data set is never held in memory.
    ``metadata``: besides height and width. ``files``: further members of the sample by extension, packed as they are.
    """

    image: Path
    label: Path
    ids: Callable[[], npt.NDArray[np.uint8]]
    metadata: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)


def pack_semantic(
    images: Path,
    labels: Path,
    out: Path,
    classes: list[str],
    *,
    ignore: int = IGNORE,
    reduce_zero: bool = False,
    overwrite: bool = False,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Manifest:
    """Check everything, then pack. An image and its label map share their file's stem.

    Args:
        images, labels: folders (searched below too); a label map is a PNG of one channel: 8-bit, palette (read as
            indices) or 16-bit.
        classes: names by class id.
        ignore: an id in the label maps that counts as unlabelled, besides 255.
        reduce_zero: ids start at 1 and 0 is unlabelled (ADE20K): they are packed minus one.
        say: told the report on the labels, line by line, before anything is written.

    Raises:
        DataError: an image without label map or the reverse, different sizes, an id that is no class; names the file.
            Nothing was written.
    """
    _check_names(classes)
    items = [
        LabelledImage(
            image,
            label,
            partial(packed_ids, label, len(classes), ignore, reduce_zero),
            {"file_name": str(image.relative_to(images))},
        )
        for image, label in _pairs(images, labels)
    ]
    source = {
        "packer": "semantic",
        "images": str(images),
        "labels": str(labels),
        "ignore": ignore,
        "reduce_zero": reduce_zero,
    }
    return pack_label_maps(
        items,
        out,
        LabelReport("pixels", classes),
        source=source,
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        progress=progress,
        say=say,
    )


def pack_label_maps(
    items: Sequence[LabelledImage],
    out: Path,
    report: LabelReport,
    *,
    source: dict[str, Any],
    overwrite: bool,
    samples_per_shard: int,
    progress: Progress | None,
    say: Say | None,
) -> Manifest:
    """Check every label map against its image, tell the report, then pack.

    Args:
        report: names the classes; what it holds already stays in it.

    Raises:
        DataError: a label map that cannot be read, or of another size than its image; nothing was written.
    """
    _check_names(report.classes)
    for item in items:
        with report.collect():
            ids = item.ids()
            size = image_size(item.image, str(item.image))
            if ids.shape != size:
                raise LabelFault(
                    f"{item.label}: {ids.shape[1]}x{ids.shape[0]} pixels, its image {item.image} has "
                    f"{size[1]}x{size[0]}; label maps must have the size of their image",
                    SIZES,
                )
            pixels = np.bincount(ids.ravel(), minlength=IGNORE + 1)
            report.counts.update({int(number): int(pixels[number]) for number in np.flatnonzero(pixels[:IGNORE])})
            report.unlabelled += int(pixels[IGNORE])
            report.samples += 1
    report.close(say)
    writer = DatasetWriter(
        out,
        "semantic",
        report.classes,
        source={**source, "label_report": report.as_source()},
        total=len(items),
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )
    with writer:
        for item in items:
            ids = item.ids()
            stream = io.BytesIO()
            Image.fromarray(ids).save(stream, "PNG")
            members = {
                image_format(item.image, str(item.image)): read_bytes(item.image),
                "label.png": stream.getvalue(),
                **{extension: read_bytes(path) for extension, path in item.files.items()},
            }
            height, width = ids.shape
            writer.add(members, {**item.metadata, "height": int(height), "width": int(width)})
    return writer.result()


def _check_names(classes: list[str]) -> None:
    check_classes(classes, "classes")
    if len(classes) > IGNORE:
        raise DataError(f"classes: {len(classes)} names; label maps are packed in 8 bits, at most {IGNORE} fit")


def _pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Images and label maps of the same stem (with the folders below), in order of their names."""
    found, maps = _by_stem(images, IMAGE_SUFFIXES), _by_stem(labels, {".png"})
    if not found:
        raise DataError(
            f"{images}: the data set is empty: no {', '.join(sorted(IMAGE_SUFFIXES))} files; check the path"
        )
    if lonely := sorted(found.keys() - maps.keys()):
        raise DataError(f"{found[lonely[0]]}: no label map {lonely[0]}.png in {labels} ({len(lonely)} such images)")
    if lonely := sorted(maps.keys() - found.keys()):
        raise DataError(f"{maps[lonely[0]]}: no image {lonely[0]} in {images} ({len(lonely)} such label maps)")
    return [(found[stem], maps[stem]) for stem in sorted(found)]


def _by_stem(folder: Path, extensions: set[str]) -> dict[str, Path]:
    check_folder(folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in extensions and path.is_file():
            stem = str(path.relative_to(folder).with_suffix(""))
            if stem in found:
                raise DataError(f"{path}: has the same stem as {found[stem].name}; names must pair images and labels")
            found[stem] = path
    return found


def packed_ids(path: Path, classes: int, ignore: int = IGNORE, reduce_zero: bool = False) -> npt.NDArray[np.uint8]:
    """The label map as packed: 0..classes-1, or 255.

    Raises:
        DataError: not a label map, or an id that is no class.
    """
    ids = decode_label(path, str(path)).numpy()
    unlabelled = (ids == ignore) | (ids == IGNORE)
    if reduce_zero:
        unlabelled |= ids == 0
        ids = ids - 1
    wrong = ids[~unlabelled & ((ids < 0) | (ids >= classes))]
    if len(wrong):
        value = int(wrong[0]) + int(reduce_zero)
        raise LabelFault(
            f"{path}: label id {value} is none of the {classes} classes; "
            f"list all classes, or pass the id as ignore if it means unlabelled",
            UNKNOWN,
        )
    return np.where(unlabelled, IGNORE, ids).astype(np.uint8)
