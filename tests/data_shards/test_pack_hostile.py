"""Data sets made to do harm, and odd ones that are not: a packer answers with one line and writes nothing, or packs."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.images import decode_image, image_size
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.bdd100k import pack_bdd100k
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.pack.imagefolder import pack_arrays, pack_imagefolder
from vitgraft.data_shards.pack.panoptic import pack_panoptic
from vitgraft.data_shards.pack.semantic import pack_semantic
from vitgraft.data_shards.pack.video import pack_video
from vitgraft.data_shards.report import verify
from vitgraft.data_shards.stream import ShardReader
from vitgraft.launch.cli import app

Pack = Callable[..., Manifest]
LONG = "n" * 300
HALF = "\udce9"
"""Half a surrogate pair: in JSON an escape like any, on a disk a byte that is no UTF-8."""


def coco(folder: Path, name: str = "a.jpg", category: str = "dog", number: Any = 3) -> Manifest:
    image = {"id": 1, "file_name": name, "width": 4, "height": 3}
    box = {"id": 1, "image_id": 1, "category_id": number, "bbox": [0, 0, 2, 2], "area": -4}
    tree = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": category}]}
    write(folder / "coco.json", tree)
    return pack_coco(folder / "images", folder / "coco.json", folder / "set")


def bdd100k(folder: Path, name: str = "a.jpg", number: Any = 0) -> Manifest:
    box = {"id": "7", "category": "car", "box2d": {"x1": number, "y1": 0, "x2": 2, "y2": 2}}
    write(folder / "det.json", [{"name": name, "labels": [box]}])
    return pack_bdd100k([folder / "images"], folder / "det.json", folder / "set")


def panoptic(
    folder: Path, name: str = "a.jpg", mask: str = "a.png", category: str = "dog", number: Any = 3
) -> Manifest:
    image = {"id": 1, "file_name": name, "width": 4, "height": 3}
    segments = [{"id": 7, "category_id": number, "iscrowd": 0}]
    tree = {"images": [image], "annotations": [{"image_id": 1, "file_name": mask, "segments_info": segments}]}
    write(folder / "panoptic.json", tree | {"categories": [{"id": 3, "name": category, "isthing": 1}]})
    (folder / "panoptic").mkdir()
    Image.new("RGB", (4, 3), (7, 0, 0)).save(folder / "panoptic" / "a.png")
    return pack_panoptic(folder / "images", folder / "panoptic.json", folder / "set")


def semantic(folder: Path) -> Manifest:
    (folder / "labels").mkdir()
    Image.new("L", (4, 3)).save(folder / "labels" / "a.png")
    return pack_semantic(folder / "images", folder / "labels", folder / "set", ["x"])


def imagefolder(folder: Path) -> Manifest:
    (folder / "classes").mkdir()
    (folder / "images").rename(folder / "classes" / "cat")
    return pack_imagefolder(folder / "classes", folder / "set")


def write(path: Path, tree: Any) -> None:
    """JSON with numbers as they are written in strings like ``#123``."""
    path.write_text(json.dumps(tree).replace('"#', "").replace('#"', ""))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/a.jpg of 4x3 pixels."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images" / "a.jpg")
    return tmp_path


@pytest.mark.parametrize("pack", [coco, bdd100k, panoptic, semantic, imagefolder])
def test_jpegs_with_a_second_picture_are_packed_as_they_are(folder: Path, pack: Pack) -> None:
    """As phones write them, with a depth map or a preview behind the photograph: Pillow calls them MPO."""
    path = folder / "images" / "a.jpg"
    second = Image.new("RGB", (2, 2), (0, 0, 255))
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path, "MPO", save_all=True, append_images=[second])
    assert Image.open(path).format == "MPO"
    data = path.read_bytes()
    raw = ShardReader(folder / "set", pack(folder)).read(0)
    assert raw.members["jpg"] == data
    assert image_size(data, "x") == (3, 4)
    red, green, blue = decode_image(data, "x")
    assert (int(red.min()), int(green.max()), int(blue.max())) >= (250, 0, 0)
    assert int(blue.max()) < 5
    assert verify(folder / "set").ok


def test_an_area_below_nothing_is_that_of_the_box(folder: Path) -> None:
    raw = ShardReader(folder / "set", coco(folder)).read(0)
    assert json.loads(raw.members["json"])["annotations"][0]["area"] == 4


@pytest.mark.parametrize("pack", [coco, bdd100k, panoptic])
def test_numbers_of_any_length(folder: Path, pack: Pack) -> None:
    with pytest.raises(DataError, match=r"\.json: JSON with a number of more than 4300 digits"):
        pack(folder, number="#" + "9" * 5000 + "#")
    assert not (folder / "set").exists()


@pytest.mark.parametrize(
    ("pack", "names"), [(coco, {"name": LONG}), (panoptic, {"name": LONG}), (panoptic, {"mask": f"{LONG}.png"})]
)
def test_names_that_no_file_can_have(folder: Path, pack: Pack, names: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"n{200}: no such file"):
        pack(folder, **names)
    assert not (folder / "set").exists()


def test_videos_whose_name_no_file_can_have(test_data: Path, tmp_path: Path) -> None:
    clip = test_data / "video_clips" / "torchvision" / "R6llTwEh07w.mp4"
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "list.txt").write_text(f"a.mp4 x\n{LONG}.mp4 x\n")
    with pytest.raises(DataError, match=rf"list\.txt:2: {LONG}\.mp4: no such video"):
        pack_video(tmp_path / "list.txt", tmp_path / "set")
    manifest = pack_video(tmp_path / "list.txt", tmp_path / "set", on_error="skip")
    assert [f"{LONG}.mp4: no such video" in line for line in manifest.source["skipped"]] == [True]


@pytest.mark.parametrize("pack", [coco, panoptic])
def test_class_names_that_are_no_text(folder: Path, pack: Pack) -> None:
    with pytest.raises(DataError, match=r"\.json: class 'do\\udce9' holds what is no character") as caught:
        pack(folder, category=f"do{HALF}")
    assert str(caught.value).isprintable()
    assert not (folder / "set").exists()


def test_file_names_that_are_no_text(folder: Path) -> None:
    """They are packed: only manifests cannot hold them."""
    cat = folder / f"caf{HALF}" / "cat"
    cat.mkdir(parents=True)
    (folder / "images" / "a.jpg").rename(cat / f"a{HALF}.jpg")
    manifest = pack_imagefolder(cat.parent, folder / "set")
    assert manifest == read_manifest(folder / "set")
    assert manifest.source["images"] == str(folder / "caf?")
    raw = ShardReader(folder / "set", manifest).read(0)
    assert json.loads(raw.members["json"])["file_name"] == f"cat/a{HALF}.jpg"
    assert verify(folder / "set").ok


def test_many_class_names_in_one_argument(folder: Path) -> None:
    (folder / "labels").mkdir()
    Image.new("L", (4, 3)).save(folder / "labels" / "a.png")
    names = ",".join(f"class number {number}" for number in range(99))
    words = ["--images", folder / "images", "--labels", folder / "labels", "--classes", names, "--out", folder / "set"]
    done = CliRunner().invoke(app, ["shards", "pack", "semantic", *map(str, words)])
    assert "1 samples of 99 classes packed" in done.output, done.output


COMPRESSIONS = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


def archive(path: Path, compression: int) -> bytearray:
    """Images and labels that can be packed; its bytes."""
    random = np.random.RandomState(0)
    arrays = {"images": random.randint(0, 9, (4, 32, 32, 3)).astype(np.uint8), "labels": np.arange(4)}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.save(stream, array)
            target.writestr(f"{name}.npy", stream.getvalue())
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_damaged_arrays(tmp_path: Path, compression: str) -> None:
    """Wherever a byte is another: one line, or the arrays, as some bytes say nothing."""
    path = tmp_path / "a.npz"
    whole = archive(path, COMPRESSIONS[compression])
    answers = []
    for place in [*range(200), *range(200, len(whole), len(whole) // 200)]:
        data = whole.copy()
        data[place] ^= 0xA5
        path.write_bytes(data)
        try:
            pack_arrays(path, tmp_path / "set", overwrite=True)
        except DataError as error:
            answers.append(str(error))
    assert len(answers) > 100
    assert all(answer.startswith(str(path)) and len(answer.splitlines()) == 1 for answer in answers)


def test_encrypted_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    data = archive(path, zipfile.ZIP_DEFLATED)
    # The flag in the first file's two headers.
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as \.npz \(.*encrypted"):
        pack_arrays(path, tmp_path / "set")


def test_files_that_may_not_be_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"absent\.json: cannot be read: Permission denied"):
        pack_coco(folder / "images", folder / "absent.json", folder / "set")
