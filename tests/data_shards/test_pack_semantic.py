"""Label maps in every usual encoding come out as class ids, or as one line that says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.decode import decode_label
from vitgraft.data_shards.manifest import IGNORE
from vitgraft.data_shards.pack.semantic import pack_semantic
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import ShardReader
from vitgraft.launch.cli import app

CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """images/a.png and labels/a.png of 4x3 pixels with ids 0, 1 and 255."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((3, 4, 3), dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.array([[0, 0, 1, 1], [0, 1, 255, 1], [0, 0, 0, 0]], np.uint8)).save(
        tmp_path / "labels" / "a.png"
    )
    return tmp_path


def label_of(folder: Path, sample: int = 0) -> np.ndarray:
    from vitgraft.data_shards.manifest import read_manifest

    reader = ShardReader(folder, read_manifest(folder))
    return decode_label(reader.read(sample).members["label.png"], "x").numpy()


def test_camvid(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "camvid_mini"
    manifest = pack_semantic(root / "val", root / "valannot", tmp_path / "set", CAMVID, ignore=[11])
    assert (manifest.samples, manifest.classes) == (12, CAMVID)
    paths = sorted((root / "valannot").glob("*.png"))
    counts = np.zeros(256, dtype=np.int64)
    for number, path in enumerate(paths):
        theirs = np.asarray(Image.open(path))
        assert np.array_equal(label_of(tmp_path / "set", number), np.where(theirs == 11, IGNORE, theirs))
        counts += np.bincount(theirs.ravel(), minlength=256)
    assert verify(tmp_path / "set").ok
    report = inspect(tmp_path / "set", draw=1, out=tmp_path / "pictures")
    assert list(report.class_counts.values()) == counts[:11].tolist()
    assert report.unlabelled == counts[11]
    assert report.sizes == {(360, 480): 12}
    assert report.pictures[0].is_file()


def test_without_saying_what_is_ignored_the_id_is_named(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "camvid_mini"
    with pytest.raises(DataError, match=r"\.png: label id 11 is none of the 11 classes"):
        pack_semantic(root / "val", root / "valannot", tmp_path / "set", CAMVID)
    assert list(tmp_path.iterdir()) == []


def test_the_report_counts_pixels_and_every_fault(pair: Path) -> None:
    told: list[str] = []
    manifest = pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y", "z"], say=told.append)
    assert told[0] == "labels: 1 samples, 11 pixels, 1 pixels without label"
    assert told[-2:] == ["  classes without any: z", "  faults: none"]
    assert manifest.source["label_report"]["classes"] == {"x": 7, "y": 4, "z": 0}
    for name in ("b", "c"):
        Image.new("RGB", (5, 3)).save(pair / "images" / f"{name}.png")
    Image.new("L", (4, 3)).save(pair / "labels" / "b.png")
    Image.new("L", (5, 3), 9).save(pair / "labels" / "c.png")
    counted = r"b\.png: 4x3 .*\(2 faults in all: 1 size mismatches, 1 ids outside the class list\)"
    with pytest.raises(DataError, match=counted):
        pack_semantic(pair / "images", pair / "labels", pair / "other", ["x", "y", "z"])
    assert not (pair / "other").exists()


def test_palette_images_are_read_as_indices(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "seg_samples_small" / "palette_256x128"
    (tmp_path / "gts").mkdir()
    for image in (root / "imgs").iterdir():
        label = root / "gts" / image.name.replace("_img.jpg", "_gt.png")
        assert Image.open(label).mode == "P"
        (tmp_path / "gts" / f"{image.stem}.png").write_bytes(label.read_bytes())
    manifest = pack_semantic(root / "imgs", tmp_path / "gts", tmp_path / "set", ["a", "b", "c", "d"])
    assert manifest.samples == 5
    for number, path in enumerate(sorted((root / "gts").iterdir())):
        assert np.array_equal(label_of(tmp_path / "set", number), np.asarray(Image.open(path)))


def test_reduce_zero_as_for_ade20k(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "ade20k_sample"
    classes = [f"class{i}" for i in range(150)]
    pack_semantic(root / "images", root / "annotations", tmp_path / "set", classes, reduce_zero=True)
    for number, path in enumerate(sorted((root / "annotations").glob("*.png"))):
        theirs = np.asarray(Image.open(path)).astype(int)
        assert np.array_equal(label_of(tmp_path / "set", number), np.where(theirs == 0, 255, theirs - 1))


def test_sixteen_bit_label_maps(pair: Path) -> None:
    Image.fromarray(np.full((3, 4), 1, dtype=np.uint16)).save(pair / "labels" / "a.png")
    pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"])
    assert label_of(pair / "set").tolist() == [[1] * 4] * 3
    Image.fromarray(np.full((3, 4), 256, dtype=np.uint16)).save(pair / "labels" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: label id 256"):
        pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"], overwrite=True)


def test_255_is_always_ignored(pair: Path) -> None:
    pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"], ignore=[1])
    assert label_of(pair / "set").tolist() == [[0, 0, 255, 255], [0, 255, 255, 255], [0, 0, 0, 0]]


def test_several_ids_are_ignored(pair: Path) -> None:
    """By the command, as a user gives them; ids are those in the file, before --reduce-zero."""
    Image.fromarray(np.array([[1, 2, 7, 9], [0, 1, 2, 3], [255, 7, 9, 1]], dtype=np.uint8)).save(
        pair / "labels" / "a.png"
    )

    def run(*more: str) -> Result:
        command = ["shards", "pack", "semantic", "--images", str(pair / "images"), "--labels", str(pair / "labels")]
        return CliRunner().invoke(
            app, [*command, "--classes", "x,y,z", "--reduce-zero", "--out", str(pair / "set"), *more]
        )

    with pytest.raises(DataError, match="label id 7 is none of the 3 classes"):
        raise run().exception or AssertionError
    with pytest.raises(ConfigError, match="--ignore 7;9: expected integers with commas"):
        raise run("--ignore", "7;9").exception or AssertionError
    assert run("--ignore", "7,9").exit_code == 0
    assert label_of(pair / "set").tolist() == [[0, 1, 255, 255], [255, 0, 1, 2], [255, 255, 255, 0]]


def test_pairs_are_found_by_stem_also_in_folders(pair: Path) -> None:
    for name in ("images", "labels"):
        (pair / name / "town").mkdir()
        (pair / name / "a.png").rename(pair / name / "town" / "b.png")
    assert pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"]).samples == 1


def test_lonely_files_wrong_sizes_and_empty_sets(pair: Path) -> None:
    def pack(classes: tuple[str, ...] = ("x", "y")) -> None:
        pack_semantic(pair / "images", pair / "labels", pair / "set", list(classes))

    with pytest.raises(DataError, match="label id 1 is none of the 1 classes"):
        pack(("x",))
    with pytest.raises(DataError, match="listed twice"):
        pack(("x", "x"))
    Image.new("RGB", (5, 3)).save(pair / "images" / "a.png")
    with pytest.raises(DataError, match=r"labels/a\.png: 4x3 pixels, its image .* has 5x3"):
        pack()
    Image.new("RGB", (4, 3)).save(pair / "images" / "b.png")
    with pytest.raises(DataError, match=r"b\.png: no label map"):
        pack()
    (pair / "images" / "a.png").unlink()
    Image.new("L", (4, 3)).save(pair / "labels" / "b.png")
    with pytest.raises(DataError, match=r"labels/a\.png: no image a"):
        pack()
    (pair / "images" / "b.png").unlink()
    with pytest.raises(DataError, match="data set is empty"):
        pack()
    with pytest.raises(DataError, match="nowhere: no such folder"):
        pack_semantic(pair / "images", pair / "nowhere", pair / "set", ["x"])
    assert not (pair / "set").exists()
