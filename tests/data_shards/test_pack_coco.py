"""COCO in, the same annotations out; or one line that says what is wrong, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import ShardReader

Coco = tuple[Path, dict[str, Any]]
Write = Callable[[Path, Any], Path]


def metadata_of(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    reader = ShardReader(folder, manifest)
    return [json.loads(reader.read(i).members["json"]) for i in range(len(reader))]


def test_real_annotations_as_pycocotools_sees_them(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "coco_tiny"
    file = root / "annotations" / "instances_train2017.json"
    manifest = pack_coco(root / "images" / "train2017", file, tmp_path / "set", samples_per_shard=10)
    assert manifest == read_manifest(tmp_path / "set")
    assert (manifest.samples, manifest.shard_sizes, len(manifest.classes)) == (32, [10, 10, 10, 2], 80)
    reference = COCO(str(file))
    assert manifest.category_ids == sorted(reference.getCatIds())
    assert manifest.classes == [c["name"] for c in reference.loadCats(manifest.category_ids)]
    seen = []
    for item in metadata_of(tmp_path / "set", manifest):
        seen.append(item["image_id"])
        expected = {a["id"]: a for a in reference.loadAnns(reference.getAnnIds([item["image_id"]]))}
        assert {a["id"] for a in item["annotations"]} == expected.keys()
        for found in item["annotations"]:
            truth = expected[found["id"]]
            assert np.allclose(found["bbox"], truth["bbox"], atol=1e-9)
            assert manifest.category_ids[found["class"]] == truth["category_id"]
            assert (found["area"], found["iscrowd"]) == (truth["area"], truth["iscrowd"])
            mask = reference.annToMask(truth)
            assert np.array_equal(coco_mask.decode(found["segmentation"]), mask)
    assert sorted(seen) == sorted(reference.getImgIds())
    assert verify(tmp_path / "set").ok
    report = inspect(tmp_path / "set", draw=2, out=tmp_path / "pictures")
    assert sum(report.class_counts.values()) == 288
    assert report.unlabelled == 2
    assert sum(report.sizes.values()) == 32
    assert [Image.open(path).format for path in report.pictures] == ["PNG", "PNG"]


def test_images_are_packed_byte_for_byte(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    reader = ShardReader(folder / "set", manifest)
    assert reader.read(1).members["png"] == (folder / "images" / "b.png").read_bytes()
    assert [len(m["annotations"]) for m in metadata_of(folder / "set", manifest)] == [1, 0]
    assert (manifest.classes, manifest.category_ids) == (["dog", "bottle"], [18, 44])


def test_every_form_of_segmentation(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[3:11, 2:12] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))
    flat = mask.ravel(order="F")
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [len(flat)]])).tolist()
    forms = [
        [[2, 3, 12, 3, 12, 11, 2, 11]],
        {"size": [30, 40], "counts": runs},
        {"size": [30, 40], "counts": compressed["counts"].decode()},
    ]
    base = tree["annotations"][0]
    tree["annotations"] = [base | {"id": i, "segmentation": form} for i, form in enumerate(forms)]
    tree["annotations"].append({k: v for k, v in base.items() if k != "segmentation"} | {"id": 9})
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    packed = metadata_of(folder / "set", manifest)[0]["annotations"]
    assert all(np.array_equal(coco_mask.decode(a["segmentation"]), mask) for a in packed[:3])
    assert packed[3]["segmentation"] is None


def test_boxes_at_the_edge(coco: Coco, write_coco: Write) -> None:
    """Within a pixel: clipped. Without area: left out and listed."""
    folder, tree = coco
    base = tree["annotations"][0]
    boxes = [[-0.5, 0, 5, 30.8], [30, 20, 11, 10], [3, 3, 0, 5], [3, 3, 5, -1], [0.1, 0.2, 0.3, 0.7]]
    tree["annotations"] = [base | {"id": i, "bbox": box, "segmentation": None} for i, box in enumerate(boxes)]
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    packed = {a["id"]: a["bbox"] for a in metadata_of(folder / "set", manifest)[0]["annotations"]}
    assert packed == {0: [0, 0, 4.5, 30], 1: [30, 20, 10, 10], 4: [0.1, 0.2, 0.3, 0.7]}
    assert manifest.source["degenerate_boxes_left_out"] == [2, 3]


def change(key: str, value: Any, where: str = "annotations") -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree[where][0].update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("category_id", 3), r"annotation 1: category_id 3 .*18, 44"),
        (change("image_id", 8), r"annotation 1: image_id 8"),
        (change("image_id", [7]), r"annotation 1: image_id \[7\]; expected an id"),
        (change("category_id", {}), r"annotation 1: category_id \{\}; expected an id"),
        (change("bbox", [1, 2, 10**400, 4]), "expected four numbers"),
        (change("bbox", [1, 2, float("nan"), 4]), "expected four numbers"),
        (change("bbox", [2, 3, 60, 8]), r"annotation 1: \[2, 3, 60, 8\] reaches far out of the image \(40x30 pixels\)"),
        (change("bbox", [-5, 3, 6, 8]), "annotation 1: .* reaches far out"),
        (change("bbox", [50, 3, 4, 8]), "annotation 1: .* reaches far out"),
        (change("iscrowd", "maybe"), "annotation 1: iscrowd 'maybe'; expected 0 or 1"),
        (change("bbox", [1, 2, 3]), "expected four numbers"),
        (change("bbox", [1, 2, 3, None]), "expected four numbers"),
        (change("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "annotation 1: segmentation .* no points x, y"),
        (change("segmentation", [[1, 2, 3, 4, 5, "x"]]), "annotation 1: segmentation"),
        (change("segmentation", [[0, 0, 1e9, 0, 1e9, 1e9]]), "far out of the image"),
        (change("segmentation", {"size": [30, 41], "counts": [1230]}), "annotation 1: segmentation"),
        (change("segmentation", {"size": [30, 40], "counts": [1, 2]}), "add up to 3, the image has 1200"),
        (change("segmentation", {"size": [30, 40], "counts": "zz"}), "annotation 1: segmentation"),
        (change("segmentation", 7), "annotation 1: segmentation"),
        (change("id", [1]), r"annotations: id \[1\] at place 0; expected an integer or text"),
        (change("file_name", "c.png", "images"), r"c\.png: no such file"),
        (change("file_name", "../instances.json", "images"), r"images/instances\.json: no such file"),
        (change("file_name", "/etc/passwd", "images"), "images/passwd: no such file, .* lists '/etc/passwd'"),
        (change("file_name", 7, "images"), "file name '7'; expected a path"),
        (change("height", "tall", "images"), "image 7: height 'tall'; expected pixels"),
        (change("width", 41, "images"), r"a\.png: image 7 is 40x30 .* says 41x30"),
        (lambda tree: tree["annotations"].append(tree["annotations"][0]), "annotations: id 1 occurs twice"),
        (lambda tree: tree["images"].append(tree["images"][0]), "images: id 7 occurs twice"),
        (lambda tree: tree.update(images=[]), "data set is empty"),
        (lambda tree: tree.update(categories=[]), "no class names"),
        (lambda tree: tree.pop("categories"), "no list 'categories'"),
        (lambda tree: tree.pop("annotations"), "no annotations, so there is nothing to learn"),
        (lambda tree: tree.update(annotations=[]), "no annotations, so there is nothing to learn"),
        (lambda tree: tree.update(annotations=None), r"no list 'annotations' \(it holds 'images', 'annotations', 'cat"),
    ],
)
def test_wrong_annotations_are_one_line_and_nothing_is_written(
    coco: Coco, write_coco: Write, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder, tree = coco
    edit(tree)
    with pytest.raises(DataError, match=message) as caught:
        pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["images", "instances.json"]


def test_the_report_counts_every_fault_before_anything_is_written(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    base = tree["annotations"][0]
    told: list[str] = []
    tree["annotations"] += [base | {"id": 2, "bbox": [3, 3, 0, 5]}, base | {"id": 3, "category_id": 44}]
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set", say=told.append)
    assert told == [
        "labels: 2 samples, 2 instances, 1 samples without label",
        f"  {'dog':24s} {1:>12} instances",
        f"  {'bottle':24s} {1:>12} instances",
        "  left out: 1 boxes without area: annotation 2",
        "  in all: 0 turned, 0 clipped, 1 left out, 0 passed over, 0 crowds; faults: none",
    ]
    assert manifest.source["label_report"] == {
        "unit": "instances",
        "classes": {"dog": 1, "bottle": 1},
        "crowds": {},
        "unlabelled": 1,
        "repaired": {},
        "left_out": {"boxes without area": {"count": 1, "first": ["annotation 2"]}},
        "passed_over": {},
        "accepted": [],
    }
    # Image 9 has another size: its annotations are no faults of their own.
    tree["images"][1]["width"] = 41
    tree["annotations"] += [base | {"id": 4, "image_id": 9}, base | {"id": 5, "category_id": 1}]
    tree["annotations"] += [base | {"id": 6, "bbox": [0, 0, 99, 9]}, base | {"id": 7, "segmentation": 3}]
    kinds = "1 size mismatches, 1 ids outside the class list, 1 wrong boxes, 1 wrong masks"
    told.clear()
    with pytest.raises(DataError, match=rf"b\.png: image 9 is 40x30 .* \(4 faults in all: {kinds}\)"):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "other", say=told.append)
    assert sum(" the first: " in line for line in told) == 4
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"instances\.json:1: not valid JSON"), ("[]", "expected a COCO"), ("[" * 9999, "instances")],
)
def test_unreadable_annotation_files(coco: Coco, write_coco: Write, text: str, message: str) -> None:
    folder, _ = coco
    with pytest.raises(DataError, match=message):
        pack_coco(folder / "images", write_coco(folder, text), folder / "set")


def test_missing_files_and_broken_images(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        pack_coco(folder / "images", folder / "absent.json", folder / "set")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        pack_coco(folder / "nowhere", write_coco(folder, tree), folder / "set")
    (folder / "images" / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: broken image"):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
