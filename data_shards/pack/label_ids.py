"""Conversion of a label PNG's pixels to class ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import check_lossless, decode_label
from vitgraft.data_shards.images import decode_image
from vitgraft.data_shards.manifest import IGNORE
from vitgraft.data_shards.pack.files import read_text
from vitgraft.data_shards.pack.label_report import UNKNOWN, LabelFault, LabelReport

Labels = npt.NDArray[np.uint8]
"""(H, W) uint8 as packed: 0..classes-1, or 255."""


_REMEDY = "list all classes, give each one's id with --ids, or pass the id to --ignore if it means unlabelled"

FEW = 4
"""Classes of a set in which each should occur: where the last do not, they are more likely stored as 255."""


def missing_class(
    report: LabelReport, ignored: Sequence[int], *, choose: str = "pass", accept: str = f"pass --ignore {IGNORE}"
) -> str | None:
    """Tell why the counted label maps of a set cannot be what was meant; ``None``: they may be.

    Masks of 0 and 255 are the commonest there are, and 255 is ignored: the class that it stands for would be missing
    without a word. So it is doubted where pixels are ignored and, of few classes, the last have none, or one alone has
    any.

    Args:
        report: with the pixels of each class, and of those ignored as ``unlabelled``.
        ignored: ids that count as unlabelled by default; none where the meaning of all is known.
        choose, accept: what to do for ``--ids``, and what where they do mean unlabelled.
    """
    classes = len(report.classes)
    present = [number for number in range(classes) if report.counts[number]]
    if not present:
        return f"labels: no pixel is of any class, all {report.unlabelled:,} are ignored; give label maps of class ids"
    absent = [name for number, name in enumerate(report.classes) if not report.counts[number]]
    last = bool(absent) and present == list(range(len(present))) and classes <= FEW
    if not ignored or not report.unlabelled or not (len(present) == 1 or last):
        return None
    share = report.unlabelled / (report.unlabelled + report.counts.total())
    found = f"class {absent[0]!r} has no pixel" if absent else f"{report.classes[0]!r} is the only class"
    known = list(ignored) == [IGNORE] and len(present) + 1 == max(classes, 2)
    wanted = ",".join(map(str, [*present, IGNORE])) if known else "with the id of each class"
    both = "" if absent else " and --classes with both names"
    return (
        f"labels: {found}, and {share:.0%} of all pixels are {' or '.join(map(str, ignored))}, which is ignored: if "
        f"that is a class, {choose} --ids {wanted}{both}; if it means unlabelled, {accept}"
    )


def packed_ids(
    path: Path, classes: int, ignore: Sequence[int] = (), reduce_zero: bool = False, *, remedy: str = _REMEDY
) -> Labels:
    """Return the labels for ids that are class ids, except the ignored ones.

    Args:
        ignore: ids that do not count, besides 255.
        reduce_zero: neither does 0, and the others fall by one.
        remedy: what to do about an id that is no class.

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
        raise LabelFault(f"{path}: label id {value} is none of the {classes} classes; {remedy}", UNKNOWN)
    return np.where(unlabelled, IGNORE, ids).astype(np.uint8)


def chosen_ids(path: Path, chosen: Sequence[int]) -> Labels:
    """Return the labels for ids of which ``chosen[n]`` is class n and all others are ignored.

    Raises:
        DataError: not a label map.
    """
    ids = decode_label(path, str(path)).numpy()
    packed = np.full(ids.shape, IGNORE, dtype=np.uint8)
    for number, value in enumerate(chosen):
        packed[ids == value] = number
    return packed


def coloured_ids(path: Path, colours: Sequence[tuple[int, int]]) -> Labels:
    """Return the labels of a colour image.

    Args:
        colours: see :func:`read_colours`.

    Raises:
        DataError: not an image, or a colour that is not listed.
    """
    check_lossless(path)
    red, green, blue = decode_image(path, str(path)).numpy().astype(np.int32)
    found = (red << 16) + (green << 8) + blue
    packed = np.full(found.shape, IGNORE, dtype=np.uint8)
    known = np.zeros(found.shape, dtype=np.bool_)
    for colour, number in colours:
        here = found == colour
        packed[here] = number
        known |= here
    if not known.all():
        colour = int(found[~known][0])
        raise LabelFault(
            f"{path}: colour {colour >> 16} {colour >> 8 & 255} {colour & 255} is not among the {len(colours)} listed; "
            "add it to the file of --colours",
            UNKNOWN,
        )
    return packed


def read_colours(path: Path, classes: list[str]) -> tuple[tuple[int, int], ...]:
    """Return (65536 R + 256 G + B, class id) of each line ``R G B NAME``; 255 for names that are no class.

    Several colours may have one name.

    Raises:
        DataError: a line of another form, a colour that is listed twice, or a class without colour.
    """
    colours: dict[int, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        parts = line.split(None, 3)
        if not parts or parts[0].startswith("#"):
            continue
        values = [int(part) for part in parts[:3] if part.isascii() and part.isdigit() and len(part) <= 3]
        if len(parts) < 4 or len(values) < 3 or max(values) > 255:
            raise DataError(f"{path}:{number}: {line.strip()[:80]!r}; expected R G B NAME, numbers from 0 to 255")
        colour = values[0] << 16 | values[1] << 8 | values[2]
        if colour in colours:
            raise DataError(f"{path}:{number}: colour {' '.join(parts[:3])} is listed twice; keep one of the lines")
        colours[colour] = parts[3].strip()
    if without := [name for name in classes if name not in colours.values()]:
        raise DataError(f"{path}: no colour of class {without[0]!r} ({len(without)} such classes); see --classes")
    numbers = {name: number for number, name in enumerate(classes)}
    return tuple((colour, numbers.get(name, IGNORE)) for colour, name in colours.items())
