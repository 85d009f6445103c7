"""Boxes that exceed their image: clipped, unless they suggest another unit, another box format or another image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitgraft.data_shards.pack.label_report import BOXES, CLIPPED, LabelFault, LabelReport

TOLERANCE = 1.0
"""Pixels by which rounding puts a box out of its image."""
MIN_INSIDE = 0.25
"""Share of a box's area that must lie in the image: of one that the edge cuts off, most does."""
CORNERS = "[left, top, right, bottom]"
MAX_SIDE = 1.25
"""Of the image's side: a longer box is none of this image."""
_FEW = 3
_MANY = 10
_MOST = 1 / 3

Corners = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""


@dataclass
class BoxCheck:
    """Clips the boxes of a data set, and reports at its end if they look wrong as a whole.

    ``form``: how a box is written, for messages.
    """

    report: LabelReport
    form: str
    boxes: int = 0
    far: int = 0
    as_corners: int = 0
    below_one: int = 0
    first: str = ""

    def clip(self, corners: Corners, size: tuple[int, int], where: str, written: Corners) -> Corners | None:
        """Return the part of a box with area that lies in the image of ``size`` (height, width); ``None``: it has none.

        Args:
            where: names the annotation.
            written: its four numbers as they are in the file.

        Raises:
            LabelFault: hardly any of it lies in the image, or it is larger than that.
        """
        (left, top, right, bottom), (height, width) = corners, size
        inside = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
        reach = max(-left, -top, right - width, bottom - height)
        self.boxes += 1
        self.below_one += max(written) <= 1 and any(value != int(value) for value in written)
        first, second, third, fourth = written
        self.as_corners += 0 <= first < third <= width + TOLERANCE and 0 <= second < fourth <= height + TOLERANCE
        if reach <= 0:
            return corners
        part = max(inside[2] - inside[0], 0.0) * max(inside[3] - inside[1], 0.0)
        if reach > TOLERANCE:
            self.far += 1
            self.first = self.first or where
            wide, high = right - left, bottom - top
            if part < MIN_INSIDE * wide * high or wide > MAX_SIDE * width or high > MAX_SIDE * height:
                raise LabelFault(
                    f"{where}: {_text(written)} reaches far out of the image ({width}x{height} pixels); boxes are "
                    f"{self.form} in pixels of this image",
                    BOXES,
                )
            self.report.repair(CLIPPED, where)
        return inside if part > 0 else None

    def inside(self, box: Sequence[float], size: tuple[int, int], where: str) -> list[float] | None:
        """Return the part of [x, y, width, height] in the image; ``None``: it has no area. Raises as :meth:`clip`."""
        x, y, width, height = box
        if width <= 0 or height <= 0:
            return None
        corners = x, y, x + width, y + height
        found = self.clip(corners, size, where, (x, y, width, height))
        if found is None:
            return None
        # A box that lies inside keeps its exact numbers: x + width - x would round.
        left, top, right, bottom = found
        return [x, y, width, height] if found == corners else [left, top, right - left, bottom - top]

    def close(self) -> None:
        """Note what is wrong with the boxes as a whole."""
        expected = f"expected {self.form} in pixels of the image"
        if self.boxes >= _FEW and self.below_one == self.boxes:
            self.report.doubt(
                f"all {self.boxes} boxes have numbers below 1, as shares of the image; {expected}", BOXES, explains=True
            )
        elif self.far and self.boxes >= _FEW and self.as_corners == self.boxes and self.form != CORNERS:
            wrong = f"{self.first}: boxes reach out of their images, and all {self.boxes} fit when read as {CORNERS}"
            self.report.doubt(f"{wrong}; {expected}", BOXES, explains=True)
        elif self.boxes >= _MANY and self.far > _MOST * self.boxes:
            wrong = f"{self.first}: {self.far} of {self.boxes} boxes reach out of their images"
            self.report.doubt(
                f"{wrong}: another version of them may have been labelled; {expected}", BOXES, explains=True
            )


def _text(written: Corners) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in written) + "]"
