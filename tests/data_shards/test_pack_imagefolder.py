"""Folders of classes and arrays become images with one class each, and come back as they were."""

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
import torch
from PIL import Image

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.imagefolder import pack_arrays, pack_imagefolder
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import RawSample, ShardReader


def raws(folder: Path, manifest: Manifest) -> list[RawSample]:
    reader = ShardReader(folder, manifest)
    return [reader.read(i) for i in range(len(reader))]


def pixels_of(raw: RawSample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw.members["png"])))


@pytest.fixture
def photographs(test_data: Path, tmp_path: Path) -> Path:
    """Six genuine photographs in the folders cat, dog/young and 10."""
    paths = sorted((test_data / "coco_tiny" / "images" / "train2017").glob("*.jpg"))[:6]
    for path, folder in zip(paths, ["cat", "cat", "dog/young", "dog", "10", "10"], strict=True):
        (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_folders_of_photographs(photographs: Path, tmp_path: Path, configure: Callable[..., DataConfig]) -> None:
    told: list[str] = []
    manifest = pack_imagefolder(photographs, tmp_path / "set", say=told.append)
    assert (manifest.kind, manifest.classes, manifest.samples) == ("image", ["10", "cat", "dog"], 6)
    assert manifest.source["label_report"]["classes"] == {"10": 2, "cat": 2, "dog": 2}
    assert told[0] == "labels: 6 samples, 6 images, 0 samples without label"
    for raw in raws(tmp_path / "set", manifest):
        metadata = json.loads(raw.members["json"])
        name = Path(metadata["file_name"])
        assert manifest.classes[metadata["label"]] == name.parts[0]
        assert raw.members["jpg"] == (photographs / name).read_bytes()
    assert verify(tmp_path / "set").ok
    report = inspect(tmp_path / "set", draw=1, out=tmp_path / "pictures")
    assert report.class_counts == {"10": 2, "cat": 2, "dog": 2}
    assert report.pictures[0].is_file()
    config = configure(tmp_path / "set", transforms=[{"name": "random_resized_crop"}, {"name": "horizontal_flip"}])
    train = PackedDataset(tmp_path / "set", config, "image", seed=3)
    entries = train.plan(0).entries(0, 4)
    batch = train.train_batch(entries)
    assert batch.images.shape == (4, 3, 96, 96)
    labels = [json.loads(train.reader.read(entry.sample).members["json"])["label"] for entry in entries]
    assert batch.targets.tolist() == labels
    filler = train.train_batch([])
    assert (filler.targets.tolist(), filler.weights.tolist(), filler.images.shape) == ([0], [0.0], (1, 3, 96, 96))
    mixed = configure(tmp_path / "set", transforms=[{"name": "random_resized_crop"}, {"name": "mixup"}])
    soft = PackedDataset(tmp_path / "set", mixed, "image", seed=3).train_batch(entries).targets
    assert soft.shape == (4, 3)
    assert torch.allclose(soft.sum(1), torch.ones(4))
    evaluated = PackedDataset(tmp_path / "set", config, "image", train=False).eval_batch([0, 5])
    assert not evaluated.errors
    assert [truth.value for truth in evaluated.batch.truths] == [0, 2]
    with pytest.raises(ConfigError, match="holds image data, the model's head needs video"):
        PackedDataset(tmp_path / "set", config, "video")


def test_a_given_list_orders_the_classes_and_numbers_are_sorted_as_such(photographs: Path, tmp_path: Path) -> None:
    names = ["dog", "cat", "horse", "10"]
    manifest = pack_imagefolder(photographs, tmp_path / "set", classes=names)
    assert manifest.classes == names
    assert manifest.source["label_report"]["classes"] == {"dog": 2, "cat": 2, "horse": 0, "10": 2}
    for old, new in (("cat", "9"), ("dog", "2")):
        (photographs / old).rename(photographs / new)
    assert pack_imagefolder(photographs, tmp_path / "other").classes == ["2", "9", "10"]
    with pytest.raises(DataError, match=r"folder '10' is none of the 2 classes.*\(2 faults in all"):
        pack_imagefolder(photographs, tmp_path / "none", classes=["2", "9"])
    assert not (tmp_path / "none").exists()


def test_wrong_folders(photographs: Path, tmp_path: Path) -> None:
    (photographs / "cat" / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.jpg: broken image"):
        pack_imagefolder(photographs, tmp_path / "set")
    (photographs / "cat" / "bad.jpg").rename(photographs / "bad.jpg")
    with pytest.raises(DataError, match=r"bad\.jpg: lies in no folder of a class"):
        pack_imagefolder(photographs, tmp_path / "set")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="data set is empty"):
        pack_imagefolder(tmp_path / "empty", tmp_path / "set")
    with pytest.raises(DataError, match="data set is empty: no folders"):
        pack_imagefolder(tmp_path / "empty" / "a", tmp_path / "set")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        pack_imagefolder(tmp_path / "nowhere", tmp_path / "set")
    assert not (tmp_path / "set").exists()


IMAGES = np.random.RandomState(0).randint(0, 256, (5, 32, 32, 3)).astype(np.uint8)
LABELS = np.array([0, 2, 1, 2, 0])


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (IMAGES, IMAGES),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES),
        (IMAGES.transpose(0, 3, 1, 2).reshape(5, 3072), IMAGES),
        (IMAGES[..., 0], IMAGES[..., 0]),
    ],
    ids=["NHWC", "NCHW", "rows", "grey"],
)
def test_arrays_come_back_pixel_for_pixel(stored: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "cifar.npz", images=stored, labels=LABELS)
    manifest = pack_arrays(tmp_path / "cifar.npz", tmp_path / "set")
    assert (manifest.kind, manifest.classes) == ("image", ["0", "1", "2"])
    found = raws(tmp_path / "set", manifest)
    assert [json.loads(raw.members["json"])["label"] for raw in found] == LABELS.tolist()
    assert all(np.array_equal(pixels_of(raw), image) for raw, image in zip(found, expected, strict=True))
    assert verify(tmp_path / "set").ok


def test_npy_files_and_class_names(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "y.npy", LABELS.astype(np.uint8))
    names = ["plane", "car", "bird", "cat"]
    manifest = pack_arrays(tmp_path / "x.npy", tmp_path / "set", labels=tmp_path / "y.npy", classes=names)
    assert manifest.classes == names
    assert manifest.source["label_report"]["classes"] == {"plane": 2, "car": 1, "bird": 2, "cat": 0}
    assert np.array_equal(pixels_of(raws(tmp_path / "set", manifest)[3]), IMAGES[3])


def save(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "holds images; expected an array called labels"),
        ({"pictures": IMAGES, "labels": LABELS}, "expected an array called images"),
        ({"images": IMAGES, "labels": LABELS[:4]}, r"labels int64 \(4,\) for 5 images"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "labels float64"),
        ({"images": IMAGES.astype(np.float32), "labels": LABELS}, "images of float32; expected uint8"),
        ({"images": IMAGES[..., :2], "labels": LABELS}, r"images \(5, 32, 32, 2\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "data set is empty"),
        ({"images": IMAGES, "labels": np.array([0, 1, -1, 0, 0])}, "label -1 of image 2 is none of the 2 classes"),
        ({"images": IMAGES, "labels": np.array([0, 1, 1 << 40, 0, 0])}, "is none of the 65537 classes"),
        ({"images": np.array([{}] * 5), "labels": LABELS}, "pickled objects are not accepted"),
    ],
)
def test_wrong_arrays(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        pack_arrays(tmp_path / "a.npz", tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_array_files_that_lie_or_are_none(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10, 3)}
    )
    np.save(tmp_path / "y.npy", LABELS)
    (tmp_path / "huge.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.write(tmp_path / "y.npy", "labels.npy")
    (tmp_path / "none.npz").write_bytes(b"no zip")
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04N.")
    with pytest.raises(DataError, match=r"huge\.npz: images: promises 3298534883328 bytes and holds"):
        pack_arrays(tmp_path / "huge.npz", tmp_path / "set")
    for name in ("huge.npy", "pickle.npy", "absent.npy"):
        with pytest.raises(DataError, match=name):
            pack_arrays(tmp_path / name, tmp_path / "set", labels=tmp_path / "y.npy")
    with pytest.raises(DataError, match=r"none\.npz: cannot be read"):
        pack_arrays(tmp_path / "none.npz", tmp_path / "set")
    for arguments in ({"arrays": tmp_path / "x.pkl"}, {"arrays": tmp_path / "x.npy"}):
        with pytest.raises(DataError, match=r"expected an \.npz with images and labels"):
            pack_arrays(out=tmp_path / "set", **arguments)


def test_a_damaged_label_is_told(tmp_path: Path, configure: Callable[..., DataConfig]) -> None:
    from vitgraft.data_shards.pack.writer import DatasetWriter

    stream = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(stream, "PNG")
    with DatasetWriter(tmp_path / "set", "image", ["a"]) as writer:
        writer.add({"png": stream.getvalue()}, {"label": 1, "file_name": "x", "height": 32, "width": 32})
    assert "label 1 is not one of the 1 classes" in next(iter(verify(tmp_path / "set").bad_samples.values()))
    assert inspect(tmp_path / "set", draw=1, out=tmp_path / "pictures").unreadable
    dataset = PackedDataset(tmp_path / "set", configure(tmp_path / "set"), "image")
    with pytest.raises(DataError, match="label 1 is not one of the 1 classes"):
        dataset.train_batch([Entry(0, 0, 0, 0)])
    assert torch.equal(dataset.eval_batch([0]).batch.weights, torch.zeros(1))


def test_what_lies_among_the_images_is_counted_and_named(photographs: Path, tmp_path: Path) -> None:
    for name in ("cat/Thumbs.db", "dog/._x.jpg", ".DS_Store"):
        (photographs / name).write_bytes(b"")
    told: list[str] = []
    assert pack_imagefolder(photographs, tmp_path / "set", say=told.append).samples == 6
    assert any("passed over: 2 hidden files and folders: " in line for line in told)
    assert any("passed over: 2 other files: " in line and "Thumbs.db" in line for line in told)


def test_bitmaps_among_the_photographs(fault_data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    manifest = pack_imagefolder(fault_data / "imagefolder_with_bmp", tmp_path / "set", say=told.append)
    assert manifest.source["label_report"]["classes"] == {"cat": 3, "dog": 3}
    assert any("passed over: 2 other files: " in line and "Thumbs.db" in line for line in told)
    assert verify(tmp_path / "set").ok


@pytest.mark.parametrize(
    "shape",
    [(2**45, 3072), (2**62, 4, 4, 3), (2**63, 2, 2), (2**70, 2, 2), (-(2**45), 4, 4), (True, 2, 2), (2, 2**45, 2**45)],
)
@pytest.mark.parametrize("kind", ["|u1", "|V0", "<f4", "|O"])
def test_arrays_that_promise_what_no_file_holds(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 100
    (tmp_path / "a.npy").write_bytes(array)
    np.save(tmp_path / "b.npy", np.zeros(2, np.int64))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", array)
        archive.writestr("labels.npy", (tmp_path / "b.npy").read_bytes())
    for name, labels in (("a.npy", tmp_path / "b.npy"), ("a.npz", None)):
        with pytest.raises(DataError) as caught:
            pack_arrays(tmp_path / name, tmp_path / "out", labels=labels)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_arrays_that_are_no_files(name: str, tmp_path: Path) -> None:
    """Which would be waited for without end."""
    os.mkfifo(tmp_path / name)
    np.save(tmp_path / "y.npy", LABELS)
    labels = None if name.endswith("z") else tmp_path / "y.npy"
    with pytest.raises(DataError, match=r"x\.np[yz]: cannot be read as .* not a regular file"):
        pack_arrays(tmp_path / name, tmp_path / "set", labels=labels)


def test_an_archive_that_inflates_without_measure(tmp_path: Path) -> None:
    """300 MB of nothing in 300 kB."""
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as stream,
    ):
        head = {"descr": "|u1", "fortran_order": False, "shape": (300, 1000, 1000)}
        np.lib.format.write_array_header_1_0(stream, head)
        for _ in range(300):
            stream.write(bytes(1_000_000))
    with pytest.raises(DataError, match=r"x\.npz: images would inflate more than 200 times to 300,000,128 bytes; if"):
        pack_arrays(tmp_path / "x.npz", tmp_path / "set")


def test_pickled_arrays_are_never_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    np.savez(tmp_path / "x.npz", images=np.array([Evil()], object), labels=LABELS)
    np.save(tmp_path / "x.npy", np.array([Evil()], object))
    np.save(tmp_path / "y.npy", LABELS)
    for name, labels in (("x.npz", None), ("x.npy", tmp_path / "y.npy")):
        with pytest.raises(DataError, match="pickled objects are not accepted"):
            pack_arrays(tmp_path / name, tmp_path / "set", labels=labels)
    assert not (tmp_path / "executed").exists()
