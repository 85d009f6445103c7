"""Boxes of BDD100K's JSON, checked and converted to the packed form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vitgraft.data_shards.pack.boxes import CORNERS, BoxCheck, Corners
from vitgraft.data_shards.pack.coco_categories import Categories, refuse_outside
from vitgraft.data_shards.pack.label_report import BOXES, NOTHING_TO_LEARN, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.plain_values import STRINGS, Key, as_flag, as_number

# Classes in the order of the official ids, the data set's names for them in other releases, and the uncertain regions,
# which official conversions turn into crowds of a class (bdd100k/configs/det.toml, bdd100k/label/to_coco.py).
DETECTION = ["pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
DETECTION += ["traffic light", "traffic sign"]
ALIASES = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}
UNCERTAIN = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}


@dataclass
class LabelReader:
    """Reads the labels of one image after the other; faults go to the report.

    ``categories``: the classes, by official id from 1. ``outside``: labels of official classes that are none.
    """

    categories: Categories
    report: LabelReport
    numbered: int = 0
    outside: Counter[Key] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._boxes = BoxCheck(self.report, CORNERS)

    def read(self, labels: list[Any], size: tuple[int, int], where: str) -> list[dict[str, Any]]:
        """Return the labels of an image of ``size`` (height, width) that have a box."""
        found = []
        for label in labels:
            with self.report.collect():
                annotation = self._annotation(label, size, where)
                if annotation is not None:
                    self.numbered += 1
                    found.append({"id": self.numbered, **annotation})
        return found

    def close(self, where: str) -> None:
        """Report the findings on the labels as a whole."""
        self._boxes.close()
        counts, crowds = self.report.counts.total(), self.report.crowds.total()
        if not counts:
            message = f"{where}: no label with a box2d, so there is nothing to learn or to compare with"
            self.report.doubt(f"{message}; check --labels and --task", NOTHING_TO_LEARN)
        elif counts == crowds:
            remedy = "remove the attribute crowd if each is one object, else pass --on-error skip"
            message = f"{where}: all {counts} labels are crowds, from which nothing is learnt; {remedy}"
            self.report.doubt(message, NOTHING_TO_LEARN)
        refuse_outside(self.categories, self.outside, "labels", where, self.report)

    def _annotation(self, label: Any, size: tuple[int, int], where: str) -> dict[str, Any] | None:
        """Return one label in the form that is packed; ``None`` for one without box, or whose box has no area."""
        if not isinstance(label, dict):
            raise LabelFault(f"{where}: label {str(label)[:80]}; expected an object with category and box2d")
        where, category = f"{where}: label {str(label.get('id'))[:40]}", label.get("category")
        if label.get("box2d") is None:
            self.report.leave_out("labels without box2d (lanes, areas)", where)
            return None
        if not isinstance(category, str) or ALIASES.get(category, category) not in {*DETECTION, *UNCERTAIN}:
            expected = ", ".join(DETECTION)
            raise LabelFault(f"{where}: category {str(category)[:80]!r} is not among {expected}; fix the file", UNKNOWN)
        official = DETECTION.index(ALIASES.get(category, UNCERTAIN.get(category, category))) + 1
        if official not in self.categories.numbers:
            self.outside[official] += 1
            return None
        box = self._box(label["box2d"], size, where)
        if box is None:
            self.report.leave_out("boxes without area", where)
            return None
        attributes = label.get("attributes")
        crowd = as_flag(attributes.get("crowd")) if isinstance(attributes, dict) else False
        return {
            "label_id": str(label.get("id")),
            "bbox": box,
            "class": self.categories.numbers[official],
            "area": box[2] * box[3],
            "iscrowd": int(category in UNCERTAIN or bool(crowd)),
            "segmentation": None,
        }

    def _box(self, given: Any, size: tuple[int, int], where: str) -> list[float] | None:
        """Return the part of a box in the image as [x, y, width, height]; ``None``: it has no area."""
        keys = ("x1", "y1", "x2", "y2")
        values = [as_number(given.get(key)) for key in keys] if isinstance(given, dict) else [None]
        if None in values:
            raise LabelFault(f"{where}: box2d {str(given)[:80]}; expected numbers x1, y1, x2, y2", BOXES)
        if any(isinstance(given[key], str) for key in keys):
            self.report.repair(STRINGS, f"{where}: box2d")
        left, top, right, bottom = (value for value in values if value is not None)
        if right < left or bottom < top:
            return None
        written: Corners = left, top, right, bottom
        # Corners lie in the box, as in the official conversion: a box from 3 to 3 is one pixel wide.
        inside = self._boxes.clip((left, top, right + 1, bottom + 1), size, where, written)
        return None if inside is None else [inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]]
