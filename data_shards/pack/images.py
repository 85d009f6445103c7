"""Image files in packers: orientation, range of values, packed format, and the report on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitgraft.data_shards.images import (
    Header,
    Values,
    decode_image,
    encode_png,
    is_narrow,
    oriented_size,
    range_for,
    read_header,
    value_range,
)
from vitgraft.data_shards.pack.files import read_bytes
from vitgraft.data_shards.pack.label_report import CONVERTED, TURNED, LabelFault, LabelReport, Say

Exif = Literal["auto", "apply", "ignore"]
"""Policy for EXIF orientations. ``auto``: applied unless the annotations' size, or where both sizes are equal that of
the set's other images, shows that they refer to the stored pixels. ``apply``, ``ignore``: always, never."""

RANGES = "images that use a small part of their range"
FIRST = "first of several frames or pages"


@dataclass(frozen=True)
class Reading:
    """Options for reading image files.

    ``exif``: see :data:`Exif`. ``decode``: all pixels are decoded in the check, so that a damaged file is found before
    anything is written. ``values``: what is packed as black and as white of grey images of more than 8 bits.
    """

    exif: Exif = "auto"
    decode: bool = False
    values: Values | None = None


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """A checked image file. ``orientation``: the one that is applied. ``unsure``: sizes do not say which.
    ``found``: the smallest and the largest value, of images of more than 8 bits."""

    path: Path
    header: Header
    orientation: int
    unsure: bool
    found: Values | None
    reading: Reading

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as it is packed."""
        return oriented_size(self.header.size, self.orientation)

    def __str__(self) -> str:
        """Return the size as text."""
        height, width = self.size
        turned = f" under its EXIF orientation {self.orientation}" if self.orientation > 1 else ""
        return f"{width}x{height} pixels{turned}"

    @property
    def converted(self) -> bool:
        """Tell whether it is packed in another format than its own."""
        return self.header.extension is None or (self.header.grey and self.reading.values is not None)

    def member(self) -> dict[str, bytes]:
        """Return the packed member by extension: the file as it is, or a PNG of the same pixels.

        Raises:
            DataError: it cannot be read, or not be converted.
        """
        if self.converted:
            return {"png": encode_png(self.path, str(self.path), self.reading.values)}
        assert self.header.extension is not None
        return {self.header.extension: read_bytes(self.path)}


def open_image(path: Path, reading: Reading, stated: tuple[Any, Any] | None = None) -> OpenedImage:
    """Check an image file.

    Args:
        stated: (height, width) that the annotations are for, where they say; the caller compares.

    Raises:
        DataError: no such file, broken or too large, or values that need a range.
    """
    where = str(path)
    header = read_header(path, where)
    if header.depth > 16 and header.grey and reading.values is None:
        low, high = value_range(path, where)
        raise LabelFault(
            f"{path}: values of 32 bits, {low:g} to {high:g}; say with --range LOW,HIGH which are black and white",
            RANGES,
        )
    found = value_range(path, where) if header.depth > 8 else None
    if reading.decode and found is None:
        decode_image(path, where)
    orientation, unsure = which_way_up(header, reading.exif, stated)
    return OpenedImage(path, header, orientation, unsure, found, reading)


def which_way_up(header: Header, exif: Exif, stated: tuple[Any, Any] | None) -> tuple[int, bool]:
    """Return the orientation to apply, and whether the sizes leave open which one.

    Args:
        stated: as of :func:`open_image`.
    """
    if exif == "ignore" or header.orientation == 1:
        return 1, False
    if exif == "apply" or stated is None:
        return header.orientation, False
    fits_stored, fits_displayed = stated == header.size, stated == header.displayed
    return (1 if fits_stored and not fits_displayed else header.orientation), fits_stored == fits_displayed


def settle(opened: Iterable[tuple[OpenedImage, dict[str, Any]]], report: LabelReport, say: Say | None) -> None:
    """Write the applied orientation to each sample's metadata, and report how the images were read.

    Args:
        opened: images with their samples' metadata.
    """
    images = list(opened)
    kept = sum(image.header.orientation > 1 and image.orientation == 1 for image, _ in images)
    unsure = sum(image.unsure for image, _ in images)
    surely_turned = any(image.orientation > 1 and not image.unsure for image, _ in images)
    # Who annotated some images as they are stored has seen all of them so.
    as_stored = bool(unsure and kept and not surely_turned)
    for image, metadata in images:
        if image.orientation > 1 and not (image.unsure and as_stored):
            metadata["orientation"] = image.orientation
            report.repair(TURNED, image.path)
        if image.converted:
            report.repair(CONVERTED, image.path)
        if image.header.several:
            report.repair(FIRST, image.path)
    if say is not None and kept:
        say(f"EXIF: {kept:,} images are packed as they are stored, not as they are displayed")
    if say is not None and unsure:
        how, other = ("as they are stored", "apply") if as_stored else ("as they are displayed", "ignore")
        say(f"EXIF: the annotations of {unsure:,} images fit both ways up: packed {how}; the other way: --exif {other}")
    deep = DeepImages(images[0][0].reading.values if images else None)
    for image, _ in images:
        deep.add(image.header, image.found)
    deep.tell(report, say)


class DeepImages:
    """Collects which values images of more than 8 bits hold, and doubts a set that would be all but black.

    Args:
        values: what is packed as black and white, where it is given.
        remedy: what to do with grey images of a narrow range, followed by the option.
    """

    def __init__(self, values: Values | None = None, remedy: str = "pass") -> None:
        self._values, self._remedy = values, remedy
        self._found: dict[bool, tuple[int, Values]] = {}

    def add(self, header: Header, found: Values | None) -> None:
        """Note an image; ``found``: its smallest and largest value, where it has more than 8 bits."""
        if found is not None:
            count, (low, high) = self._found.get(header.grey, (0, found))
            self._found[header.grey] = count + 1, (min(low, found[0]), max(high, found[1]))

    def tell(self, report: LabelReport, say: Say | None) -> None:
        """Report a finding, or a fault."""
        for grey, (count, (low, high)) in self._found.items():
            told = f"{count:,} 16-bit {'grey' if grey else 'colour'} images hold values from {low:g} to {high:g}"
            if grey and self._values is not None:
                told = f"{count:,} grey images of more than 8 bits hold values from {low:g} to {high:g}"
                told += f", packed with {self._values[0]:g} as black and {self._values[1]:g} as white"
            else:
                # Of colours the upper 8 bits alone are decoded.
                told += " of 0 to 65535" if grey else " of 0 to 255 in the upper 8 bits"
                if is_narrow((low, high), 65535 if grey else 255):
                    remedy = f"{self._remedy} {range_for(high)}" if grey else "convert them to 8 bits first"
                    report.doubt(f"{told}, less than a tenth, and would be all but one colour; {remedy}", RANGES)
                    continue
            if say is not None:
                say(told)
