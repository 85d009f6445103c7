"""Labels as tools really write them: what means one thing is packed and counted, all else is a fault with a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.decode import decode_label
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.bdd100k import pack_bdd100k
from vitgraft.data_shards.pack.class_lists import read_classes
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.pack.panoptic import pack_panoptic
from vitgraft.data_shards.stream import ShardReader
from vitgraft.launch.cli import app

Coco = tuple[Path, dict[str, Any]]
Write = Callable[[Path, Any], Path]


def samples(folder: Path) -> list[dict[str, Any]]:
    reader = ShardReader(folder, read_manifest(folder))
    return [json.loads(reader.read(i).members["json"]) for i in range(len(reader))]


def pack_fault(fault_data: Path, name: str, out: Path, **options: Any) -> tuple[Manifest, list[str]]:
    told: list[str] = []
    root = fault_data / name
    return pack_coco(root / "img", root / "ann.json", out, say=told.append, **options), told


def counted(manifest: Manifest, sort: str) -> dict[str, int]:
    return {reason: found["count"] for reason, found in manifest.source["label_report"][sort].items()}


@pytest.mark.parametrize(
    ("name", "repaired", "left_out", "instances"),
    [
        ("one_without_mask", {"masks made of boxes": 1}, {}, 12),
        ("segmentation_four", {"masks without their polygons of fewer than three points": 1}, {}, 8),
        ("segmentation_emptyin", {"masks made of boxes": 1}, {}, 8),
        ("segmentation_emptydict", {"masks made of boxes": 1}, {}, 8),
        ("box_5px_outside", {"clipped": 1}, {}, 8),
        ("file_name_backslash", {"found by another name": 4}, {}, 8),
        ("file_name_percent20", {"found by another name": 4}, {}, 8),
        ("coco_strsize", {"read from strings": 8}, {}, 8),
        ("coco_strids", {}, {}, 8),
        ("coco_nobbox", {"boxes made of masks": 1}, {}, 8),
        ("dummy_root_same_name", {"categories merged with the one below of the same name": 1}, {}, 8),
    ],
)
def test_inputs_that_were_once_refused_or_lost(
    fault_data: Path, tmp_path: Path, name: str, repaired: dict[str, int], left_out: dict[str, int], instances: int
) -> None:
    manifest, told = pack_fault(fault_data, name, tmp_path / "set")
    assert counted(manifest, "repaired") == repaired
    assert counted(manifest, "left_out") == left_out
    assert sum(manifest.source["label_report"]["classes"].values()) == instances
    assert told[-1].endswith("; faults: none")
    for reason, count in repaired.items():
        assert any(f"{count} {reason}" in line for line in told[-1:])


def test_a_set_of_crowds_alone_is_asked_about(fault_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 12 annotations are crowds.* pass --crowds objects, else --crowds keep"):
        pack_fault(fault_data, "all_crowd", tmp_path / "set")
    manifest, told = pack_fault(fault_data, "all_crowd", tmp_path / "keep", crowds="keep")
    assert sum(manifest.source["label_report"]["crowds"].values()) == 12
    assert ", 12 crowds; faults: none" in told[-1]
    manifest, told = pack_fault(fault_data, "all_crowd", tmp_path / "objects", crowds="objects")
    assert counted(manifest, "repaired") == {"crowds taken for objects": 12}
    assert not any(a["iscrowd"] for sample in samples(tmp_path / "objects") for a in sample["annotations"])
    manifest, told = pack_fault(fault_data, "all_crowd", tmp_path / "skip", on_error="skip")
    assert any(line.startswith("  packed all the same: ") for line in told)


def test_a_class_of_crowds_alone_is_asked_about(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    tree["annotations"].append(tree["annotations"][0] | {"id": 2, "category_id": 44, "iscrowd": "1"})
    with pytest.raises(DataError, match="all 1 annotations of 'bottle' are crowds"):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    tree["annotations"].append(tree["annotations"][0] | {"id": 3, "category_id": 44, "iscrowd": "0"})
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    assert manifest.source["label_report"]["crowds"] == {"bottle": 1}


def test_val_that_lacks_a_class_takes_those_of_train(fault_data: Path, tmp_path: Path) -> None:
    train, _ = pack_fault(fault_data, "coco_nobbox", tmp_path / "train")
    plain, _ = pack_fault(fault_data, "val_lacks_a_class", tmp_path / "plain")
    val, told = pack_fault(
        fault_data, "val_lacks_a_class", tmp_path / "val", classes=read_classes(str(tmp_path / "train"))
    )
    assert plain.classes != train.classes == val.classes
    assert train.category_ids == val.category_ids
    assert "  classes without any: blue" in told


def test_classes_are_met_by_name_whatever_their_order(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    tree["annotations"].append(tree["annotations"][0] | {"id": 2, "category_id": 44})
    file = write_coco(folder, tree)
    pack_coco(folder / "images", file, folder / "set", classes=["cup", "bottle", "dog"])
    assert [a["class"] for a in samples(folder / "set")[0]["annotations"]] == [2, 1]
    assert read_manifest(folder / "set").category_ids == [1, 44, 18]
    with pytest.raises(DataError, match=r"category 'bottle' \(1 annotations\) is none of the 1 classes; add it"):
        pack_coco(folder / "images", file, folder / "dogs", classes=["dog"])
    manifest = pack_coco(folder / "images", file, folder / "dogs", classes=["dog"], on_error="skip")
    assert [a["class"] for a in samples(folder / "dogs")[0]["annotations"]] == [0]
    assert counted(manifest, "left_out")["annotations of categories that are no class"] == 1


def test_unannotated_categories_above_others_are_no_classes(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    tree["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 18, "name": "dog", "supercategory": "pets"},
        {"id": 44, "name": "dog", "supercategory": "pets"},
        {"id": 45, "name": "person", "supercategory": "person"},
    ]
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    assert manifest.classes == ["dog", "person"]
    (noted,) = manifest.source["label_report"]["left_out"].values()
    assert noted == {"count": 2, "first": ["'pets' (id 0)", "'dog' (id 44)"]}
    tree["annotations"].append(tree["annotations"][0] | {"id": 2, "category_id": 44})
    with pytest.raises(DataError, match="class 'dog' is listed twice"):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "other")


@pytest.mark.parametrize(
    "segmentation",
    [
        [2, 3, 12, 3, 12, 11, 2, 11],
        [[2, 3], [12, 3], [12, 11], [2, 11]],
        [[[2, 3], [12, 3], [12, 11], [2, 11]]],
        [["2", "3", "12", "3", "12", "11", "2", "11.0"]],
        [[2, 3, 12, 3, 12, 11, 2, 11], [5, 5, 6, 6], []],
        "rle",
        "list of rle",
        "strings",
    ],
)
def test_masks_in_every_form_that_means_one_thing(coco: Coco, write_coco: Write, segmentation: Any) -> None:
    folder, tree = coco
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[3:11, 2:12] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    text = {"size": [30, 40], "counts": rle["counts"].decode()}
    forms = {"rle": text, "list of rle": [text, text], "strings": {"size": ["30", "40"], "counts": text["counts"]}}
    tree["annotations"][0]["segmentation"] = forms.get(str(segmentation), segmentation)
    del tree["annotations"][0]["bbox"]
    pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    (found,) = samples(folder / "set")[0]["annotations"]
    assert np.array_equal(coco_mask.decode(found["segmentation"]), mask)
    assert found["bbox"] == [2, 3, 10, 8]


@pytest.mark.parametrize(
    "segmentation", [None, [], [[]], {}, "", float("nan"), [[1, 2, 3, 4]], {"counts": [], "size": []}]
)
def test_no_mask_in_every_form(coco: Coco, write_coco: Write, segmentation: Any) -> None:
    folder, tree = coco
    tree["annotations"][0]["segmentation"] = segmentation
    told: list[str] = []
    pack_coco(folder / "images", write_coco(folder, tree), folder / "set", say=told.append)
    assert samples(folder / "set")[0]["annotations"][0]["segmentation"] is None
    assert "  note: no annotation has a mask; to train boxes alone: --set model.head.masks=false" in told
    del tree["annotations"][0]["bbox"]
    with pytest.raises(DataError, match="neither bbox nor segmentation"):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "other")


def test_values_and_ids_that_mean_one_thing(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    expected = samples_of(folder, write_coco(folder, tree), "plain")
    image, box = tree["images"][0], tree["annotations"][0]
    image |= {"id": "7", "width": 40.0, "height": "30"}
    box |= {
        "id": "1",
        "image_id": "7",
        "category_id": 18.0,
        "bbox": ["2", "3.0", 10, "8"],
        "area": "80",
        "iscrowd": False,
    }
    assert samples_of(folder, write_coco(folder, tree), "strings") == expected
    # Sizes and ids that are absent.
    del tree["images"][1]["width"], tree["images"][1]["id"], box["id"]
    tree["images"][1]["height"] = None
    found = samples_of(folder, write_coco(folder, tree), "absent")
    assert [(s["file_name"], s["height"], s["width"]) for s in found] == [("a.png", 30, 40), ("b.png", 30, 40)]
    assert found[0]["annotations"][0]["bbox"] == [2, 3, 10, 8]


def samples_of(folder: Path, file: Path, name: str) -> list[dict[str, Any]]:
    pack_coco(folder / "images", file, folder / name)
    return samples(folder / name)


@pytest.mark.parametrize(
    "name",
    [
        "{images}/sub/a b.png",
        "C:\\photos\\sub\\a b.png",
        "/elsewhere/images/sub/a b.png",
        "../images/sub/a b.png",
        "sub\\a b.png",
        "sub/a%20b.png",
        "a%20b.png",
        "a b.png",
        "sub/A B.PNG",
    ],
)
def test_images_are_found_by_what_other_systems_call_them(coco: Coco, write_coco: Write, name: str) -> None:
    folder, tree = coco
    (folder / "images" / "sub").mkdir()
    shutil.copy(folder / "images" / "a.png", folder / "images" / "sub" / "a b.png")
    tree["images"][0]["file_name"] = name.replace("{images}", str(folder / "images"))
    file = write_coco(folder, tree)
    assert samples_of(folder, file, "set")[0]["file_name"] == "sub/a b.png"
    (folder / "images" / "more").mkdir()
    shutil.copy(folder / "images" / "a.png", folder / "images" / "more" / "a b.png")
    if "sub" not in name or "A B" in name:
        with pytest.raises(DataError, match=r"could both be .*; list the path below --images"):
            pack_coco(folder / "images", file, folder / "two")


def test_no_image_is_found_outside_the_folder_nor_twice(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    shutil.copy(folder / "images" / "a.png", folder / "c.png")
    for name in ("../c.png", str(folder / "c.png"), "images/../../c.png"):
        tree["images"][0]["file_name"] = name
        with pytest.raises(DataError, match=r"images/c\.png: no such file"):
            pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    for number, name in enumerate(("cam1/a.png", "cam2/a.png")):
        tree["images"][number]["file_name"] = name
    with pytest.raises(DataError, match=r"'cam2/a\.png' and 'cam1/a\.png' both come down to .*a\.png"):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "set")


def test_names_of_thousands_of_folders_take_no_time(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    tree["images"][0]["file_name"] = "a/" * 30_000 + "c.png"
    with pytest.raises(DataError, match=r"images/c\.png: no such file") as caught:
        pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    assert len(str(caught.value)) < 700


def boxes(tree: dict[str, Any], made: list[list[float]]) -> None:
    base = tree["annotations"][0] | {"segmentation": None}
    tree["annotations"] = [base | {"id": number, "bbox": box} for number, box in enumerate(made)]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([[0.1, 0.2, 0.3, 0.01 * n + 0.1] for n in range(10)], "all 10 boxes have numbers below 1, as shares"),
        ([[5, 5, 30, 28], [20, 15, 38, 29], [10, 2, 35, 30]], r"all 3 fit when read as \[left, top, right, bottom\]"),
        # Each a fault by itself, too: the cause comes first, and is not counted beside them.
        ([[24, 20, 36, 28]] * 3, r"^[^(]*all 3 fit when read as \[left.* \(3 faults in all: 3 wrong boxes\)$"),
        ([[10, 10, 20, 10]] * 6 + [[30, 20, 14, 8]] * 4, "4 of 10 boxes reach out of their images: another version"),
    ],
)
def test_boxes_in_another_unit_form_or_image_are_asked_about(
    coco: Coco, write_coco: Write, made: list[list[float]], message: str
) -> None:
    folder, tree = coco
    boxes(tree, made)
    with pytest.raises(DataError, match=message):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    pack_coco(folder / "images", write_coco(folder, tree), folder / "set", on_error="skip")


def test_boxes_that_reach_out_are_clipped_and_counted(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    boxes(tree, [[-5, 10, 20, 10], [30, 20, 15, 12], [2, 3, 10, 8], [39.5, 3, 1, 8]])
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set")
    found = [a["bbox"] for a in samples(folder / "set")[0]["annotations"]]
    assert found == [[0, 10, 15, 10], [30, 20, 10, 10], [2, 3, 10, 8], [39.5, 3, 0.5, 8]]
    # What is within a pixel is rounding.
    assert counted(manifest, "repaired") == {"clipped": 2}


def test_faulty_annotations_and_images_are_left_out_on_request(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    base = tree["annotations"][0]
    tree["annotations"] += [base | {"id": 2, "bbox": "x"}, base | {"id": 1}, base | {"id": 3, "image_id": 9}, 7]
    tree["images"] += [{"id": 11, "file_name": "absent.png"}, "x"]
    tree["images"][1]["width"] = 41
    manifest = pack_coco(folder / "images", write_coco(folder, tree), folder / "set", on_error="skip")
    assert (manifest.samples, len(samples(folder / "set")[0]["annotations"])) == (1, 1)
    kinds = {"wrong boxes": 1, "unreadable or malformed": 3, "missing files": 1, "size mismatches": 1}
    assert counted(manifest, "left_out") == kinds
    assert len(manifest.source["skipped"]) == 6


def test_a_set_of_which_nothing_is_left_says_why(coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    for image in tree["images"]:
        image["width"] = 41
    with pytest.raises(DataError, match=r"all of it was left out, the first: .*a\.png: image 7 is 40x30"):
        pack_coco(folder / "images", write_coco(folder, tree), folder / "set", on_error="skip")
    assert not (folder / "set").exists()


def test_lists_of_predictions_are_named(coco: Coco, write_coco: Write) -> None:
    folder, _ = coco
    file = write_coco(folder, [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}])
    with pytest.raises(DataError, match=r"COCO results \(predictions\); expected a COCO file"):
        pack_coco(folder / "images", file, folder / "set")


# Other formats.

VOC = "<annotation><filename>a.jpg</filename></annotation>"
YOLO = "0 0.5 0.5 0.2 0.3\n1 0.1 0.2 0.05 0.1\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xml", VOC, r"Pascal VOC \(XML\).*from_pascal_voc\(\.\.\.\)\.as_coco"),
        ("a.txt", YOLO, r"labels of YOLO.*from_yolo\(\.\.\.\)\.as_coco"),
        ("data.yaml", "train: images\nnc: 2\nnames: [a, b]\n", r"data\.yaml of YOLO"),
    ],
)
@pytest.mark.parametrize(
    ("packer", "folder"),
    [(packer, folder) for packer in ("coco", "panoptic", "bdd100k") for folder in (False, True)]
    + [("semantic", True), ("imagefolder", True), ("video", False)],
)
def test_labels_of_voc_and_yolo_are_named_and_the_way_shown(
    tmp_path: Path, name: str, text: str, message: str, packer: str, folder: bool
) -> None:
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / name).write_text(text)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images" / "a.jpg")
    given = str(tmp_path / "labels") if folder else str(tmp_path / "labels" / "train" / name)
    words = {
        "coco": ["coco", "--annotations", given],
        "panoptic": ["panoptic", "--annotations", given, "--masks", str(tmp_path)],
        "bdd100k": ["bdd100k", "--labels", given],
        "semantic": ["semantic", "--labels", given, "--classes", "a,b"],
        "imagefolder": ["imagefolder"],
        "video": ["video", "--list", given],
    }[packer]
    if packer != "video":
        words += ["--images", str(tmp_path / "labels" if packer == "imagefolder" else tmp_path / "images")]
    done = CliRunner().invoke(app, ["shards", "pack", *words, "--out", str(tmp_path / "set")])
    assert isinstance(done.exception, DataError), done.output
    assert done.exception.exit_code == 3
    with pytest.raises(DataError, match=message):
        raise done.exception


# Class lists.


@pytest.mark.parametrize(("name", "text"), [("a.xml", VOC), ("data.yaml", "names: [a, b]")])
def test_files_that_are_no_class_lists(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"Pascal VOC|data\.yaml of YOLO"):
        read_classes(str(tmp_path / name))


def test_class_lists(tmp_path: Path, coco: Coco, write_coco: Write) -> None:
    folder, tree = coco
    pack_coco(folder / "images", write_coco(folder, tree), folder / "train")
    assert read_classes(str(folder / "train")) == ["dog", "bottle"]
    (tmp_path / "voc.names").write_text("aeroplane\nbicycle\n")
    assert read_classes(str(tmp_path / "voc.names")) == ["aeroplane", "bicycle"]
    assert read_classes("dog, cat") == ["dog", "cat"]
    assert read_classes("dog") == ["dog"]
    for missing in ("names.txt", f"{tmp_path}/nowhere", "sub/train"):
        with pytest.raises(ConfigError, match="no such file or folder"):
            read_classes(missing)
    with pytest.raises(ConfigError, match="no packed data set"):
        read_classes(str(folder / "images"))
    with pytest.raises(DataError, match="'dog' is listed twice"):
        read_classes("dog,dog")


# The same in the other formats of boxes and segments.


def street(tmp_path: Path, labels: list[dict[str, Any]]) -> tuple[list[Path], Path]:
    (tmp_path / "images").mkdir(exist_ok=True)
    Image.new("RGB", (100, 60)).save(tmp_path / "images" / "a b.jpg")
    (tmp_path / "det.json").write_text(json.dumps([{"name": "train\\a%20b.jpg", "labels": labels}]))
    return [tmp_path / "images"], tmp_path / "det.json"


def car(**changes: Any) -> dict[str, Any]:
    return {"id": 1, "category": "car", "box2d": {"x1": 10, "y1": 10, "x2": 20, "y2": 20}} | changes


def test_bdd100k_boxes_names_and_classes(tmp_path: Path) -> None:
    out_of = car(box2d={"x1": "-5", "y1": 10, "x2": 20, "y2": 20.0}, attributes={"crowd": "0"})
    images, labels = street(tmp_path, [car(), out_of, car(category="person"), car(category="trailer")])
    told: list[str] = []
    manifest = pack_bdd100k(images, labels, tmp_path / "set", say=told.append)
    found = samples(tmp_path / "set")[0]["annotations"]
    assert [(a["bbox"], a["iscrowd"]) for a in found[:2]] == [([10, 10, 11, 11], 0), ([0, 10, 21, 11], 0)]
    assert counted(manifest, "repaired") == {"read from strings": 1, "clipped": 1}
    assert manifest.source["label_report"]["crowds"] == {"truck": 1}
    with pytest.raises(DataError, match=r"category 'truck' \(1 labels\) is none of the 2 classes"):
        pack_bdd100k(images, labels, tmp_path / "two", classes=["pedestrian", "car"])
    manifest = pack_bdd100k(images, labels, tmp_path / "two", classes=["pedestrian", "car"], on_error="skip")
    assert [a["class"] for a in samples(tmp_path / "two")[0]["annotations"]] == [1, 1, 0]
    assert manifest.category_ids == [1, 3]


def test_bdd100k_masks_take_classes_by_name(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (4, 1)).save(tmp_path / "images" / "a.jpg")
    Image.fromarray(np.array([[0, 10, 13, 255]], np.uint8)).save(tmp_path / "masks" / "a.png")
    images, options = [tmp_path / "images"], {"task": "semantic", "classes": ["car", "road"]}
    with pytest.raises(DataError, match="class 'sky' is none of the classes; add it to --classes"):
        pack_bdd100k(images, tmp_path / "masks", tmp_path / "set", **options)  # type: ignore[arg-type]
    manifest = pack_bdd100k(images, tmp_path / "masks", tmp_path / "set", on_error="skip", **options)  # type: ignore
    raw = ShardReader(tmp_path / "set", manifest).read(0)
    assert decode_label(raw.members["label.png"], "x").tolist() == [[1, 255, 0, 255]]


def test_panoptic_names_sizes_ids_and_classes(tmp_path: Path) -> None:
    for name in ("images", "panoptic"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (3, 1)).save(tmp_path / "images" / "a b.jpg")
    Image.fromarray(np.array([[[7, 0, 0], [8, 0, 0], [9, 0, 0]]], np.uint8)).save(tmp_path / "panoptic" / "a b.png")
    segments = [
        {"id": "7", "category_id": "3", "iscrowd": "0"},
        {"id": 8, "category_id": 5, "iscrowd": 1},
        {"id": 9, "category_id": 3},
    ]
    names = [(1, "pets", "none"), (3, "dog", "pets"), (5, "grass", "ground")]
    tree = {
        "images": [{"id": "x1", "file_name": "photos\\a%20b.jpg", "width": "3", "height": 1}],
        "annotations": [{"image_id": "x1", "segments_info": segments}],
        "categories": [{"id": i, "name": n, "supercategory": s, "isthing": i == 3} for i, n, s in names],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(tree))
    told: list[str] = []
    manifest = pack_panoptic(tmp_path / "images", tmp_path / "panoptic.json", tmp_path / "set", say=told.append)
    assert manifest.classes == ["dog", "grass"]
    (sample,) = samples(tmp_path / "set")
    assert [(s["class"], s["isthing"], s["iscrowd"]) for s in sample["segments"]] == [(0, 1, 0), (1, 0, 1), (0, 1, 0)]
    assert told[-1].endswith("1 left out, 0 passed over, 1 crowds; faults: none")
    folders = tmp_path / "images", tmp_path / "panoptic.json"
    with pytest.raises(DataError, match=r"category 'grass' \(1 segments\) is none of the 1 classes"):
        pack_panoptic(*folders, tmp_path / "dogs", classes=["dog"])
    manifest = pack_panoptic(*folders, tmp_path / "dogs", classes=["dog"], on_error="skip")
    report = manifest.source["label_report"]
    assert (report["classes"], report["unlabelled"]) == ({"dog": 2}, 1)
    assert [s["id"] for s in samples(tmp_path / "dogs")[0]["segments"]] == [7, 9]


def test_a_val_folder_that_lacks_a_class_takes_those_of_the_packed_train_set(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "train/eel", "val/cat", "val/eel"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(tmp_path / name / "a.png")
    words = ["shards", "pack", "imagefolder", "--images"]
    for split, more in (("train", []), ("val", ["--classes", str(tmp_path / "data" / "train")])):
        out = ["--out", str(tmp_path / "data" / split)]
        done = CliRunner().invoke(app, [*words, str(tmp_path / split), *out, *more])
        assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "data" / "val").classes == ["cat", "dog", "eel"]
    assert [sample["label"] for sample in samples(tmp_path / "data" / "val")] == [0, 2]
