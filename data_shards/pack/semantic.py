"""Pack images and label maps."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.manifest import IGNORE, Manifest
from vitgraft.data_shards.pack.files import check_classes, read_bytes
from vitgraft.data_shards.pack.images import OpenedImage, Reading, open_image, settle
from vitgraft.data_shards.pack.items import PackOptions, Prepared, checked, pack_items, reading_of
from vitgraft.data_shards.pack.label_ids import (
    Labels,
    chosen_ids,
    coloured_ids,
    missing_class,
    packed_ids,
    read_colours,
)
from vitgraft.data_shards.pack.label_report import NOTHING_TO_LEARN, SIZES, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.pairs import Pairing, find_pairs

EVERYTHING = Pairing()


@dataclass(frozen=True)
class LabelledImage:
    """An image, the file of its label map, and the conversion of that to class ids.

    ``ids``: (H, W) uint8, 255 ignored, as packed; read anew at each call, so that a data set is never held in memory.
    ``metadata``: besides height and width. ``more``: further members of the sample by extension, packed as they are.
    ``opened``: the image, once it is checked.
    """

    image: Path
    label: Path
    ids: Callable[[], Labels]
    metadata: dict[str, Any]
    more: dict[str, Path] = field(default_factory=dict)
    opened: OpenedImage | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """See :class:`~vitgraft.data_shards.pack.items.Item`."""
        return self.image, self.label, *self.more.values()

    def prepare(self) -> Prepared:
        """Return the image, as it is where its format is a packed one, and the class ids as a PNG."""
        assert self.opened is not None
        ids, stream = self.ids(), io.BytesIO()
        Image.fromarray(ids).save(stream, "PNG")
        members = {
            **self.opened.member(),
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
    ids: Sequence[int] = (),
    colours: Path | None = None,
    pairing: Pairing = EVERYTHING,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack.

    Args:
        images, labels: folders (searched below too); a label map is a PNG of one channel: 8-bit, palette (read as
            indices) or 16-bit.
        classes: names by class id.
        ignore: ids in the label maps that count as unlabelled, besides 255.
        reduce_zero: ids start at 1 and 0 is unlabelled (ADE20K): they are packed minus one.
        ids: the ids in the label maps that are class 0, 1, …; all others count as unlabelled (Cityscapes).
        colours: label maps are colour images; a file with lines ``R G B NAME`` (CamVid). Names that are no class count
            as unlabelled.
        pairing: which image and label map belong together; in the default, those of one stem.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: an image without label map or the reverse, as ``pairing`` has it, different sizes, an id or colour
            that is no class; names the file. Nothing was written.
        ConfigError: options that exclude each other, ``ids`` that are not one for each class, or a wrong ``pairing``.
    """
    _check_names(classes)
    if ids and (len(ids) != len(classes) or len(set(ids)) != len(ids)):
        raise ConfigError(f"--ids: {len(ids)} for {len(classes)} classes; give one for each class, none twice")
    if sum(map(bool, (ids, colours, ignore or reduce_zero))) > 1:
        raise ConfigError("--ids, --colours, and --ignore or --reduce-zero exclude each other; give one of them")
    packed: Callable[[Path], Labels]
    table = () if colours is None else read_colours(colours, classes)
    if table:
        packed = partial(coloured_ids, colours=table)
    elif ids:
        packed = partial(chosen_ids, chosen=tuple(ids))
    else:
        packed = partial(packed_ids, classes=len(classes), ignore=tuple(ignore), reduce_zero=reduce_zero)
    report = LabelReport("pixels", classes, on_error=options.get("on_error", "raise"))
    items = [
        LabelledImage(image, label, partial(packed, label), {"file_name": str(image.relative_to(images))})
        for image, label in find_pairs(images, labels, pairing, report)
    ]
    source = {
        "packer": "semantic",
        "images": str(images),
        "labels": str(labels),
        "ignore": list(ignore),
        "reduce_zero": reduce_zero,
        "ids": list(ids),
        "colours": {f"#{colour:06x}": number for colour, number in table},
        "list": None if pairing.listed is None else str(pairing.listed),
    }
    # Whoever says what the ids mean, or which mean nothing, is not asked again.
    ignored = [] if ids or table or ignore else [*([0] if reduce_zero else []), IGNORE]
    return pack_label_maps(items, out, report, source=source, ignored=ignored, **options)


def pack_label_maps(
    items: Sequence[LabelledImage],
    out: Path,
    report: LabelReport,
    *,
    source: dict[str, Any],
    ignored: Sequence[int] = (),
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check every label map against its image, tell the report, then pack.

    Args:
        report: names the classes; what it holds already stays in it.
        ignored: ids taken as unlabelled by default; reported where a class is missing.
        source: for the manifest; what it says decides the bytes, with the files and their metadata.

    Raises:
        DataError: a label map that cannot be read, or of another size than its image; nothing was written.
    """
    _check_names(report.classes)
    taken, with_ignored, only_classes = [], Counter[int](), 0
    counted = checked(partial(_pixels, reading_of(options)), items, report, options)
    for item, found in zip(items, counted, strict=True):
        if found is not None:
            pixels, opened = found
            unlabelled = pixels.pop(IGNORE, 0)
            report.unlabelled += unlabelled
            if unlabelled:
                with_ignored[max(pixels, default=0)] += 1
            else:
                only_classes += max(pixels, default=0) > 0
            report.counts.update(pixels)
            report.samples += 1
            taken.append(replace(item, opened=opened))
    settle([(item.opened, item.metadata) for item in taken if item.opened is not None], report, options.get("say"))
    if taken and not report.faults and (message := missing_class(report, ignored)) is not None:
        report.doubt(message, NOTHING_TO_LEARN)
    # Of two tools: one writes the classes as 0 and 1, the other as 0 and 255.
    elif list(ignored) == [IGNORE] and len(report.classes) == 2 and only_classes and set(with_ignored) == {0}:
        maps = f"{with_ignored[0]} label maps hold {IGNORE}, which is ignored, and never 1"
        others = f"{only_classes} hold 1 and never {IGNORE}"
        both = f"if both mean {report.classes[1]!r}, write 1 everywhere"
        message = f"labels: {maps}, and {others}: {both}; if {IGNORE} means unlabelled, pass --ignore {IGNORE}"
        report.doubt(message, UNKNOWN)
    report.close(options.get("say"))
    settings = [source, report.classes]
    return pack_items(taken, out, "semantic", report, source=source, settings=settings, **options)


def _pixels(reading: Reading, item: LabelledImage) -> tuple[dict[int, int], OpenedImage]:
    """Return pixels by class id of a label map that fits its image, and that image."""
    ids = item.ids()
    opened = open_image(item.image, reading, ids.shape)
    if ids.shape != opened.size:
        raise LabelFault(
            f"{item.label}: {ids.shape[1]}x{ids.shape[0]} pixels, its image {item.image} has {opened}; "
            "label maps must have the size of their image",
            SIZES,
        )
    pixels = np.bincount(ids.ravel())
    return {int(number): int(pixels[number]) for number in np.flatnonzero(pixels)}, opened


def _check_names(classes: list[str]) -> None:
    check_classes(classes, "classes")
    if len(classes) > IGNORE:
        raise DataError(f"classes: {len(classes)} names; label maps are packed in 8 bits, at most {IGNORE} fit")
