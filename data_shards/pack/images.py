"""How packers open image files: which way up, which values, in which format they are packed, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitgraft.configs.errors import ConfigError
from vitgraft.data_shards.images import (
    Header,
    Values,
    decode_image,
    encode_png,
    oriented_size,
    read_header,
    value_range,
)
from vitgraft.data_shards.pack.files import read_bytes
from vitgraft.data_shards.pack.label_report import CONVERTED, TURNED, LabelFault, LabelReport, Say

Exif = Literal["auto", "apply", "ignore"]
"""What an EXIF orientation does. ``auto``: it is applied unless the annotations are of the stored pixels, as their size
says, or where both sizes are the same, that of the set's other images. ``apply``, ``ignore``: always, never."""

RANGES = "images that use a small part of their range"
FIRST = "first of several frames or pages"
_LEAST = 0.1
"""Of the range of 16 bits, a set must use so much."""


@dataclass(frozen=True)
class Reading:
    """How image files are read.

    ``exif``: see :data:`Exif`. ``decode``: all pixels are decoded in the check, so that a damaged file is found before
    anything is written. ``values``: what is packed as black and as white of grey images of more than 8 bits.

    Raises:
        ConfigError: ``values`` that are no range.
    """

    exif: Exif = "auto"
    decode: bool = False
    values: Values | None = None

    def __post_init__(self) -> None:
        if self.values is not None and not -1e12 < self.values[0] < self.values[1] < 1e12:
            low, high = self.values
            raise ConfigError(f"--range {low:g},{high:g}: expected the value of black and a larger one, of white")


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
        """Its size for people."""
        height, width = self.size
        turned = f" under its EXIF orientation {self.orientation}" if self.orientation > 1 else ""
        return f"{width}x{height} pixels{turned}"

    @property
    def converted(self) -> bool:
        """Whether it is packed in another format than its own."""
        return self.header.extension is None or (self.header.grey and self.reading.values is not None)

    def member(self) -> dict[str, bytes]:
        """The packed member by extension: the file as it is, or a PNG of the same pixels.

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
    """The orientation to apply, and whether the sizes leave open which one.

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
    """Put the orientation that is applied into each sample's metadata, and tell how the images were read.

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
    _tell_ranges([image for image, _ in images if image.found is not None], report, say)


def _tell_ranges(deep: list[OpenedImage], report: LabelReport, say: Say | None) -> None:
    """Tell which values images of more than 8 bits hold, and doubt a set that would be all but black."""
    for grey in (True, False):
        found = [image.found for image in deep if image.header.grey == grey and image.found is not None]
        if not found:
            continue
        low, high = min(pair[0] for pair in found), max(pair[1] for pair in found)
        # Of colours the upper 8 bits alone are decoded.
        of, most = ("16-bit grey", 65535) if grey else ("16-bit colour", 255)
        told = f"{len(found):,} {of} images hold values from {low:g} to {high:g} of 0 to {most}"
        if not grey:
            told += " (upper 8 bits)"
        values = deep[0].reading.values if grey else None
        if values is not None:
            told = f"{len(found):,} grey images of more than 8 bits hold values from {low:g} to {high:g}"
            told += f", packed with {values[0]:g} as black and {values[1]:g} as white"
        elif high - low < _LEAST * most:
            top = 2 ** max(1, int(high)).bit_length() - 1
            remedy = f"pass --range 0,{top}" if grey else "convert them to 8 bits first"
            report.doubt(f"{told}, less than a tenth, and would be all but one colour; {remedy}", RANGES)
            continue
        if say is not None:
            say(told)
