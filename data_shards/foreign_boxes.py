"""Annotations of foreign detection samples, checked and converted to the packed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import check_annotations, decode_json, decode_masks
from vitgraft.data_shards.pack.boxes import BoxCheck
from vitgraft.data_shards.pack.coco_annotations import FORM, FROM_MASK
from vitgraft.data_shards.pack.label_report import BOXES, NOTHING_TO_LEARN, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.masks import Mask, read_mask
from vitgraft.data_shards.pack.plain_values import STRINGS, as_flag, as_integer, as_number, is_missing


@dataclass
class ForeignBoxes:
    """Reads ``{"annotations": [{"bbox": [x, y, width, height], "class": …}, …]}``, of one sample after the other.

    ``report``: names the classes, and is told what was repaired and left out.
    """

    report: LabelReport

    def __post_init__(self) -> None:
        self._boxes = BoxCheck(self.report, FORM)
        self._by_name = {name: number for number, name in enumerate(self.report.classes)}

    def read(self, data: bytes, size: tuple[int, int], where: str) -> list[dict[str, Any]]:
        """Return the annotations of an image of ``size`` (height, width).

        Raises:
            DataError: not such JSON; or an annotation that cannot be taken, where faults stop.
        """
        items = decode_json(data, where).get("annotations")
        if not isinstance(items, list):
            raise DataError(f'{where}: expected JSON {{"annotations": [{{"bbox": [x, y, w, h], "class": …}}, …]}}')
        found = []
        for number, item in enumerate(items):
            try:
                annotation = self._annotation(item, number, size, f"{where}: annotation {number}")
            except LabelFault as fault:
                if self.report.on_error == "raise":
                    raise
                self.report.fault(fault)
                continue
            if annotation is not None:
                found.append(annotation)
        facts = {"height": size[0], "width": size[1], "annotations": found}
        decode_masks(check_annotations(facts, len(self.report.classes), where), size, where)
        return found

    def count(self, annotations: list[dict[str, Any]]) -> None:
        """Count the annotations of a sample that is taken."""
        self.report.counts.update(item["class"] for item in annotations)
        self.report.crowds.update(item["class"] for item in annotations if item["iscrowd"])
        self.report.unlabelled += not annotations

    def close(self) -> None:
        """Report the findings on the boxes as a whole."""
        self._boxes.close()
        count = self.report.crowds.total()
        if not self.report.counts:
            message = "no annotations, so there is nothing to learn or to compare with"
            self.report.doubt(f"{message}; check --member label=, or pass --on-error skip", NOTHING_TO_LEARN)
        if count and count == self.report.counts.total():
            remedy = "set iscrowd to 0 if each is one object, else pass --on-error skip"
            message = f"all {count} annotations are crowds, from which nothing is learnt; {remedy}"
            self.report.doubt(message, NOTHING_TO_LEARN)

    def _annotation(self, item: Any, number: int, size: tuple[int, int], where: str) -> dict[str, Any] | None:
        """Return one annotation; ``None``: its box has no area."""
        if not isinstance(item, dict):
            raise LabelFault(f"{where}: {item!r:.80}; expected an object with bbox and class")
        mask = read_mask(item.get("segmentation"), size, where, lambda what: self.report.repair(what, where))
        bbox = item.get("bbox")
        if is_missing(bbox) and mask is not None:
            box = list(mask.box)
            self.report.repair(FROM_MASK, where)
        else:
            values = [as_number(value) for value in bbox] if isinstance(bbox, list) else []
            box = [value for value in values if value is not None]
            if len(box) != 4 or len(values) != 4:
                raise LabelFault(f"{where}: bbox {str(bbox)[:80]}; expected four numbers {FORM}", BOXES)
            if any(isinstance(value, str) for value in bbox or ()):
                self.report.repair(STRINGS, f"{where}: bbox")
        inside = self._boxes.inside(box, size, where)
        if inside is None:
            self.report.leave_out("boxes without area", where)
            return None
        crowd = as_flag(item.get("iscrowd"))
        if crowd is None:
            raise LabelFault(f"{where}: iscrowd {item['iscrowd']!r:.80}; expected 0 or 1")
        area = as_number(item.get("area"))
        return {
            "id": number,
            "bbox": inside,
            "class": self._class_of(item.get("class"), where),
            "area": area if area is not None and area >= 0 else _area(inside, mask),
            "iscrowd": int(crowd),
            "segmentation": None if mask is None else mask.rle,
        }

    def _class_of(self, value: Any, where: str) -> int:
        number = self._by_name.get(value) if isinstance(value, str) else None
        number = as_integer(value) if number is None else number
        if number is None or not 0 <= number < len(self.report.classes):
            message = f"{where}: class {value!r:.80} is none of the {len(self.report.classes)} classes; see --classes"
            raise LabelFault(message, UNKNOWN)
        return number


def _area(box: list[float], mask: Mask | None) -> float:
    """Return the area, in pixels, of an annotation's mask, or of its box where it has none, for evaluation by size."""
    from pycocotools import mask as coco_mask

    return box[2] * box[3] if mask is None else float(coco_mask.area(mask.rle))
