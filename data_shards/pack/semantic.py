"""Pack images and label maps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import decode_label, image_format, image_size
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.files import check_classes, check_folder, read_bytes
from vitgraft.data_shards.pack.writer import DatasetWriter, Progress

_IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


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
) -> Manifest:
    """Check everything, then pack. An image and its label map share their file's stem.

    Args:
        images, labels: folders (searched below too); a label map is a PNG of one channel: 8-bit, palette (read as
            indices) or 16-bit.
        classes: names by class id.
        ignore: an id in the label maps that counts as unlabelled, besides 255.
        reduce_zero: ids start at 1 and 0 is unlabelled (ADE20K): they are packed minus one.

    Raises:
        DataError: an image without label map or the reverse, different sizes, an id that is no class; names the file.
            Nothing was written.
    """
    check_classes(classes, "classes")
    if len(classes) > IGNORE:
        raise DataError(f"classes: {len(classes)} names; label maps are packed in 8 bits, at most {IGNORE} fit")
    pairs = _pairs(images, labels)
    for image, label in pairs:
        ids = _packed_ids(label, len(classes), ignore, reduce_zero)
        size = image_size(image, str(image))
        if ids.shape != size:
            raise DataError(
                f"{label}: {ids.shape[1]}x{ids.shape[0]} pixels, its image {image} has {size[1]}x{size[0]}; "
                "label maps must have the size of their image"
            )
    source = {
        "packer": "semantic",
        "images": str(images),
        "labels": str(labels),
        "ignore": ignore,
        "reduce_zero": reduce_zero,
    }
    writer = DatasetWriter(
        out,
        "semantic",
        classes,
        source=source,
        total=len(pairs),
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )
    with writer:
        for image, label in pairs:
            ids = _packed_ids(label, len(classes), ignore, reduce_zero)
            stream = io.BytesIO()
            Image.fromarray(ids).save(stream, "PNG")
            extension = image_format(image, str(image))
            metadata = {
                "file_name": str(image.relative_to(images)),
                "height": int(ids.shape[0]),
                "width": int(ids.shape[1]),
            }
            writer.add({extension: read_bytes(image), "label.png": stream.getvalue()}, metadata)
    return writer.result()


def _pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Images and label maps of the same stem (with the folders below), in order of their names."""
    found, maps = _by_stem(images, _IMAGES), _by_stem(labels, {".png"})
    if not found:
        raise DataError(f"{images}: the data set is empty: no {', '.join(sorted(_IMAGES))} files; check the path")
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


def _packed_ids(path: Path, classes: int, ignore: int, reduce_zero: bool) -> npt.NDArray[np.uint8]:
    """The label map as packed: 0..classes-1, or 255."""
    ids = decode_label(path, str(path)).numpy()
    unlabelled = (ids == ignore) | (ids == IGNORE)
    if reduce_zero:
        unlabelled |= ids == 0
        ids = ids - 1
    wrong = ids[~unlabelled & ((ids < 0) | (ids >= classes))]
    if len(wrong):
        value = int(wrong[0]) + int(reduce_zero)
        raise DataError(
            f"{path}: label id {value} is none of the {classes} classes; "
            f"list all classes, or pass the id as ignore if it means unlabelled"
        )
    return np.where(unlabelled, IGNORE, ids).astype(np.uint8)
