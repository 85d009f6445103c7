"""COCO panoptic: every pixel's class is its segment's, void is 255, and PNG and JSON name the same segments."""

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

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import decode_label
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack.panoptic import pack_panoptic, segment_ids
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import RawSample, ShardReader


def raws(folder: Path) -> list[RawSample]:
    reader = ShardReader(folder, read_manifest(folder))
    return [reader.read(i) for i in range(len(reader))]


def test_real_segments(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "coco_panoptic_sample"
    told: list[str] = []
    file = root / "panoptic_examples.json"
    manifest = pack_panoptic(root / "input_images", file, tmp_path / "set", say=told.append)
    tree = json.loads(file.read_text())
    categories = sorted(tree["categories"], key=lambda category: category["id"])
    assert (manifest.kind, manifest.samples) == ("semantic", 2)
    assert manifest.classes == [category["name"] for category in categories]
    assert len(manifest.classes) == 133
    number_of = {category["id"]: number for number, category in enumerate(categories)}
    # The same segments as run lengths, from panopticapi's own converter.
    detections = json.loads((root / "panoptic_coco_detection_format.json").read_text())["annotations"]
    areas = np.zeros(133, dtype=np.int64)
    voids, lengths = [], []
    for raw in raws(tmp_path / "set"):
        metadata = json.loads(raw.members["json"])
        packed = decode_label(raw.members["label.png"], "x").numpy()
        seen = np.full(packed.shape, 255)
        for item in detections:
            if item["image_id"] == metadata["image_id"]:
                seen[coco_mask.decode(item["segmentation"]) > 0] = number_of[item["category_id"]]
        assert np.array_equal(packed, seen)
        voids.append(int((packed == 255).sum()))
        # Pixel for pixel from the two-channel form: R is the category.
        channels = Image.open(root / "panoptic_examples_2ch_format" / f"{Path(metadata['file_name']).stem}.png")
        category = np.asarray(channels)[..., 0]
        assert np.array_equal(np.vectorize(lambda c: number_of.get(c, 255))(category), packed)
        stored = raw.members["panoptic.png"]
        assert stored == (root / "panoptic_examples" / f"{Path(metadata['file_name']).stem}.png").read_bytes()
        (annotation,) = (a for a in tree["annotations"] if a["image_id"] == metadata["image_id"])
        lengths.append(len(metadata["segments"]))
        for found, given in zip(metadata["segments"], annotation["segments_info"], strict=True):
            assert (found["id"], found["iscrowd"]) == (given["id"], given["iscrowd"])
            assert found["class"] == number_of[given["category_id"]]
            assert found["isthing"] == categories[found["class"]]["isthing"]
            areas[found["class"]] += given["area"]
    assert sorted(voids) == [2712, 7189]
    assert sorted(lengths) == [18, 32]
    report = manifest.source["label_report"]
    assert list(report["classes"].values()) == areas.tolist()
    assert report["unlabelled"] == 2712 + 7189
    assert told[0] == f"labels: 2 samples, {areas.sum():,} pixels, 9,901 pixels without label"
    assert verify(tmp_path / "set").ok
    assert inspect(tmp_path / "set", draw=1, out=tmp_path / "pictures").pictures[0].is_file()


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """images/a.jpg of 4x3 pixels; panoptic/a.png with segments 7 (thing), 70000 (stuff) and void; its JSON's tree."""
    for name in ("images", "panoptic"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images" / "a.jpg")
    ids = np.array([[7, 7, 0, 0], [7, 70000, 70000, 0], [70000] * 4])
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)).save(
        tmp_path / "panoptic" / "a.png"
    )
    segments = [{"id": 70000, "category_id": 200, "iscrowd": 0}, {"id": 7, "category_id": 3, "iscrowd": 1}]
    categories = [{"id": 200, "name": "grass", "isthing": 0}, {"id": 3, "name": "dog", "isthing": 1}]
    return tmp_path, {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 3}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": categories,
    }


def pack(folder: Path, tree: Any) -> None:
    (folder / "panoptic.json").write_text(json.dumps(tree))
    pack_panoptic(folder / "images", folder / "panoptic.json", folder / "set")


def test_ids_of_three_channels_and_void(scene: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = scene
    pack(folder, tree)
    (raw,) = raws(folder / "set")
    expected = [[0, 0, 255, 255], [0, 1, 1, 255], [1] * 4]
    assert decode_label(raw.members["label.png"], "x").tolist() == expected
    assert json.loads(raw.members["json"])["segments"][1] == {"id": 7, "class": 0, "isthing": 1, "iscrowd": 1}


def test_masks_may_lie_elsewhere_and_images_without_annotation_are_left_out(
    scene: tuple[Path, dict[str, Any]],
) -> None:
    folder, tree = scene
    shutil.move(folder / "panoptic", folder / "masks")
    tree["images"].append({"id": 2, "file_name": "b.jpg", "width": 4, "height": 3})
    with pytest.raises(DataError, match="panoptic: no such folder"):
        pack(folder, tree)
    file = folder / "panoptic.json"
    manifest = pack_panoptic(folder / "images", file, folder / "set", masks=folder / "masks")
    assert manifest.samples == 1
    assert manifest.source["label_report"]["left_out"]["images without annotation"]["first"] == ["b.jpg"]


def change(key: str, value: Any, where: str = "annotations") -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree[where][0].update({key: value})


def segment(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["annotations"][0]["segments_info"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (segment(id=8), r"a\.png: segment 8 is in the JSON and not in the PNG \(2 such segments\)"),
        (lambda t: t["annotations"][0]["segments_info"].pop(), r"a\.png: segment 7 is in the PNG and not in the JSON"),
        (segment(id=7), "image 1: segment id 7; expected distinct"),
        (segment(id=0), "image 1: segment id 0"),
        (segment(id=1 << 24), "segment id 16777216"),
        (segment(id=[1]), "expected distinct integers"),
        (segment(category_id=4), "segment 70000: category_id 4 is not among"),
        (segment(category_id={}), "category_id .* is not among"),
        (change("segments_info", None), "segments_info None"),
        (change("segments_info", ["x"]), "segment id 0"),
        (change("image_id", 2), "image_id 2 is not among the images"),
        (change("image_id", [2]), r"image_id \[2\]; expected an id"),
        (change("file_name", "b.png"), r"b\.png: no such file.*--masks"),
        (change("file_name", "../images/b.png"), r"panoptic/b\.png: no such file"),
        (change("file_name", "/etc/passwd", "images"), "images/passwd: no such file"),
        (change("file_name", "b.jpg", "images"), r"b\.jpg: no such file.*--images"),
        (change("width", 5, "images"), r"a\.jpg: image 1 is 4x3 pixels .* says 5x3"),
        (lambda tree: tree["annotations"].append(tree["annotations"][0]), "image 1 has two annotations"),
        (lambda tree: tree["annotations"].append(3), "annotations: 3 at place 1; expected an object"),
        (lambda tree: tree.update(images=[]), "data set is empty"),
        (lambda tree: tree.update(annotations=[]), "data set is empty"),
        (lambda tree: tree.update(annotations={}), "no list 'annotations'"),
        (lambda tree: tree.pop("categories"), "no list 'categories'"),
    ],
)
def test_wrong_files_are_one_line_and_nothing_is_written(
    scene: tuple[Path, dict[str, Any]], edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder, tree = scene
    edit(tree)
    with pytest.raises(DataError, match=message) as caught:
        pack(folder, tree)
    assert "\n" not in str(caught.value)
    assert not (folder / "set").exists()


def test_pngs_of_another_size_or_broken(scene: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = scene
    whole = np.asarray(Image.open(folder / "panoptic" / "a.png"))
    Image.fromarray(whole[:, [0, 1, 2, 3, 3]]).save(folder / "panoptic" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 5x3 pixels, its image .* has 4x3"):
        pack(folder, tree)
    (folder / "panoptic" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.png: broken image"):
        pack(folder, tree)


def test_segment_ids_in_jpeg_are_refused_with_the_reason(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png", "JPEG")
    with pytest.raises(DataError, match=r"a\.png: label maps in JPEG or WebP are refused"):
        segment_ids(tmp_path / "a.png")
