"""Exports as people move, merge and mix them up: found where one thing is meant, else refused with what helps."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack.bdd100k import pack_bdd100k
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.pack.imagefolder import pack_imagefolder
from vitgraft.data_shards.pack.panoptic import pack_panoptic
from vitgraft.data_shards.pack.semantic import pack_semantic
from vitgraft.data_shards.pack.video import pack_video
from vitgraft.launch.cli import app

Coco = tuple[Path, dict[str, Any]]
COMPOSED = "caf\u00e9"
APART = unicodedata.normalize("NFD", COMPOSED)


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(path)
    return path


def label_map(path: Path, value: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40) % 2 * value).save(path)


def pack(coco: Coco, out: str = "set", **options: Any) -> None:
    folder, tree = coco
    (folder / "labels.json").write_text(json.dumps(tree))
    pack_coco(folder / "images", folder / "labels.json", folder / out, **options)


def test_names_of_a_mac_are_found_by_every_packer(coco: Coco, tmp_path: Path) -> None:
    folder, tree = coco
    (folder / "images" / "a.png").rename(folder / "images" / f"{APART}.png")
    tree["images"][0]["file_name"] = f"{COMPOSED}.png"
    tree["categories"][0]["name"] = APART
    pack(coco, classes=["dog", COMPOSED])
    assert read_manifest(folder / "set").samples == 2

    photo(tmp_path / "photos" / f"{APART}.jpg")
    label_map(tmp_path / "maps" / f"{COMPOSED}.png")
    pack_semantic(tmp_path / "photos", tmp_path / "maps", tmp_path / "semantic", ["ground", "object"])
    assert read_manifest(tmp_path / "semantic").samples == 1

    box = {"category": "car", "box2d": {"x1": 1, "y1": 1, "x2": 9, "y2": 9}}
    (tmp_path / "det.json").write_text(json.dumps([{"name": f"{COMPOSED}.jpg", "labels": [box]}]))
    pack_bdd100k([tmp_path / "photos"], tmp_path / "det.json", tmp_path / "boxes")
    assert read_manifest(tmp_path / "boxes").samples == 1

    photo(tmp_path / "classes" / APART / "x.jpg")
    pack_imagefolder(tmp_path / "classes", tmp_path / "classified", classes=[COMPOSED])
    assert read_manifest(tmp_path / "classified").samples == 1


def test_files_of_the_other_coco_format_are_named(coco: Coco) -> None:
    folder, tree = coco
    (folder / "labels.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"COCO instances, not COCO panoptic: vitgraft shards pack coco$"):
        pack_panoptic(folder / "images", folder / "labels.json", folder / "set", masks=folder / "labels")
    tree["annotations"] = [{"image_id": 7, "file_name": "a.png", "segments_info": []}]
    with pytest.raises(DataError, match=r"COCO panoptic, not COCO instances: vitgraft shards pack panoptic$"):
        pack(coco)
    with pytest.raises(DataError, match=r"no such folder; --masks names that of the panoptic PNGs"):
        pack_panoptic(folder / "images", folder / "labels.json", folder / "set", masks=folder / "labels")


def test_an_image_with_two_entries_is_a_fault(coco: Coco) -> None:
    coco[1]["images"][1]["file_name"] = "a.png"
    with pytest.raises(DataError, match=r"image 9: 'a.png' is listed before; make one entry of both"):
        pack(coco)


@pytest.mark.parametrize(
    ("name", "message"), [(None, "no class names, or an empty one"), (" dog ", "class 'dog' is listed twice")]
)
def test_names_that_name_no_class_of_their_own(coco: Coco, name: str | None, message: str) -> None:
    coco[1]["categories"][0]["name"] = name
    with pytest.raises(DataError, match=message):
        pack(coco)


def test_a_few_boxes_as_shares_of_the_image_are_enough_for_a_doubt(coco: Coco) -> None:
    box = {"image_id": 7, "category_id": 18, "bbox": [0.1, 0.2, 0.5, 0.5]}
    coco[1]["annotations"] = [{"id": number, **box} for number in range(3)]
    with pytest.raises(DataError, match="all 3 boxes have numbers below 1, as shares of the image"):
        pack(coco)


def street(tmp_path: Path, labels: list[dict[str, Any]]) -> tuple[list[Path], Path]:
    photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "det.json").write_text(json.dumps([{"name": "a.jpg", "labels": labels}]))
    return [tmp_path / "photos"], tmp_path / "det.json"


def test_bdd100k_with_nothing_to_learn_from_is_a_fault(tmp_path: Path) -> None:
    box = {"category": "car", "box2d": {"x1": 1, "y1": 1, "x2": 9, "y2": 9}, "attributes": {"crowd": True}}
    with pytest.raises(DataError, match="all 1 labels are crowds, from which nothing is learnt; remove the attribute"):
        pack_bdd100k(*street(tmp_path, [box]), tmp_path / "set")
    with pytest.raises(DataError, match="no label with a box2d, so there is nothing to learn"):
        pack_bdd100k(*street(tmp_path, []), tmp_path / "set")
    manifest = pack_bdd100k(*street(tmp_path, []), tmp_path / "set", on_error="skip")
    assert len(manifest.source["label_report"]["accepted"]) == 1


def test_remedies_name_only_options_that_the_command_has(tmp_path: Path) -> None:
    photo(tmp_path / "photos" / "a.jpg")
    label_map(tmp_path / "maps" / "a.png", value=7)
    with pytest.raises(DataError, match="label id 7 is none of the 3 classes") as caught:
        pack_bdd100k([tmp_path / "photos"], tmp_path / "maps", tmp_path / "set", task="drivable")
    assert "--ids" not in str(caught.value)
    assert "--ignore" not in str(caught.value)


def test_label_maps_with_a_longer_end_ask_for_it(tmp_path: Path) -> None:
    photo(tmp_path / "photos" / "a.jpg")
    label_map(tmp_path / "maps" / "a_mask.png")
    with pytest.raises(DataError, match=r"no image a_mask in .*; see --label-suffix, such as _mask.png"):
        pack_semantic(tmp_path / "photos", tmp_path / "maps", tmp_path / "set", ["ground", "object"])


def test_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            photo(tmp_path / "pets" / split / name / "x.jpg")
    with pytest.raises(DataError, match=r"folders train, val are splits of a data set, not classes; .*pets/train$"):
        pack_imagefolder(tmp_path / "pets", tmp_path / "set")
    pack_imagefolder(tmp_path / "pets" / "train", tmp_path / "set")
    assert read_manifest(tmp_path / "set").classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "lines",
    [
        ["path,label", "run/a b.MP4,run", "walk/c.mp4,walk"],
        ['"run/a b.MP4","run"', '"walk/c.mp4","walk"'],
        ["run\\a b.MP4,run", "C:\\clips\\walk\\c.mp4,walk"],
        ["run/a%20b.mp4,run", "walk/C.MP4,walk"],
    ],
    ids=["header", "quotes", "backslashes", "capitals"],
)
def test_lists_of_videos_as_tables_and_windows_write_them(test_data: Path, tmp_path: Path, lines: list[str]) -> None:
    clip = (test_data / "video_clips" / "mmaction2" / "demo.mp4").read_bytes()
    for name in ("run/a b.MP4", "walk/c.mp4"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True)
        (tmp_path / "clips" / name).write_bytes(clip)
    (tmp_path / "list.csv").write_text("\n".join(lines))
    manifest = pack_video(tmp_path / "list.csv", tmp_path / "set", root=tmp_path / "clips")
    assert (manifest.classes, manifest.samples) == (["run", "walk"], 2)


def test_splits_of_videos_are_no_classes(test_data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / "clips" / split / "run"
        folder.mkdir(parents=True)
        (folder / "a.mp4").write_bytes((test_data / "video_clips" / "mmaction2" / "demo.mp4").read_bytes())
    with pytest.raises(DataError, match=r"folders train, val are splits of a data set, not classes; .*clips/train$"):
        pack_video(tmp_path / "clips", tmp_path / "set")


def test_tars_without_any_annotation_are_a_fault(tmp_path: Path) -> None:
    image = photo(tmp_path / "a.jpg").read_bytes()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name, data in (("a.jpg", image), ("a.json", b'{"annotations": []}')):
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            tar.addfile(facts, io.BytesIO(data))
    words = ["shards", "index", str(tmp_path / "tars"), "--kind", "detection", "--classes", "cat"]
    assert "no annotations, so there is nothing to learn" in str(CliRunner().invoke(app, words).exception)
    assert CliRunner().invoke(app, [*words, "--on-error", "skip"]).exit_code == 0


def test_masks_of_two_tools_are_doubted(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 255), ("c", 1)):
        photo(tmp_path / "photos" / f"{name}.jpg")
        label_map(tmp_path / "maps" / f"{name}.png", value)
    given = tmp_path / "photos", tmp_path / "maps", tmp_path / "set", ["ground", "object"]
    with pytest.raises(DataError, match="1 label maps hold 255, which is ignored, and never 1, and 2 hold 1"):
        pack_semantic(*given)
    assert pack_semantic(*given, ignore=[255]).samples == 3
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40) % 2).save(tmp_path / "maps" / "b.png")
    maps = np.arange(1200).reshape(30, 40) % 3
    Image.fromarray(np.where(maps == 2, 255, maps).astype(np.uint8)).save(tmp_path / "maps" / "c.png")
    assert pack_semantic(*given, overwrite=True).samples == 3
