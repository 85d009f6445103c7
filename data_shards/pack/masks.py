"""A COCO annotation's segmentation, in any of its forms, as compressed run lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vitgraft.data_shards.decode import covered
from vitgraft.data_shards.pack.label_report import MASKS, LabelFault
from vitgraft.data_shards.pack.plain_values import STRINGS, as_integer, as_number, is_missing, is_number

DEGENERATE = "masks without their polygons of fewer than three points"
OTHER_FORM = "polygons in another form"

Note = Callable[[str], None]
"""Callback that receives each correction made to read a mask."""


class Mask(NamedTuple):
    """``rle``: size and counts. ``box``: left, top, width, height of what it covers, in pixels."""

    rle: dict[str, Any]
    box: tuple[float, float, float, float]


def read_mask(segmentation: Any, size: tuple[int, int], where: str, note: Note) -> Mask | None:
    """Read polygons, run lengths, or a list of run lengths; ``None``: there is nothing in it.

    Args:
        size: (height, width) of the image.

    Raises:
        LabelFault: neither polygons nor run lengths.
    """
    try:
        if _is_empty(segmentation):
            return None
        if isinstance(segmentation, dict):
            return _covering(_run_lengths(segmentation, size, note))
        if not isinstance(segmentation, list):
            raise ValueError(f"{str(segmentation)[:40]!r}")
        parts = [part for part in segmentation if not _is_empty(part)]
        if parts and all(isinstance(part, dict) for part in parts):
            return _covering(_merged([_run_lengths(part, size, note) for part in parts]))
        polygons = _polygons(parts, note)
        return _drawn(polygons, size) if polygons else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        message = f"{where}: segmentation cannot be read: {reason}; expected polygons or run lengths"
        raise LabelFault(message, MASKS) from None


def _is_empty(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):
        return is_missing(segmentation) or ("counts" in segmentation and is_missing(segmentation["counts"]))
    return is_missing(segmentation) or (isinstance(segmentation, list) and all(map(_is_empty, segmentation)))


def _polygons(parts: list[Any], note: Note) -> list[list[float]]:
    """Return each polygon as x, y, x, y, …; those of fewer than three points are left out."""
    if not any(isinstance(part, list) for part in parts):
        parts = [parts]
        note(OTHER_FORM)
    elif len(parts) >= 3 and all(_is_point(part) for part in parts):
        parts = [[value for point in parts for value in point]]
        note(OTHER_FORM)
    polygons = []
    for part in parts:
        if not isinstance(part, list):
            raise ValueError(f"{str(part)[:40]!r} among polygons")
        if part and all(_is_point(point) for point in part):
            part = [value for point in part for value in point]
            note(OTHER_FORM)
        if len(part) % 2:
            raise ValueError(f"a polygon of {len(part)} numbers, which are no points x, y")
        if not all(map(is_number, part)):
            part = _spelt_out(part)
            note(STRINGS)
        if len(part) < 6:
            note(DEGENERATE)
        else:
            polygons.append(part)
    return polygons


def _spelt_out(values: list[Any]) -> list[float]:
    numbers = []
    for value in values:
        number = as_number(value)
        if number is None:
            raise ValueError(f"a polygon holds {str(value)[:40]!r}, which is no number")
        numbers.append(number)
    return numbers


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and not any(isinstance(number, list) for number in value)


def _drawn(polygons: list[list[float]], size: tuple[int, int]) -> Mask:
    from pycocotools import mask as coco_mask

    height, width = size
    across = [value for polygon in polygons for value in polygon[0::2]]
    down = [value for polygon in polygons for value in polygon[1::2]]
    left, top, right, bottom = min(across), min(down), max(across), max(down)
    # pycocotools walks (and allocates) every pixel of the outline, however far away it is.
    reach = 4 * max(height, width)
    if min(left, top) < -reach or max(right, bottom) > reach + max(height, width):
        raise ValueError("a polygon reaches far out of the image")
    rle = _merged(coco_mask.frPyObjects(polygons, height, width))
    return Mask(_as_text(rle), (left, top, right - left, bottom - top))


def _run_lengths(segmentation: dict[str, Any], size: tuple[int, int], note: Note) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    height, width = size
    given, counts = [as_integer(side) for side in segmentation["size"]], segmentation["counts"]
    if given != [height, width]:
        raise ValueError(f"size {str(segmentation['size'])[:40]}, image {[height, width]}")
    if given != segmentation["size"]:
        note(STRINGS)
    if isinstance(counts, list):
        lengths = [as_integer(length) for length in counts]
        if None in lengths or min(length for length in lengths if length is not None) < 0:
            raise ValueError("run lengths that are no numbers")
        if (total := sum(length for length in lengths if length is not None)) != height * width:
            raise ValueError(f"run lengths add up to {total}, the image has {height * width} pixels")
        rle: dict[str, Any] = coco_mask.frPyObjects({"size": given, "counts": lengths}, height, width)
        return rle
    rle = {"size": given, "counts": counts.encode("ascii")}
    if (total := covered(rle["counts"])) != height * width:
        raise ValueError(f"run lengths add up to {total}, the image has {height * width} pixels")
    return rle


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    rle: dict[str, Any] = coco_mask.merge(parts)
    return rle


def _covering(rle: dict[str, Any]) -> Mask:
    from pycocotools import mask as coco_mask

    left, top, width, height = coco_mask.toBbox(rle).tolist()
    return Mask(_as_text(rle), (left, top, width, height))


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
