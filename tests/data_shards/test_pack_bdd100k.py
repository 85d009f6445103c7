"""BDD100K: the official evaluator's figures come out of what was packed; images and labels meet by their stems."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import decode_label
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.bdd100k import DETECTION, pack_bdd100k
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import ShardReader


def metadata_of(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    reader = ShardReader(folder, manifest)
    return [json.loads(reader.read(i).members["json"]) for i in range(len(reader))]


def labels_of(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    reader = ShardReader(folder, manifest)
    raws = [reader.read(i) for i in range(len(reader))]
    return {
        json.loads(raw.members["json"])["file_name"]: decode_label(raw.members["label.png"], "x").numpy()
        for raw in raws
    }


def blank(path: Path, size: tuple[int, int] = (1280, 720)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 90)).save(path)
    return path


@pytest.fixture
def street(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """images/a.jpg and images/b.jpg of 1280x720, and detection labels of both, not yet written."""
    for name in ("a", "b"):
        blank(tmp_path / "images" / f"{name}.jpg")
    box = {"id": "7", "category": "car", "box2d": {"x1": 10.5, "y1": 20, "x2": 30, "y2": 40}}
    return tmp_path, [{"name": "a.jpg", "labels": [box]}, {"name": "b.jpg", "labels": None}]


def pack(folder: Path, tree: Any, **options: Any) -> Manifest:
    (folder / "det.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return pack_bdd100k([folder / "images"], folder / "det.json", folder / "set", **options)


def test_the_official_figures_come_out_of_what_was_packed(test_data: Path, tmp_path: Path) -> None:
    """202 genuine frames with 3241 boxes: pycocotools on the packed annotations gives the evaluator's AP."""
    root = test_data / "bdd100k_eval" / "scalabel"
    frames = json.loads((root / "box_track" / "track_sample_anns.json").read_text())
    first = blank(tmp_path / "images" / frames[0]["name"])
    for frame in frames[1:]:
        (tmp_path / "images" / frame["name"]).hardlink_to(first)
    told: list[str] = []
    labels = root / "box_track" / "track_sample_anns.json"
    manifest = pack_bdd100k([tmp_path / "images"], labels, tmp_path / "set", say=told.append)
    assert (manifest.kind, manifest.samples) == ("detection", 202)
    assert (manifest.classes, manifest.category_ids) == (DETECTION, list(range(1, 11)))
    counts = {"pedestrian": 191, "rider": 119, "car": 2726, "truck": 65, "bus": 21, "motorcycle": 119}
    report = manifest.source["label_report"]
    assert {name: count for name, count in report["classes"].items() if count} == counts
    assert told[0] == "labels: 202 samples, 3,241 instances, 0 samples without label"
    assert told[-1] == "  in all: 0 turned, 0 clipped, 0 left out, 0 passed over, 132 crowds; faults: none"
    packed = metadata_of(tmp_path / "set", manifest)
    truth: dict[str, Any] = {"images": [], "annotations": [], "info": {}}
    truth["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(manifest.classes)]
    expected = {frame["name"]: frame["labels"] for frame in frames}
    for item in packed:
        truth["images"].append({"id": item["image_id"], "height": item["height"], "width": item["width"]})
        assert [a["label_id"] for a in item["annotations"]] == [a["id"] for a in expected[item["file_name"]]]
        for found, label in zip(item["annotations"], expected[item["file_name"]], strict=True):
            assert manifest.classes[found["class"]] == label["category"]
            assert found["iscrowd"] == label["attributes"]["crowd"]
            entry = {"image_id": item["image_id"], "category_id": found["class"] + 1}
            truth["annotations"].append({**found, **entry})
    ids = {item["file_name"]: item["image_id"] for item in packed}
    detections = []
    for frame in json.loads((root / "det" / "bbox_predictions.json").read_text()):
        for label in frame["labels"]:
            box = label["box2d"]
            x, y, w, h = box["x1"], box["y1"], box["x2"] - box["x1"] + 1, box["y2"] - box["y1"] + 1
            entry = {"image_id": ids[frame["name"]], "category_id": DETECTION.index(label["category"]) + 1}
            detections.append({**entry, "bbox": [x, y, w, h], "score": label["score"]})
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = json.loads((test_data / "bdd100k_eval" / "expected.json").read_text())
    official = figures["scalabel/det (box_track/track_sample_anns.json vs det/bbox_predictions.json)"]
    # Boxes that end at the image's edge are cut to it, which moves the third decimal.
    assert evaluation.stats[0] * 100 == pytest.approx(official["AP"], abs=0.005)
    assert evaluation.stats[1] * 100 == pytest.approx(official["AP50"], abs=0.005)


def test_boxes_have_inclusive_corners_and_end_at_the_image(street: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, tree = street
    corners = [(10.5, 20, 30, 40), (-0.5, 0, 5, 5), (1270, 700, 1280, 720), (5, 5, 5, 5), (5, 5, 4, 9)]
    tree[0]["labels"] = [
        {"id": i, "category": "car", "box2d": dict(zip(("x1", "y1", "x2", "y2"), c, strict=True))}
        for i, c in enumerate(corners)
    ]
    manifest = pack(folder, tree)
    boxes = [a["bbox"] for a in metadata_of(folder / "set", manifest)[0]["annotations"]]
    assert boxes == [[10.5, 20, 20.5, 21], [0, 0, 6, 6], [1270, 700, 10, 20], [5, 5, 1, 1]]
    left_out = manifest.source["label_report"]["left_out"]
    assert left_out["boxes without area"] == {"count": 1, "first": [f"{folder}/det.json: a.jpg: label 4"]}
    assert verify(folder / "set").ok
    assert inspect(folder / "set").unlabelled == 1


def test_names_of_other_releases_uncertain_regions_and_labels_without_box(
    street: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, tree = street
    box = tree[0]["labels"][0]
    names = ["person", "bike", "motor", "van", "other vehicle", "trailer", "other person"]
    tree[0]["labels"] = [box | {"category": name} for name in names]
    tree[0]["labels"] += [box | {"attributes": {"crowd": True}}]
    tree[0]["labels"] += [{"id": 8, "category": "lane/single white", "poly2d": []}]
    manifest = pack(folder, tree)
    items = metadata_of(folder / "set", manifest)[0]["annotations"]
    found = [(manifest.classes[a["class"]], a["iscrowd"]) for a in items]
    plain = [("pedestrian", 0), ("bicycle", 0), ("motorcycle", 0), ("car", 0)]
    assert found == [*plain, ("car", 1), ("truck", 1), ("pedestrian", 1), ("car", 1)]
    assert manifest.source["label_report"]["left_out"]["labels without box2d (lanes, areas)"]["count"] == 1


def test_every_stem_is_packed_once_and_unlabelled_images_are_left_out(
    street: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, tree = street
    blank(folder / "ten" / "sub" / "a.png", (64, 36))
    blank(folder / "ten" / "c.jpg")
    (folder / "det.json").write_text(json.dumps([*tree, tree[0]]))
    manifest = pack_bdd100k([folder / "images", folder / "ten"], folder / "det.json", folder / "set")
    assert [m["file_name"] for m in metadata_of(folder / "set", manifest)] == ["a.jpg", "b.jpg"]
    left_out = manifest.source["label_report"]["left_out"]
    assert left_out["images whose stem was there before"]["first"] == [str(folder / "ten" / "sub" / "a.png")]
    assert left_out["images without label"]["first"] == [str(folder / "ten" / "c.jpg")]
    assert left_out["entries whose stem was there before"]["count"] == 1


def test_json_in_the_forms_of_all_releases(street: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, tree = street
    expected = metadata_of(folder / "set", pack(folder, tree))
    assert metadata_of(folder / "set", pack(folder, {"frames": tree}, overwrite=True)) == expected
    (folder / "labels").mkdir()
    for frame in tree:
        old = {"name": frame["name"][:-4], "frames": [{"timestamp": 1, "objects": frame["labels"] or []}]}
        (folder / "labels" / f"{old['name']}.json").write_text(json.dumps(old))
    manifest = pack_bdd100k([folder / "images"], folder / "labels", folder / "set", overwrite=True)
    assert metadata_of(folder / "set", manifest) == expected


def label(**changes: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda tree: tree[0]["labels"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (label(category="horse"), r"det\.json: a\.jpg: label 7: category 'horse' is not among pedestrian"),
        (label(category=[1]), "category .* is not among"),
        (label(box2d={"x1": 1, "y1": 2, "x2": 3}), "a.jpg: label 7: box2d .* expected numbers"),
        (label(box2d={"x1": 1, "y1": 2, "x2": float("nan"), "y2": 9}), "expected numbers"),
        (label(box2d={"x1": 1, "y1": 2, "x2": 10**400, "y2": 9}), "expected numbers"),
        (
            label(box2d={"x1": 1, "y1": 2, "x2": 2000, "y2": 9}),
            r"2000, 9\] reaches far out of the image \(1280x720",
        ),
        (label(box2d={"x1": -9, "y1": 2, "x2": 1, "y2": 9}), "reaches far out of the image"),
        (lambda tree: tree[0].update(name="c.jpg"), r"det\.json: c\.jpg: no image c"),
        (lambda tree: tree[0].update(name=7), "has no name"),
        (lambda tree: tree[0].update(labels={}), r"a\.jpg: labels \{\}; expected a list"),
        (lambda tree: tree[0].update(labels=["x"]), "expected an object with category and box2d"),
        (lambda tree: tree.append({"name": "a.jpg", "labels": []}), "a.jpg: other labels than"),
        (lambda tree: tree.append(3), "3 has no name"),
    ],
)
def test_wrong_labels_are_one_line_and_nothing_is_written(
    street: tuple[Path, list[dict[str, Any]]], edit: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    folder, tree = street
    edit(tree)
    with pytest.raises(DataError, match=message) as caught:
        pack(folder, tree)
    assert "\n" not in str(caught.value)
    assert not (folder / "set").exists()


def test_all_faults_are_told_and_the_first_stops(street: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, tree = street
    box = tree[0]["labels"][0]
    far = {"x1": 0, "y1": 0, "x2": 2000, "y2": 9}
    tree[0]["labels"] = [box | {"category": "horse"}, box, box | {"category": "cow"}, box | {"box2d": far}]
    told: list[str] = []
    counted = r"'horse' .*\(3 faults in all: 2 ids outside the class list, 1 wrong boxes\)"
    with pytest.raises(DataError, match=counted):
        pack(folder, tree, say=told.append)
    assert any(line.startswith("  2 ids outside the class list, the first: ") for line in told)
    assert any(line.startswith("  1 wrong boxes, the first: ") for line in told)


@pytest.mark.parametrize("text", ["{", "{}", "[" * 9999, '"x"'])
def test_files_that_are_no_labels(street: tuple[Path, list[dict[str, Any]]], text: str) -> None:
    with pytest.raises(DataError, match=r"det\.json"):
        pack(street[0], text)


def test_semantic_masks_of_the_release(test_data: Path, tmp_path: Path) -> None:
    mask = test_data / "bdd100k_eval" / "bdd100k" / "label" / "semseg_mask.png"
    blank(tmp_path / "images" / "semseg_mask.jpg")
    blank(tmp_path / "images" / "other.jpg")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "semseg_mask_train_id.png").write_bytes(mask.read_bytes())
    manifest = pack_bdd100k([tmp_path / "images"], tmp_path / "masks", tmp_path / "set", task="semantic")
    assert (manifest.kind, manifest.samples, len(manifest.classes)) == ("semantic", 1, 19)
    pixels = np.asarray(Image.open(mask))
    assert np.array_equal(labels_of(tmp_path / "set", manifest)["semseg_mask.jpg"], pixels)
    report = manifest.source["label_report"]
    assert report["classes"]["car"] == int((pixels == 13).sum()) > 0
    assert report["unlabelled"] == int((pixels == 255).sum())
    assert report["left_out"]["images without label"]["count"] == 1
    assert verify(tmp_path / "set").ok


def test_drivable_masks_of_both_releases(test_data: Path, tmp_path: Path) -> None:
    masks = (test_data / "miou_ref" / "drivable" / "gt").glob("*.png")
    pairs = {path.stem: np.asarray(Image.open(path)) for path in masks}
    (tmp_path / "masks").mkdir()
    for number, (stem, pixels) in enumerate(sorted(pairs.items())):
        blank(tmp_path / "images" / f"{stem}.jpg", (pixels.shape[1], pixels.shape[0]))
        if number == 0:
            old = np.where(pixels == 255, 255, (pixels.astype(int) + 1) % 3).astype(np.uint8)
            Image.fromarray(old).save(tmp_path / "masks" / f"{stem}_drivable_id.png")
        else:
            Image.fromarray(pixels).save(tmp_path / "masks" / f"{stem}.png")
    manifest = pack_bdd100k([tmp_path / "images"], tmp_path / "masks", tmp_path / "set", task="drivable")
    assert manifest.classes == ["direct", "alternative", "background"]
    found = labels_of(tmp_path / "set", manifest)
    assert len(found) == len(pairs) == 3
    for stem, pixels in pairs.items():
        assert np.array_equal(found[f"{stem}.jpg"], pixels)


def test_wrong_masks(tmp_path: Path) -> None:
    blank(tmp_path / "images" / "a.jpg", (4, 3))
    (tmp_path / "masks" / "colour").mkdir(parents=True)
    mask = tmp_path / "masks" / "a.png"

    def pack_masks(message: str, task: Any = "drivable") -> None:
        with pytest.raises(DataError, match=message) as caught:
            pack_bdd100k([tmp_path / "images"], tmp_path / "masks", tmp_path / "set", task=task)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "set").exists()

    pack_masks("masks: the data set is empty")
    Image.fromarray(np.full((3, 4), 3, np.uint8)).save(mask)
    pack_masks(r"a\.png: label id 3 is none of the 3 classes")
    Image.fromarray(np.full((3, 5), 1, np.uint8)).save(mask)
    pack_masks(r"a\.png: 5x3 pixels, its image .* has 4x3")
    Image.new("RGB", (4, 3), (0, 1, 2)).save(mask)
    pack_masks(r"a\.png: label map in colours", "semantic")
    mask.write_bytes(b"nothing")
    pack_masks(r"a\.png: broken image")
    Image.fromarray(np.full((3, 4), 1, np.uint8)).save(mask)
    Image.fromarray(np.full((3, 4), 2, np.uint8)).save(tmp_path / "masks" / "colour" / "a.png")
    pack_masks("another mask than")
    (tmp_path / "masks" / "colour" / "a.png").rename(tmp_path / "masks" / "b.png")
    pack_masks(r"b\.png: no image b")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        pack_bdd100k([tmp_path / "nowhere"], tmp_path / "masks", tmp_path / "set", task="drivable")
    with pytest.raises(DataError, match="data set is empty: no images"):
        pack_bdd100k([tmp_path / "masks" / "colour"], tmp_path / "masks", tmp_path / "set", task="drivable")
