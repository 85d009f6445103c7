"""Annotations of a COCO file, checked and converted to the packed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vitgraft.data_shards.pack.boxes import BoxCheck
from vitgraft.data_shards.pack.coco_categories import Categories, refuse_outside
from vitgraft.data_shards.pack.coco_json import key_of
from vitgraft.data_shards.pack.label_report import (
    BOXES,
    MISSING,
    NOTHING_TO_LEARN,
    UNKNOWN,
    LabelFault,
    LabelReport,
    Noted,
)
from vitgraft.data_shards.pack.masks import Mask, read_mask
from vitgraft.data_shards.pack.plain_values import STRINGS, Key, as_flag, as_number, is_missing

Crowds = Literal["keep", "objects"]
"""Meaning of ``iscrowd: 1``: a crowd, or an ordinary object (some tools set it for brush masks)."""

BOXED = "masks made of boxes"
FROM_MASK = "boxes made of masks"
OBJECTS = "crowds taken for objects"
FORM = "[x, y, width, height]"


@dataclass
class AnnotationReader:
    """Adds annotations to the images' metadata.

    ``images``: metadata by the images' ids. ``faulty``: ids of images that are listed and not packed. ``degenerate``:
    ids of annotations left out because their box has no area.
    """

    images: Mapping[Key, dict[str, Any]]
    faulty: set[Key]
    categories: Categories
    crowds: Crowds | None
    report: LabelReport
    where: str
    degenerate: list[Key] = field(default_factory=list)
    masks: int = 0
    scores: int = 0

    def __post_init__(self) -> None:
        self._boxes = BoxCheck(self.report, FORM)
        self._without_mask = Noted()
        self._outside: dict[Key, int] = {}

    def add(self, key: Key, annotation: dict[str, Any]) -> None:
        """Check one annotation and add it to its image, unless that is faulty.

        Raises:
            LabelFault: what it says cannot be taken.
        """
        where = f"{self.where}: annotation {key!s:.80}"
        image_id = key_of(annotation, "image_id", where, self.report)
        if image_id in self.faulty:
            return
        image = self.images.get(image_id)
        if image is None:
            raise LabelFault(f"{where}: image_id {image_id!r:.80} is not among the images; fix the file", MISSING)
        number = self._class_of(annotation, where)
        if number is None:
            return
        size = image["height"], image["width"]
        mask, segmentation = None, annotation.get("segmentation")
        if is_missing(annotation.get("bbox")):
            mask = self._mask(segmentation, size, where)
            if mask is None:
                raise LabelFault(f"{where}: neither bbox nor segmentation; expected one of them", BOXES)
            written = mask.box
        else:
            written = self._numbers(annotation["bbox"], where)
        box = self._boxes.inside(written, size, where)
        if box is None:
            self.degenerate.append(key)
            self.report.leave_out("boxes without area", f"annotation {key!s:.80}")
            return
        if mask is None:
            mask = self._mask(segmentation, size, where)
        else:
            self.report.repair(FROM_MASK, where)
        if mask is None:
            self._without_mask.add(where)
        self.masks += mask is not None
        self.scores += "score" in annotation
        area = as_number(annotation.get("area"))
        image["annotations"].append(
            {
                "id": key,
                "bbox": box,
                "class": number,
                "area": area if area is not None and area >= 0 else box[2] * box[3],
                "iscrowd": self._crowd(annotation.get("iscrowd"), where),
                "segmentation": None if mask is None else mask.rle,
            }
        )

    def close(self) -> None:
        """Report the findings on the annotations as a whole. Its counts must be complete."""
        self._boxes.close()
        if self._without_mask.count and self.masks:
            for name in self._without_mask.first[:-1]:
                self.report.repair(BOXED, name)
            shown = len(self._without_mask.first)
            self.report.repair(BOXED, self._without_mask.first[-1], self._without_mask.count - shown + 1)
        elif self._without_mask.count:
            self.report.remark("no annotation has a mask; to train boxes alone: --set model.head.masks=false")
        if self.scores:
            self.report.remark(f"{self.scores:,} annotations have a score, as predictions do; is this the right file?")
        refuse_outside(self.categories, self._outside, "annotations", self.where, self.report)
        self._check_crowds()

    def _check_crowds(self) -> None:
        report = self.report
        alone = [number for number, count in report.crowds.items() if count and count == report.counts[number]]
        if not alone or self.crowds is not None:
            return
        count = sum(report.crowds[number] for number in alone)
        names = ", ".join(repr(report.classes[number][:40]) for number in sorted(alone)[:5])
        who = f"all {count} annotations" if count == report.counts.total() else f"all {count} annotations of {names}"
        remedy = "if each is one object (tools mark so what is drawn with a brush), pass --crowds objects"
        message = f"{self.where}: {who} are crowds, from which nothing is learnt; {remedy}, else --crowds keep"
        report.doubt(message, NOTHING_TO_LEARN)

    def _class_of(self, annotation: dict[str, Any], where: str) -> int | None:
        """Return the class; ``None``: the category is not a class."""
        numbers, outside = self.categories.numbers, self.categories.outside
        category = key_of(annotation, "category_id", where, self.report)
        if category in outside:
            self._outside[category] = self._outside.get(category, 0) + 1
            return None
        if category not in numbers:
            listed = ", ".join(map(str, list(numbers)[:10])) + (", ..." if len(numbers) > 10 else "")
            message = f"{where}: category_id {category!r:.80} is not among the categories ({listed}); fix the file"
            raise LabelFault(message, UNKNOWN)
        return numbers[category]

    def _mask(self, segmentation: Any, size: tuple[int, int], where: str) -> Mask | None:
        return read_mask(segmentation, size, where, lambda what: self.report.repair(what, where))

    def _numbers(self, bbox: Any, where: str) -> tuple[float, float, float, float]:
        values = [as_number(value) for value in bbox] if isinstance(bbox, list) else []
        if len(values) != 4 or None in values:
            raise LabelFault(f"{where}: bbox {str(bbox)[:80]}; expected four numbers {FORM}", BOXES)
        if any(isinstance(value, str) for value in bbox):
            self.report.repair(STRINGS, f"{where}: bbox")
        x, y, width, height = (value for value in values if value is not None)
        return x, y, width, height

    def _crowd(self, value: Any, where: str) -> int:
        crowd = as_flag(value)
        if crowd is None:
            raise LabelFault(f"{where}: iscrowd {value!r:.80}; expected 0 or 1")
        if crowd and self.crowds == "objects":
            self.report.repair(OBJECTS, where)
            return 0
        return int(crowd)
