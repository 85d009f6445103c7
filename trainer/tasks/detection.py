"""Detection and instance segmentation: COCO average precision on boxes and masks."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from vitgraft.data_shards.batch import Batch, Truth
from vitgraft.data_shards.decode import decode_masks
from vitgraft.data_shards.draw import draw_instances
from vitgraft.models.contract import DetectionPrediction, Predictions
from vitgraft.models.heads.mask_rcnn import paste_masks
from vitgraft.trainer.draw import enlarge, repeat
from vitgraft.trainer.tasks.base import Metric, Result

_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class DetectionTask:
    """Boxes, and masks where the head has them."""

    primary = ["box_AP", "box_AP50", "mask_AP", "mask_AP50"]
    protocol = {"metric": "COCO AP (pycocotools), IoU 0.50:0.05:0.95, 101 recall points, 100 detections per image"}

    threshold: float | None = 0.5

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def metric(self) -> Metric:
        """Return an empty metric."""
        return CocoMetric(self)

    def result(self, predictions: Predictions, index: int, valid: tuple[int, int], size: tuple[int, int]) -> Result:
        """Return detections by descending score: class, score, box xyxy and RLE mask in pixels of the original
        image."""
        prediction: DetectionPrediction = predictions[index]  # type: ignore[assignment]
        height, width = size
        scale = torch.tensor([width / valid[1], height / valid[0]] * 2)
        boxes = prediction["boxes"].detach().cpu().float() * scale
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        rles: list[dict[str, Any] | None] = [None] * len(boxes)
        if "masks" in prediction and len(boxes):
            pasted = paste_masks(prediction["masks"].detach().cpu(), boxes, (height, width))
            rles = [_encode(mask) for mask in pasted]
        labels, scores = prediction["labels"].tolist(), prediction["scores"].tolist()
        return {
            "height": height,
            "width": width,
            "detections": [
                {"class": label, "name": self.classes[label], "score": score, "box": box, "mask": rle}
                for label, score, box, rle in zip(labels, scores, boxes.tolist(), rles, strict=True)
            ],
        }

    def draw(self, image: Tensor, result: Result) -> Tensor:
        """Draw detections of score ``threshold`` or more."""
        threshold = self.threshold or 0.0
        shown = [d for d in result["detections"] if d["score"] >= threshold]
        captions = [f"{d['name']} {d['score']:.2f}" for d in shown]
        return _draw(
            image, [d["box"] for d in shown], [d["class"] for d in shown], captions, [d["mask"] for d in shown]
        )

    def remark(self, result: Result) -> str | None:
        """Return the note that no detection is drawn, with the best score; ``None``: some are drawn."""
        threshold = self.threshold or 0.0
        best = max(result["detections"], key=lambda d: d["score"], default=None)
        if best is not None and best["score"] >= threshold:
            return None
        nearest = "" if best is None else f"; best: {best['name']} {best['score']:.2f}"
        return f"nothing of score {threshold:g} or more{nearest}"

    def draw_truth(self, image: Tensor, truth: Truth) -> Tensor:
        """Draw all annotations except crowds."""
        shown = [a for a in truth.value if not a["iscrowd"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in shown)]
        labels = [a["class"] for a in shown]
        captions = [self.classes[label] for label in labels]
        masks = _filled(shown, truth) if any(a["segmentation"] for a in shown) else []
        return _draw(image, boxes, labels, captions, masks)


class CocoMetric:
    """Box and mask AP by pycocotools."""

    def __init__(self, task: DetectionTask) -> None:
        self._task = task
        self._records: list[tuple[Truth, Result]] = []

    def add(self, predictions: Predictions, batch: Batch) -> None:
        """Add a batch; an unreadable sample has no detections, so its objects are missed."""
        for index, truth in enumerate(batch.truths):
            if batch.weights[index] == 0:
                result: Result = {"height": truth.size[0], "width": truth.size[1], "detections": []}
            else:
                height, width = (int(v) for v in batch.sizes[index])
                result = self._task.result(predictions, index, (height, width), truth.size)
            if truth.value is None:  # the label cannot be read either: nothing to find
                truth = replace(truth, value=[])
            self._records.append((truth, result))

    def state(self) -> list[list[Any]]:
        """Return all records: key, size and annotations of the truth, and the result."""
        return [[truth.key, list(truth.size), truth.value, result] for truth, result in self._records]

    def merge(self, states: list[list[list[Any]]]) -> None:
        """Merge the records, in the order of their keys."""
        records = [
            (Truth(key, (height, width), value), result)
            for state in states
            for key, (height, width), value, result in state
        ]
        self._records = sorted(records, key=lambda record: record[0].key)

    def compute(self) -> dict[str, float | None]:
        """Return box_AP … box_APl, and mask_AP … where the truth has masks and the head makes them.

        As in training, the box of an annotation without mask stands for its mask where others have masks.
        """
        figures = {f"box_{k}": v for k, v in self._average_precision("bbox").items()}
        annotations = [a for truth, _ in self._records for a in truth.value]
        detections = [d for _, result in self._records for d in result["detections"]]
        masked = not annotations or any(a["segmentation"] for a in annotations)
        if masked and all(d["mask"] for d in detections):
            figures |= {f"mask_{k}": v for k, v in self._average_precision("segm").items()}
        return figures

    def confusion(self) -> None:
        """Return ``None``: detection has no confusion matrix."""

    def _average_precision(self, kind: str) -> dict[str, float | None]:
        truth, detections = self._coco_truth(kind), self._coco_detections(kind)
        with contextlib.redirect_stdout(io.StringIO()):
            reference, found = COCO(), COCO()
            reference.dataset = truth
            reference.createIndex()
            if detections:
                found = reference.loadRes(detections)
            else:  # which loadRes does not take
                found.dataset = {**truth, "annotations": []}
                found.createIndex()
            evaluation = COCOeval(reference, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = evaluation.stats[: len(_FIGURES)]
        # pycocotools says -1 where no object of the size, or none at all, is to be found.
        return {name: None if value < 0 else float(value) for name, value in zip(_FIGURES, stats, strict=True)}

    def _coco_truth(self, kind: str) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, (truth, _) in enumerate(self._records, start=1):
            images.append({"id": image_id, "height": truth.size[0], "width": truth.size[1]})
            masks = _filled(truth.value, truth) if kind == "segm" else []
            for number, a in enumerate(truth.value):
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": a["class"] + 1,
                    "bbox": a["bbox"],
                    "area": a["area"],
                    "iscrowd": a["iscrowd"],
                }
                if kind == "segm":
                    entry["segmentation"] = masks[number]
                annotations.append(entry)
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self._task.classes)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _coco_detections(self, kind: str) -> list[dict[str, Any]]:
        """Return detections for pycocotools, masks without boxes: it would use the box's area to assign a mask to
        small, medium or large."""
        detections = []
        for image_id, (_, result) in enumerate(self._records, start=1):
            for d in result["detections"]:
                entry = {"image_id": image_id, "category_id": d["class"] + 1, "score": d["score"]}
                if kind == "segm":
                    entry["segmentation"] = d["mask"]
                else:
                    left, top, right, bottom = d["box"]
                    entry["bbox"] = [left, top, right - left, bottom - top]
                detections.append(entry)
        return detections


def _filled(annotations: list[dict[str, Any]], truth: Truth) -> list[dict[str, Any]]:
    """Return the masks of a sample's annotations as run lengths; the filled box of one that has none."""
    return [
        a["segmentation"] or _encode(decode_masks([{**a, "segmentation": None}], truth.size, truth.key)[0])
        for a in annotations
    ]


def _encode(mask: Tensor) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _draw(image: Tensor, boxes: list[list[float]], labels: list[int], captions: list[str], rles: list[Any]) -> Tensor:
    big, factor = enlarge(image)
    masks: Tensor | None = None
    if any(rles):
        nothing = torch.zeros(image.shape[-2:], dtype=torch.bool)
        masks = repeat(torch.stack([_decode(rle) if rle else nothing for rle in rles]), factor)
    scaled = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * factor
    return draw_instances(big, scaled, labels, captions, masks)


def _decode(rle: dict[str, Any]) -> Tensor:
    return torch.from_numpy(mask_utils.decode(rle).astype(bool))
