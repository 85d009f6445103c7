"""Pack images and label maps."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import decode_label, image_format, image_size
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.files import check_classes, check_folder, read_bytes
from vitgraft.data_shards.pack.items import PackOptions, Prepared, checked, pack_items
from vitgraft.data_shards.pack.label_report import SIZES, UNKNOWN, LabelFault, LabelReport

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class LabelledImage:
    """An image, the file of its label map, and what makes class ids of that.

    ``ids``: (H, W) uint8, 255 ignored, as packed; read anew at each call, so that a data set is never held in memory.
    ``metadata``: besides height and width. ``more``: further members of the sample by extension, packed as they are.
    """

    image: Path
    label: Path
    ids: Callable[[], npt.NDArray[np.uint8]]
    metadata: dict[str, Any]
    more: dict[str, Path] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """See :class:`~vitgraft.data_shards.pack.items.Item`."""
        return self.image, self.label, *self.more.values()

    def prepare(self) -> Prepared:
        """The image as it is, and the class ids as a PNG."""
        data, ids, stream = read_bytes(self.image), self.ids(), io.BytesIO()
        Image.fromarray(ids).save(stream, "PNG")
        members = {
            image_format(data, str(self.image)): data,
            "label.png": stream.getvalue(),
            **{extension: read_bytes(path) for extension, path in self.more.items()},
        }
        height, width = ids.shape
        return Prepared(members, {**self.metadata, "height": int(height), "width": int(width)})


def pack_semantic(
    images: Path,
    labels: Path,
    out: Path,
    classes: list[str],
    *,
    ignore: Sequence[int] = (),
    reduce_zero: bool = False,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack. An image and its label map share their file's stem.

    Args:
        images, labels: folders (searched below too); a label map is a PNG of one channel: 8-bit, palette (read as
            indices) or 16-bit.
        classes: names by class id.
        ignore: ids in the label maps that count as unlabelled, besides 255.
        reduce_zero: ids start at 1 and 0 is unlabelled (ADE20K): they are packed minus one.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: an image without label map or the reverse, different sizes, an id that is no class; names the file.
            Nothing was written.
    """
    _check_names(classes)
    items = [
        LabelledImage(
            image,
            label,
            partial(packed_ids, label, len(classes), tuple(ignore), reduce_zero),
            {"file_name": str(image.relative_to(images))},
        )
        for image, label in _pairs(images, labels)
    ]
    source = {
        "packer": "semantic",
        "images": str(images),
        "labels": str(labels),
        "ignore": list(ignore),
        "reduce_zero": reduce_zero,
    }
    return pack_label_maps(items, out, LabelReport("pixels", classes), source=source, **options)


def pack_label_maps(
    items: Sequence[LabelledImage],
    out: Path,
    report: LabelReport,
    *,
    source: dict[str, Any],
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check every label map against its image, tell the report, then pack.

    Args:
        report: names the classes; what it holds already stays in it.
        source: for the manifest; what it says decides the bytes, with the files and their metadata.

    Raises:
        DataError: a label map that cannot be read, or of another size than its image; nothing was written.
    """
    _check_names(report.classes)
    for pixels in checked(_pixels, items, report, options):
        if pixels is not None:
            report.unlabelled += pixels.pop(IGNORE, 0)
            report.counts.update(pixels)
            report.samples += 1
    report.close(options.get("say"))
    settings = [source, report.classes]
    return pack_items(items, out, "semantic", report, source=source, settings=settings, **options)


def _pixels(item: LabelledImage) -> dict[int, int]:
    """Pixels by class id of a label map that fits its image."""
    ids = item.ids()
    size = image_size(item.image, str(item.image))
    if ids.shape != size:
        raise LabelFault(
            f"{item.label}: {ids.shape[1]}x{ids.shape[0]} pixels, its image {item.image} has "
            f"{size[1]}x{size[0]}; label maps must have the size of their image",
            SIZES,
        )
    pixels = np.bincount(ids.ravel())
    return {int(number): int(pixels[number]) for number in np.flatnonzero(pixels)}


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


def packed_ids(
    path: Path, classes: int, ignore: Sequence[int] = (), reduce_zero: bool = False
) -> npt.NDArray[np.uint8]:
    """The label map as packed: 0..classes-1, or 255.

    Raises:
        DataError: not a label map, or an id that is no class.
    """
    ids = decode_label(path, str(path)).numpy()
    unlabelled = np.isin(ids, [*ignore, IGNORE])
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
