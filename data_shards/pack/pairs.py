"""Pairing of images and label maps in folders of both."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.decode import NO_JPEG
from vitgraft.data_shards.listing import IMAGE_SUFFIXES, Listing, composed, is_hidden, list_files
from vitgraft.data_shards.pack.files import check_folder, read_text
from vitgraft.data_shards.pack.label_report import MISSING, LabelFault, LabelReport
from vitgraft.data_shards.pack.other_formats import refuse_other_format

LABEL_SUFFIXES = frozenset((".png", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".pgm", ".ppm"))
"""Of formats that keep every pixel's value."""
_LOSSY = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".webp"))


class Pairing(NamedTuple):
    """Pairing of images and label maps by the file's path without its suffix.

    ``image_suffix``, ``label_suffix``: suffix with the extension; other files are skipped. ``None``: any of
    ``IMAGE_SUFFIXES`` and ``LABEL_SUFFIXES``. ``listed``: a file with the pairs to take, one in each line; ``None``:
    all.
    """

    image_suffix: str | None = None
    label_suffix: str | None = None
    listed: Path | None = None


def find_pairs(images: Path, labels: Path, how: Pairing, report: LabelReport) -> list[tuple[Path, Path]]:
    """Return the pairs (image, label map) in the folders, recursively, in order of their names.

    A label map without image is a fault. So is an image without label map; it is left out where ``how`` gives a suffix,
    as data sets that need one have unlabelled images. With a list both must be there for each line, and
    all else is passed over.

    Args:
        report: takes faults, and what is left out.

    Raises:
        DataError: no images, no label maps, or two files that would be paired with the same one.
        ConfigError: a suffix without the extension.
    """
    check_folder(images)
    check_folder(labels)
    found = _by_key(images, "--image-suffix", how.image_suffix, IMAGE_SUFFIXES, report)
    maps = _by_key(labels, "--label-suffix", how.label_suffix, LABEL_SUFFIXES, report)
    if how.listed is not None:
        wanted = _listed(how.listed, images, found, how.image_suffix, report)
    else:
        wanted = {key: str(path) for key, path in found.items()}
        for key in sorted(maps.keys() - found.keys()):
            with report.collect():
                raise LabelFault(f"{maps[key]}: no image {key} in {images}; {_remedy(key, found)}", MISSING)
    pairs = []
    for key in sorted(wanted):
        if key in maps:
            pairs.append((found[key], maps[key]))
        elif how.listed is None and (how.image_suffix or how.label_suffix):
            report.leave_out("images without label", found[key])
        else:
            with report.collect():
                name = key + (how.label_suffix or ".png")
                remedy = "see --image-suffix, --label-suffix, --list"
                if how.label_suffix is None and any(os.path.isfile(f"{labels / key}{end}") for end in _LOSSY):
                    remedy = f"there is one, but {NO_JPEG}"
                raise LabelFault(f"{wanted[key]}: no label map {name} in {labels}; {remedy}", MISSING)
    return pairs


def _remedy(key: str, images: Collection[str]) -> str:
    """Return what to do about a label map of which no image has the name: its end may be more than the extension."""
    end = next((key[length:] for length in range(len(key) - 1, 0, -1) if key[:length] in images), None)
    return (
        "check the names, see --image-suffix, --label-suffix"
        if end is None
        else f"see --label-suffix, such as {end}.png"
    )


def _by_key(
    folder: Path, option: str, suffix: str | None, extensions: Collection[str], report: LabelReport
) -> dict[str, Path]:
    if suffix is not None and Path(f"name{suffix}").suffix.lower() not in extensions:
        if extensions is LABEL_SUFFIXES and Path(f"name{suffix}").suffix.lower() in _LOSSY:
            raise ConfigError(f"{option} {suffix}: {NO_JPEG}")
        listed = ", ".join(sorted(extensions))
        raise ConfigError(f"{option} {suffix}: expected the end of the files' names with its extension ({listed})")
    listing = list_files(folder, extensions)
    found: dict[str, Path] = {}
    for path in listing.files:
        if suffix is not None and not path.name.endswith(suffix):
            report.pass_over(f"files that do not end in {suffix}", path)
            continue
        name = str(path.relative_to(folder))
        key = composed(name[: -len(path.suffix if suffix is None else suffix)])
        if key in found:
            raise DataError(
                f"{path}: has the same stem as {found[key].name}; names must pair images and labels, see {option}"
            )
        found[key] = path
    note_passed_over(listing, report)
    if not found:
        ends = ", ".join(sorted(extensions)) if suffix is None else suffix
        lossy = _lossy(listing) if extensions is LABEL_SUFFIXES else None
        if lossy is not None:
            raise DataError(f"{lossy}: {NO_JPEG}")
        refuse_other_format(folder)
        raise DataError(f"{folder}: the data set is empty: no files that end in {ends}; check the path and {option}")
    return found


def note_passed_over(listing: Listing, report: LabelReport) -> None:
    """Report number and names of the files of a folder that a packer does not use."""
    for reason, paths in listing.passed_over.items():
        for path in paths:
            report.pass_over(reason, path)


def _lossy(listing: Listing) -> Path | None:
    """Return the first file that may be a label map in a format that changes pixels."""
    paths = (path for paths in listing.passed_over.values() for path in paths)
    return next((path for path in paths if path.suffix.lower() in _LOSSY and not is_hidden(path.name)), None)


def _listed(
    path: Path, images: Path, found: dict[str, Path], suffix: str | None, report: LabelReport
) -> dict[str, str]:
    """Return file and line of each listed pair."""
    ends = sorted(IMAGE_SUFFIXES) if suffix is None else [suffix]
    wanted: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, where = composed(line.strip()), f"{path}:{number}"
        if not name:
            continue
        # Some lists name the files, others what pairs them.
        keys = [name, *(name.removesuffix(end) for end in ends)]
        with report.collect():
            key = next((key for key in keys if key in found), None)
            if key is None:
                message = f"{where}: no image {name[:80]!r} in {images}; expected the name of one in each line"
                raise LabelFault(message, MISSING)
            if key in wanted:
                report.leave_out("lines whose image was listed before", where)
            wanted.setdefault(key, where)
    if not wanted and not report.faults:
        raise DataError(f"{path}: the data set is empty: no line names an image; check --list")
    return wanted
