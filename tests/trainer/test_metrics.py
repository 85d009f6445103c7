"""The three metrics against published figures, references made elsewhere, and counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn.functional import one_hot

from vitgraft.data_shards.batch import Batch, Truth
from vitgraft.data_shards.decode import decode_masks
from vitgraft.data_shards.pack.coco import read_coco
from vitgraft.models.contract import DetectionPrediction, Predictions
from vitgraft.trainer.tasks.base import Metric, Result
from vitgraft.trainer.tasks.detection import CocoMetric, DetectionTask
from vitgraft.trainer.tasks.semantic import ConfusionMetric, SemanticTask
from vitgraft.trainer.tasks.video import VideoTask

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Record = tuple[Truth, Result]


def batch_of(
    truths: list[Truth], sizes: list[tuple[int, int]] | None = None, unreadable: set[int] = frozenset()
) -> Batch:  # type: ignore[assignment]
    """A batch of evaluation; its images do not matter here."""
    weights = torch.tensor([0.0 if index in unreadable else 1.0 for index in range(len(truths))])
    valid = torch.tensor(sizes if sizes is not None else [truth.size for truth in truths])
    return Batch(torch.zeros(len(truths), 3, 1, 1), valid, weights, None, truths=truths)


def official(folder: Path, kind: str) -> tuple[list[str], list[Record]]:
    """COCO's own example as records: the ground truth of 100 images, and detections made up from it."""
    with (folder / "instances_val2014_100.json").open() as stream:
        content = json.load(stream)
    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    numbers = {category: number for number, category in enumerate(sorted(truth.cats))}
    name = {"bbox": "fakebbox", "segm": "fakesegm"}[kind]
    found: dict[int, list[dict[str, Any]]] = {image: [] for image in truth.imgs}
    for d in json.loads((folder / f"instances_val2014_{name}100_results.json").read_text()):
        x, y, w, h = d.get("bbox", (0, 0, 1, 1))
        label = numbers[d["category_id"]]
        box, mask = [x, y, x + w, y + h], d.get("segmentation")
        found[d["image_id"]].append({"class": label, "name": "", "score": d["score"], "box": box, "mask": mask})
    records = []
    for image in sorted(truth.imgs):
        size = truth.imgs[image]["height"], truth.imgs[image]["width"]
        annotations = [
            {
                "class": numbers[a["category_id"]],
                "bbox": a["bbox"],
                "area": a["area"],
                "iscrowd": a["iscrowd"],
                "segmentation": truth.annToRLE(a),
            }
            for a in truth.imgToAnns[image]
        ]
        result = {"height": size[0], "width": size[1], "detections": found[image]}
        records.append((Truth(f"{image:09d}", size, annotations), result))
    return [truth.cats[category]["name"] for category in sorted(truth.cats)], records


def coco_metric(classes: list[str], records: list[Record]) -> CocoMetric:
    metric = CocoMetric(DetectionTask(classes))
    metric.merge([[[truth.key, truth.size, truth.value, result] for truth, result in records]])
    return metric


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_the_official_one(test_data: Path, kind: str) -> None:
    classes, records = official(test_data / "coco_eval", kind)
    expected = json.loads((test_data / "coco_eval" / "expected.json").read_text())[kind]
    figures = coco_metric(classes, records).compute()
    prefix = {"bbox": "box", "segm": "mask"}[kind]
    for name in FIGURES:
        assert figures[f"{prefix}_{name}"] == pytest.approx(expected[name], abs=1e-9), name
    assert ("mask_AP" in figures) == (kind == "segm")


def test_the_size_of_a_mask_is_its_area_whatever_its_box(test_data: Path) -> None:
    classes, records = official(test_data / "coco_eval", "segm")
    before = coco_metric(classes, records).compute()
    for _, result in records:
        for detection in result["detections"]:
            detection["box"] = [0.0, 0.0, 500.0, 500.0]
    after = coco_metric(classes, records).compute()
    assert {k: v for k, v in after.items() if k.startswith("mask_")} == {
        k: v for k, v in before.items() if k.startswith("mask_")
    }


def tiny(test_data: Path, split: str) -> tuple[list[str], list[Truth]]:
    """The truths of coco_tiny as the packer makes them."""
    folder = test_data / "coco_tiny"
    content = read_coco(folder / "images" / split, folder / "annotations" / f"instances_{split}.json")
    images = [image.metadata for image in content.images]
    truths = [Truth(f"{i:09d}", (m["height"], m["width"]), m["annotations"]) for i, m in enumerate(images)]
    return content.classes, truths


def perfect(truth: Truth, scale: float = 1.0) -> DetectionPrediction:
    """The annotations but crowds as boxes on a canvas that is ``scale`` times as large."""
    shown = [a for a in truth.value if not a["iscrowd"]]
    boxes = torch.tensor([a["bbox"] for a in shown], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([a["class"] for a in shown], dtype=torch.int64)
    scores = torch.ones(len(shown))
    return {"boxes": (boxes * scale).float(), "labels": labels, "scores": scores}  # type: ignore[typeddict-item]


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_the_ground_truth_itself_scores_one(test_data: Path, split: str) -> None:
    classes, truths = tiny(test_data, split)
    # On a canvas of twice the size: the way back to the image's own pixels is part of the metric.
    metric = DetectionTask(classes).metric()
    sizes = [(2 * height, 2 * width) for height, width in (truth.size for truth in truths)]
    metric.add([perfect(truth, 2.0) for truth in truths], batch_of(truths, sizes))
    boxes = metric.compute()
    records = []
    for truth in truths:
        shown = [a for a in truth.value if not a["iscrowd"]]
        detections = [
            {"class": a["class"], "name": "", "score": 1.0, "box": [0, 0, 1, 1], "mask": a["segmentation"]}
            for a in shown
        ]
        records.append((truth, {"height": truth.size[0], "width": truth.size[1], "detections": detections}))
    masks = coco_metric(classes, records).compute()
    for name in FIGURES:
        assert boxes[f"box_{name}"] == pytest.approx(1.0, abs=1e-9)
        assert masks[f"mask_{name}"] == pytest.approx(1.0, abs=1e-9)


def box_truth(key: int, box: list[float], label: int = 0) -> Truth:
    annotation = {"class": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "segmentation": None}
    return Truth(f"{key:09d}", (100, 100), [annotation])


def test_an_unreadable_image_is_missed_and_none_found_is_zero() -> None:
    truths = [box_truth(0, [10, 10, 40, 40]), box_truth(1, [30, 20, 40, 60])]
    predictions: Predictions = [perfect(truth) for truth in truths]
    whole, half, none = (DetectionTask(["a"]).metric() for _ in range(3))
    whole.add(predictions, batch_of(truths))
    half.add(predictions, batch_of(truths, unreadable={1}))
    none.add(predictions, batch_of(truths, unreadable={0, 1}))
    assert whole.compute()["box_AP"] == pytest.approx(1.0)
    # One of two objects is found: precision 1 at the 51 recall points up to one half, 0 at the other 50.
    assert half.compute()["box_AP"] == pytest.approx(51 / 101)
    # Both objects are of medium size.
    nothing = {f"box_{name}": None if name in ("APs", "APl") else 0.0 for name in FIGURES}
    assert none.compute() == nothing


def test_without_ground_truth_there_is_no_figure() -> None:
    """pycocotools says -1 then, whatever is found."""
    empty = Truth("000000000", (100, 100), [])
    found: DetectionPrediction = perfect(box_truth(0, [10, 10, 40, 40]))
    for prediction in (found, perfect(empty)):
        metric = DetectionTask(["a"]).metric()
        metric.add([prediction], batch_of([empty]))
        assert {value for name, value in metric.compute().items() if name.startswith("box")} == {None}


def test_a_box_stands_for_the_mask_that_one_annotation_lacks(test_data: Path) -> None:
    """As in training: one annotation without mask once took all figures on masks away."""
    classes, truths = tiny(test_data, "val2017")
    lacking = next(a for truth in truths for a in truth.value if not a["iscrowd"] and a["segmentation"])
    mask, lacking["segmentation"] = lacking["segmentation"], None
    records = []
    for truth in truths:
        detections = [
            {"class": a["class"], "name": "", "score": 1.0, "box": [0, 0, 1, 1], "mask": a["segmentation"] or mask}
            for a in truth.value
            if not a["iscrowd"]
        ]
        records.append((truth, {"height": truth.size[0], "width": truth.size[1], "detections": detections}))
    with_mask = coco_metric(classes, records).compute()["mask_AP"]
    assert 0.9 < with_mask < 1
    # A detection that fills the box is right.
    truth, result = next(record for record in records if any(a is lacking for a in record[0].value))
    filled = decode_masks([lacking], truth.size, "x")[0].numpy()
    rle = mask_utils.encode(np.asfortranarray(filled))
    place = [a for a in truth.value if not a["iscrowd"]].index(lacking)
    result["detections"][place]["mask"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    assert coco_metric(classes, records).compute()["mask_AP"] == pytest.approx(1.0, abs=1e-9)
    picture = DetectionTask(classes).draw_truth(torch.zeros(3, *truth.size, dtype=torch.uint8), truth)
    assert picture.float().mean() > 0


def test_a_sample_whose_label_is_unreadable_has_nothing_to_find() -> None:
    truths = [box_truth(0, [10, 10, 40, 40]), Truth("000000001", (100, 100), None)]
    metric = DetectionTask(["a"]).metric()
    metric.add([perfect(truths[0]), perfect(truths[0])], batch_of(truths, unreadable={1}))
    assert metric.compute()["box_AP"] == pytest.approx(1.0)


def one_hot_logits(labels: np.ndarray[Any, Any], classes: int) -> Tensor:
    """Logits (1, K, H, W) whose decision is ``labels``."""
    return one_hot(torch.from_numpy(labels.astype(np.int64)), classes).permute(2, 0, 1)[None].float()


def camvid(test_data: Path) -> tuple[dict[str, Any], list[tuple[Truth, Tensor]]]:
    folder = test_data / "miou_ref"
    expected = json.loads((folder / "expected.json").read_text())["camvid"]
    cases = []
    for path in sorted((folder / "camvid" / "gt").glob("*.png")):
        target = np.array(Image.open(path))
        target[target == expected["ignore_index"]] = 255
        predicted = np.array(Image.open(folder / "camvid" / "pred" / path.name))
        truth = Truth(path.stem, (int(target.shape[0]), int(target.shape[1])), target)
        cases.append((truth, one_hot_logits(predicted, expected["num_classes"])))
    return expected, cases


def test_mean_intersection_over_union_is_the_references(test_data: Path) -> None:
    expected, cases = camvid(test_data)
    metric = ConfusionMetric(SemanticTask([f"c{i}" for i in range(expected["num_classes"])]))
    for truth, logits in cases:
        metric.add(logits, batch_of([truth]))
    assert metric.matrix[:, :-1].tolist() == expected["confusion_matrix_rows_gt_cols_pred"]
    figures = metric.compute()
    for name in ("mIoU", "mAcc", "aAcc"):
        assert figures[name] == pytest.approx(expected[name], abs=1e-12)
    for number, value in enumerate(expected["iou"]):
        assert figures[f"IoU_c{number}"] == pytest.approx(value, abs=1e-12)


def test_the_label_map_is_decided_at_the_images_own_size_from_the_valid_part() -> None:
    # Class 1 fills the left half of the valid part; beyond it lies padding whose logits say class 2.
    logits = torch.zeros(1, 3, 8, 8)
    logits[0, 1, :4, :2] = 5.0
    logits[0, 0, :4, 2:4] = 5.0
    logits[0, 2, 4:] = logits[0, 2, :, 4:] = 9.0
    labels = SemanticTask(["a", "b", "c"]).label_map(logits, 0, (4, 4), (12, 12))
    expected = torch.zeros(12, 12, dtype=torch.int64)
    expected[:, :6] = 1
    assert torch.equal(labels, expected)


def test_an_unreadable_images_pixels_are_wrong() -> None:
    target = np.array([[0, 0, 1, 255]], np.uint8)
    truths = [Truth("000000000", (1, 4), target), Truth("000000001", (1, 4), target), Truth("000000002", (1, 4), None)]
    metric = SemanticTask(["a", "b"]).metric()
    logits = torch.cat([one_hot_logits(np.array([[0, 0, 1, 0]]), 2)] * 3)
    metric.add(logits, batch_of(truths, unreadable={1, 2}))
    # Six pixels count, three are right; the wrong ones enlarge the union of their true class only.
    assert metric.compute() == {"mIoU": 0.5, "mAcc": 0.5, "aAcc": 0.5, "IoU_a": 0.5, "IoU_b": 0.5}


def test_classes_that_do_not_occur_have_no_figure_and_nothing_at_all_has_none() -> None:
    metric = ConfusionMetric(SemanticTask(["a", "b", "c"]))
    nothing = {"mIoU": None, "mAcc": None, "aAcc": None}
    assert metric.compute() == {**nothing, "IoU_a": None, "IoU_b": None, "IoU_c": None}
    metric.count(np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 1]]))
    # IoU of a is 3/4, of b 0/1; c occurs nowhere, which is reported. Recall exists for a alone.
    found = {"mIoU": 0.375, "mAcc": 0.75, "aAcc": 0.75, "IoU_a": 0.75, "IoU_b": 0.0, "IoU_c": None}
    assert metric.compute() == found


def test_a_model_that_says_background_only_is_half_wrong() -> None:
    metric = ConfusionMetric(SemanticTask(["background", "object"]))
    metric.count(np.array([[0, 0, 0, 1]]), np.array([[0, 0, 0, 0]]))
    assert metric.compute()["mIoU"] == 0.375


def clip_truths(classes: list[int]) -> list[Truth]:
    return [Truth(f"{i:09d}", (4, 4), label) for i, label in enumerate(classes)]


def test_accuracy_by_hand() -> None:
    metric = VideoTask([str(i) for i in range(7)]).metric()
    falling = torch.arange(7, 0, -1).float()  # class 0 is the best, class 6 the worst
    metric.add(falling.repeat(4, 1), batch_of(clip_truths([0, 4, 5, 0]), unreadable={3}))
    assert metric.compute() == {"top1": 1 / 4, "top5": 2 / 4}
    few = VideoTask(["a", "b"]).metric()
    few.add(torch.tensor([[1.0, 2.0]]), batch_of(clip_truths([0])))
    assert few.compute() == {"top1": 0.0, "top5": 1.0}
    assert VideoTask(["a"]).metric().compute() == {"top1": 0.0, "top5": 0.0}


def detection_cases() -> list[tuple[Truth, Any]]:
    generator = np.random.default_rng(0)
    cases = []
    for key in range(9):
        truth = box_truth(key, [*generator.uniform(0, 40, 2), *generator.uniform(20, 50, 2)], key % 2)
        prediction = perfect(truth)
        prediction["boxes"] = prediction["boxes"] + torch.from_numpy(generator.normal(0, 4, (1, 4))).float()
        prediction["scores"] = torch.from_numpy(generator.uniform(size=1)).float()
        cases.append((truth, prediction))
    return cases


def semantic_cases() -> list[tuple[Truth, Any]]:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 3, (9, 6, 5))
    return [
        (Truth(f"{i:09d}", (6, 5), target), one_hot_logits(generator.integers(0, 3, (6, 5)), 3)[0])
        for i, target in enumerate(targets)
    ]


def video_cases() -> list[tuple[Truth, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [(truth, torch.randn(8, generator=generator)) for truth in clip_truths([0, 1, 2, 3, 4, 5, 6, 7, 0])]


TASKS = {
    "detection": (lambda: DetectionTask(["a", "b"]), detection_cases),
    "semantic": (lambda: SemanticTask(["a", "b", "c"]), semantic_cases),
    "video": (lambda: VideoTask([str(i) for i in range(8)]), video_cases),
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", TASKS)
def test_the_ranks_together_are_one_rank(name: str, world: int) -> None:
    make, cases_of = TASKS[name]
    cases = cases_of()

    def measured(share: list[tuple[Truth, Any]]) -> Metric:
        metric: Metric = make().metric()
        for truth, prediction in share:
            metric.add([prediction] if isinstance(prediction, dict) else prediction[None], batch_of([truth]))
        return metric

    alone = measured(cases)
    # As they travel between the ranks.
    states = [json.loads(json.dumps(measured(cases[rank::world]).state())) for rank in range(world)]
    merged = make().metric()
    merged.merge(states)
    assert merged.compute() == alone.compute()
    assert 0 < next(iter(merged.compute().values())) < 1
