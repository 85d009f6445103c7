"""Tars of others are read as they are; what must not be trusted is refused in one line."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from http_folder import HttpFolder
from PIL import Image
from typer.testing import CliRunner

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards import tar_scan
from vitgraft.data_shards.cache import FileCache
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.foreign import index_tars
from vitgraft.data_shards.index_folder import IndexFolder
from vitgraft.data_shards.manifest import dump_manifest, parse_manifest, read_manifest
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import ShardReader
from vitgraft.data_shards.tar_scan import scan_tar

Configure = Callable[..., DataConfig]
Members = list[tuple[str, bytes]]


def picture(value: int, format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, format)
    return stream.getvalue()


def label_map(value: int, size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full(size[::-1], value, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    """As webdataset's writer does: times with fractions, hence a pax header before each member."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1700000000.25
            tar.addfile(info, io.BytesIO(data))
    return path


def img2dataset(tar: int, count: int = 3) -> Members:
    """Keys of shard and number, a caption, and a JSON of what was known; one download failed."""
    members: Members = []
    for number in range(count):
        key = f"{tar:05d}{number:04d}"
        facts = {"key": key, "caption": "a cat", "status": "success", "breed": "tabby" if number % 2 else "manx"}
        members += [(f"{key}.jpg", picture(10 * number)), (f"{key}.json", json.dumps(facts).encode())]
        members.append((f"{key}.txt", b"a cat"))
    return members


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    folder = tmp_path / "laion"
    for tar in range(3):
        write_tar(folder / f"{tar:05d}.tar", img2dataset(tar))
    return folder


BREEDS = {"members": {"label": ["json:breed"]}}


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        # WebDataset's ImageNet: cls, beside a JSON of other facts; timm's: the class in the JSON too.
        ([{"cls": b"1", "json": b'{"filename": "n01440764_1.JPEG"}'}, {"cls": b"0\n", "json": b"{}"}], None, [1, 0]),
        ([{"json": b'{"label": 1}'}, {"json": b'{"label": "manx"}'}], None, [1, 0]),
        ([{"txt": b"tabby\n"}, {"txt": b"manx"}], {"label": ["txt"]}, [1, 0]),
        ([{"cls": b"1", "txt": b"manx"}, {"cls": b"1", "txt": b"tabby"}], {"label": ["txt"]}, [0, 1]),
        ([{"json": b'{"cat": {"x": 1}}'}] * 2, {"label": ["json:cat"]}, "label .* is none of the 2 classes"),
        ([{"txt": b"tabby"}] * 2, None, r"no label \(\.cls, \.json:label\) among \.jpg, \.txt; see --member"),
    ],
)
def test_classes_in_every_usual_member(
    tmp_path: Path, labels: list[dict[str, bytes]], options: dict[str, list[str]] | None, expected: Any
) -> None:
    members: Members = []
    for number, more in enumerate(labels):
        # Names as ImageNet's, in folders or not.
        key = f"train/n01440764_{number}"
        members += [(f"{key}.jpg", picture(number)), *((f"{key}.{name}", data) for name, data in more.items())]
    write_tar(tmp_path / "set" / "imagenet-000000.tar", members)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            index_tars(tmp_path / "set", "image", ["manx", "tabby"], members=options)
        return
    manifest = index_tars(tmp_path / "set", "image", ["manx", "tabby"], members=options)
    reader = ShardReader(tmp_path / "set", manifest)
    assert [json.loads(reader.read(number).members["json"])["label"] for number in range(2)] == expected
    assert verify(tmp_path / "set").ok


def test_img2dataset_tars_are_read_in_place(laion: Path, configure: Configure) -> None:
    before = {path.name: path.read_bytes() for path in laion.glob("*.tar")}
    seen: list[tuple[int, int]] = []
    manifest = index_tars(
        laion, "image", ["manx", "tabby"], **BREEDS, progress=lambda done, total: seen.append((done, total))
    )
    assert {path.name: path.read_bytes() for path in laion.glob("*.tar")} == before
    assert sorted(path.name for path in laion.iterdir() if path.suffix != ".tar") == [
        *(f"{tar:05d}.idx" for tar in range(3)),
        "manifest.json",
    ]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert read_manifest(laion) == manifest == parse_manifest(dump_manifest(manifest).encode(), "x")
    assert verify(laion).ok
    assert inspect(laion).class_counts == {"manx": 6, "tabby": 3}
    reader = ShardReader(laion, manifest)
    raw = reader.read(7)
    assert set(raw.members) == {"jpg", "json"}
    assert raw.members["jpg"] == picture(10)
    expected = {"file_name": "000020001.jpg", "height": 30, "width": 40, "label": 1}
    assert json.loads(raw.members["json"]) == expected
    dataset = PackedDataset(laion, configure(laion, image_size=[32, 32]), "image")
    batch = dataset.train_batch(dataset.plan(0).entries(0, 9))
    assert batch.targets.tolist() == [entry.sample % 3 % 2 for entry in batch.entries]


def test_semantic_and_detection_and_video(tmp_path: Path, test_data: Path) -> None:
    write_tar(tmp_path / "s" / "a.tar", [("x/1.jpg", picture(3)), ("x/1.seg.png", label_map(1))])
    manifest = index_tars(tmp_path / "s", "semantic", ["no", "yes"])
    raw = ShardReader(tmp_path / "s", manifest).read(0)
    assert raw.members["label.png"] == label_map(1)
    assert verify(tmp_path / "s").ok
    boxes = {
        "annotations": [{"bbox": [1, 2, 3, 4], "class": "dog"}, {"bbox": [1, 2, 3.5, 4], "class": 0, "iscrowd": True}]
    }
    write_tar(tmp_path / "d" / "a.tar", [("1.PNG", picture(3, "PNG")), ("1.json", json.dumps(boxes).encode())])
    manifest = index_tars(tmp_path / "d", "detection", ["cat", "dog"])
    metadata = json.loads(ShardReader(tmp_path / "d", manifest).read(0).members["json"])
    assert [(item["class"], item["bbox"], item["iscrowd"]) for item in metadata["annotations"]] == [
        (1, [1, 2, 3, 4], 0),
        (0, [1, 2, 3.5, 4], 1),
    ]
    assert verify(tmp_path / "d").ok
    clip = test_data / "video_clips" / "torchvision" / "R6llTwEh07w.mp4"
    write_tar(tmp_path / "v" / "a.tar", [("1.mp4", clip.read_bytes()), ("1.cls", b"1\n")])
    manifest = index_tars(tmp_path / "v", "video", ["run", "jump"])
    assert verify(tmp_path / "v").ok
    assert json.loads(ShardReader(tmp_path / "v", manifest).read(0).members["json"])["label"] == 1


def test_indices_may_lie_elsewhere(laion: Path, tmp_path: Path) -> None:
    manifest = index_tars(laion, "image", ["manx", "tabby"], out=tmp_path / "out", **BREEDS)
    assert [path.name for path in laion.iterdir() if path.suffix != ".tar"] == []
    assert ShardReader(tmp_path / "out", read_manifest(tmp_path / "out")).read(8).members["jpg"] == picture(20)
    (laion / "00001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"laion/00001\.tar: 0 bytes, expected"):
        read_manifest(tmp_path / "out")
    assert manifest.foreign is not None
    assert manifest.foreign.root == str(laion)


def test_tars_behind_a_url(laion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("vitgraft.data_shards.remote.FIRST_DELAY", 0.01)
    local = index_tars(laion, "image", ["manx", "tabby"], out=tmp_path / "local", **BREEDS)
    with HttpFolder(laion) as server:
        with pytest.raises(ConfigError, match="give --out"):
            index_tars(server.url, "image", ["manx", "tabby"], **BREEDS)
        server.faults["00001.tar"] = ["500", "cut"]
        manifest = index_tars(server.url, "image", ["manx", "tabby"], out=tmp_path / "far", **BREEDS)
        assert manifest.fingerprint == local.fingerprint
        assert sorted(path.suffix for path in (tmp_path / "far").iterdir()) == [".idx", ".idx", ".idx", ".json"]
        reader = ShardReader(tmp_path / "far", read_manifest(tmp_path / "far"), FileCache(tmp_path / "cache", 1 << 20))
        near = ShardReader(tmp_path / "local", local)
        server.requests.clear()
        for sample in range(9):
            assert reader.read(sample).members == near.read(sample).members
        assert set(server.requests.values()) == {1}
        # The whole set may be uploaded; one that names a folder of another machine may not.
        shutil.copytree(tmp_path / "far", laion / "set")
        shutil.copytree(tmp_path / "local", laion / "bad")
        assert read_manifest(f"{server.url}/set") == manifest
        with pytest.raises(DataError, match="names tars on another machine"):
            read_manifest(f"{server.url}/bad")


def test_incomplete_samples_stop_or_are_left_out(tmp_path: Path) -> None:
    members = img2dataset(0)
    members[0:1] = []  # a failed download: no image
    members[5:5] = [("odd.jpg", b"no image"), ("odd.json", b'{"breed": "manx"}')]
    members += [("zoo.jpg", picture(1)), ("zoo.json", b'{"breed": "tiger"}')]
    write_tar(tmp_path / "set" / "0.tar", members)
    with pytest.raises(DataError, match=r"0\.tar:000000000: no image \(\.jpg, .*among \.json, \.txt; see --member"):
        index_tars(tmp_path / "set", "image", ["manx", "tabby"], **BREEDS)
    assert not (tmp_path / "set" / "manifest.json").exists()
    manifest = index_tars(tmp_path / "set", "image", ["manx", "tabby"], **BREEDS, on_error="skip")
    assert (manifest.samples, len(manifest.source["skipped"])) == (2, 3)
    assert "label 'tiger' is none of the 2 classes" in manifest.source["skipped"][2]
    reader = ShardReader(tmp_path / "set", manifest)
    names = [json.loads(reader.read(sample).members["json"])["file_name"] for sample in range(2)]
    assert names == ["000000001.jpg", "000000002.jpg"]
    with pytest.raises(DataError, match=r"no tar holds a usable image sample; the first: .*0\.tar:000000000: no image"):
        index_tars(tmp_path / "set", "image", ["lion"], **BREEDS, on_error="skip", overwrite=True)


def test_what_decides_the_samples_is_in_the_fingerprint(laion: Path, tmp_path: Path) -> None:
    one = index_tars(laion, "image", ["manx", "tabby"], out=tmp_path / "1", **BREEDS)
    two = index_tars(laion, "image", ["manx", "tabby"], out=tmp_path / "2", **BREEDS)
    other = index_tars(laion, "image", ["tabby", "manx"], out=tmp_path / "3", **BREEDS)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    tree = json.loads((tmp_path / "1" / "manifest.json").read_text())
    tree["foreign"]["members"]["jpg"] = "png"
    with pytest.raises(DataError, match="fingerprint does not fit"):
        parse_manifest(json.dumps(tree).encode(), "x")
    tree = json.loads((tmp_path / "1" / "manifest.json").read_text())
    del tree["shards"][0]["index_size"]
    with pytest.raises(DataError, match="index_size"):
        parse_manifest(json.dumps(tree).encode(), "x")


# Hostile tars.

Hostile = Callable[[tarfile.TarFile], None]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def declared(tar: tarfile.TarFile, size: int) -> None:
    info = tarfile.TarInfo("2.jpg")
    info.size = size
    assert tar.fileobj is not None
    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    tar.offset += 512


def sparse(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("2.jpg")
    info.size = 4
    info.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": str(10 << 30)}
    tar.addfile(info, io.BytesIO(b"abcd"))


def pax_size(tar: tarfile.TarFile, size: int = 10 << 30) -> None:
    info = tarfile.TarInfo("2.jpg")
    info.pax_headers = {"size": str(size)}
    tar.addfile(info)


def negative_header(tar: tarfile.TarFile) -> None:
    """An extended header of -1000 bytes, behind which stands more than may be read into memory."""
    info = tarfile.TarInfo("x")
    info.size, info.type = -1000, tarfile.XHDTYPE
    assert tar.fileobj is not None
    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    tar.offset += 512
    add(tar, "2.jpg", bytes(64 << 20))


def chained(tar: tarfile.TarFile) -> None:
    for _ in range(5000):
        add(tar, "x", b"11 path=ab\n", tarfile.XHDTYPE)


def twice_apart(tar: tarfile.TarFile) -> None:
    for key in ("2", "3", "2"):
        add(tar, f"{key}.jpg", picture(1))
        add(tar, f"{key}.cls", b"0")


def big_header(tar: tarfile.TarFile) -> None:
    add(tar, "x", bytes(2 << 20), tarfile.XHDTYPE)


def global_header(tar: tarfile.TarFile) -> None:
    add(tar, "x", b"16 path=all.jpg\n", tarfile.XGLTYPE)


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (lambda tar: add(tar, "/etc/2.jpg"), "'/etc/2.jpg': expected a relative path"),
        (lambda tar: add(tar, "a/../../2.jpg"), "relative path that stays inside"),
        (lambda tar: add(tar, "2\n.jpg"), "relative path"),
        (lambda tar: add(tar, "2.jpg", b"", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (lambda tar: add(tar, "2.jpg", b"", tarfile.LNKTYPE, "1.jpg"), "is a link"),
        (lambda tar: add(tar, "2.jpg", b"", tarfile.CHRTYPE), "is a special or sparse file"),
        (lambda tar: add(tar, "2.jpg", b"", tarfile.FIFOTYPE), "is a special or sparse file"),
        (lambda tar: declared(tar, 10 << 30), "declares 10737418240 bytes, .* follow"),
        (pax_size, "declares 10737418240 bytes|not a readable tar"),
        (lambda tar: declared(tar, -5), "declares -5 bytes"),
        (lambda tar: declared(tar, -5000), "declares -5000 bytes"),
        (lambda tar: pax_size(tar, -5), "declares -5 bytes|not a readable tar"),
        (negative_header, "-1000 bytes of extended header"),
        (sparse, "is a special or sparse file"),
        (lambda tar: (add(tar, "2.jpg"), add(tar, "2.jpg")), "member '2.jpg' occurs twice"),
        (lambda tar: (add(tar, "2.jpg"), add(tar, "2.JPG")), "member '2.JPG' occurs twice"),
        (twice_apart, "key '2' occurs twice"),
        (lambda tar: add(tar, "README"), r"'README': expected KEY\.EXTENSION"),
        (big_header, "2097152 bytes of extended header"),
        (global_header, "global pax header"),
        (chained, "not a readable tar"),
    ],
    ids=[
        "absolute", "parent", "newline", "symlink", "link", "device", "fifo", "10GB", "10GB-pax", "negative",
        "far-negative", "negative-pax", "negative-header", "sparse", "twice",
        "twice-by-case", "key-twice", "no-extension", "big-header", "global-header", "chain",
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_hostile_tars_are_refused_whole(tmp_path: Path, hostile: Hostile, message: str, policy: Any) -> None:
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "1.jpg", picture(1))
        add(tar, "1.cls", b"0")
        hostile(tar)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message) as caught:
        index_tars(tmp_path / "set", "image", ["a"], on_error=policy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
    assert "\n" not in str(caught.value)
    assert "0.tar" in str(caught.value)
    assert [item.name for item in tmp_path.rglob("*")] == ["set", "0.tar"]


@pytest.mark.parametrize("damage", ["gzip", "garbage", "empty", "header", "cut", "joined"])
def test_damaged_tars_are_refused(tmp_path: Path, damage: str) -> None:
    import gzip

    path = write_tar(tmp_path / "set" / "0.tar", img2dataset(0))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    if damage == "gzip":
        path.write_bytes(gzip.compress(data))
    elif damage == "garbage":
        path.write_bytes(b"no tar" * 1000)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "header":
        path.write_bytes(data[: last.offset] + b"?" * 512 + data[last.offset + 512 :])
    elif damage == "cut":
        path.write_bytes(data[: last.offset_data + 2])
    else:
        path.write_bytes(data * 2)
    with pytest.raises(DataError, match=r"0\.tar: (not a readable tar|no tar header at byte|member .* declares)"):
        index_tars(tmp_path / "set", "image", ["manx", "tabby"], **BREEDS)


def test_folders_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    """As written by ``tar cf``."""
    (tmp_path / "raw" / "sub").mkdir(parents=True)
    for key in ("a", "b"):
        (tmp_path / "raw" / "sub" / f"{key}.jpg").write_bytes(picture(1))
        (tmp_path / "raw" / "sub" / f"{key}.cls").write_text("0")
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / "raw", arcname=".")
    manifest = index_tars(tmp_path / "set", "image", ["x"])
    assert manifest.samples == 2
    assert verify(tmp_path / "set").ok


def test_long_names(tmp_path: Path) -> None:
    key = "k" * 300
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(format)
        write_tar(folder / "0.tar", [(f"{key}.jpg", picture(1)), (f"{key}.cls", b"0")] * 1, format)
        index_tars(folder, "image", ["x"])
        assert verify(folder).ok


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ('{"annotations": [{"bbox": [1, 2, NaN, 4], "class": 0}]}', "annotation 0: bbox .* expected four numbers"),
        ('{"annotations": [{"bbox": [1, 2, 3], "class": 0}]}', "annotation 0: bbox .* expected four numbers"),
        ('{"annotations": [{"bbox": [1, 2, 99, 4], "class": 0}]}', r"annotation 0: .* reaches far out of the image"),
        ('{"annotations": [{"bbox": [1, 2, 3, 4], "class": 9}]}', "class 9 is none of the 1 classes"),
        ('{"annotations": [{"bbox": [1, 2, 3, 4], "class": "x"}]}', "class 'x' is none of the 1 classes"),
        ('{"annotations": [{"bbox": [1, 2, 3, 4], "class": 0, "segmentation": 7}]}', "segmentation cannot be read"),
        ('{"annotations": [{"bbox": [1, 2, 3, 4], "class": 0, "iscrowd": 1}]}', "all 1 annotations are crowds"),
        ('{"annotations": [3]}', "annotation 0: 3; expected an object"),
        ('{"annotations": 3}', "expected JSON"),
        ("{}", "expected JSON"),
        ("[]", "not a JSON object"),
        ("{", "not readable JSON"),
    ],
)
def test_annotations_of_the_wrong_shape(tmp_path: Path, annotations: str, message: str) -> None:
    write_tar(tmp_path / "set" / "0.tar", [("1.jpg", picture(1)), ("1.json", annotations.encode())])
    with pytest.raises(DataError, match=message):
        index_tars(tmp_path / "set", "detection", ["a"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [(label_map(7), "class id 7 of 2"), (label_map(1, (40, 31)), r"label map of \(31, 40\)"), (b"x", "broken image")],
)
def test_label_maps_that_do_not_fit(tmp_path: Path, labels: bytes, message: str) -> None:
    write_tar(tmp_path / "set" / "0.tar", [("1.jpg", picture(1)), ("1.png", labels)])
    with pytest.raises(DataError, match=message):
        index_tars(tmp_path / "set", "semantic", ["a", "b"])


@pytest.mark.parametrize("label", [b"2", b"-1", b"", b"\xff\xfe", b"1.0", b"9" * 5000])
def test_labels_that_are_no_class(tmp_path: Path, label: bytes) -> None:
    write_tar(tmp_path / "set" / "0.tar", [("1.jpg", picture(1)), ("1.cls", label)])
    with pytest.raises(DataError, match=r"label .* is none of the 2 classes; see --classes"):
        index_tars(tmp_path / "set", "image", ["a", "b"])


@pytest.mark.parametrize(
    ("kind", "members", "message"),
    [
        ("image", {"pixels": ["jpg"]}, "an image sample has image and label|a image sample has image and label"),
        ("image", {"image": [""]}, "expected names of members"),
        ("image", {"image": ["json:x"]}, "expected names of members"),
        ("image", {"label": ["json:"]}, "expected names of members"),
        ("image", {"label": ["jpg"]}, r"\.jpg cannot be both image and label"),
        ("semantic", {"image": ["png"]}, r"\.png cannot be both"),
    ],
)
def test_members_that_mean_nothing(laion: Path, kind: Any, members: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        index_tars(laion, kind, ["a"], members=members)


def test_two_members_for_one_role_are_not_guessed(tmp_path: Path) -> None:
    members = [("1.jpg", picture(1)), ("1.png", picture(2, "PNG")), ("1.cls", b"0")]
    write_tar(tmp_path / "set" / "0.tar", members)
    with pytest.raises(DataError, match=r"both \.jpg and \.png; say which with --member image="):
        index_tars(tmp_path / "set", "image", ["a"])
    manifest = index_tars(tmp_path / "set", "image", ["a"], members={"image": ["png"]})
    assert ShardReader(tmp_path / "set", manifest).read(0).members["png"] == picture(2, "PNG")


def test_what_is_there_is_not_replaced_unasked(laion: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a packed data set, which needs no index"):
        index_tars(packed["video"], "video", ["a"], overwrite=True)
    (laion / "00000.idx").write_text("of another tool")
    with pytest.raises(ConfigError, match=r"holds \.idx files of something else"):
        index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    (laion / "00000.idx").unlink()
    index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    with pytest.raises(ConfigError, match="is indexed already"):
        index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    index_tars(laion, "image", ["tabby", "manx"], **BREEDS, overwrite=True)
    assert read_manifest(laion).classes == ["tabby", "manx"]
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        index_tars(tmp_path / "nowhere", "image", ["a"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no \.tar files"):
        index_tars(tmp_path / "none", "image", ["a"])
    write_tar(tmp_path / "none" / "a b.tar", img2dataset(0))
    with pytest.raises(DataError, match="rename the tar"):
        index_tars(tmp_path / "none", "image", ["a"])


@pytest.mark.parametrize("place", ["tar", "index"])
def test_changes_after_indexing_are_found(laion: Path, place: str) -> None:
    index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    path = laion / ("00001.tar" if place == "tar" else "00001.idx")
    data = bytearray(path.read_bytes())
    data[-600 if place == "tar" else -3] ^= 1
    path.write_bytes(data)
    assert [line.split(":")[0] for line in verify(laion).bad_files] == [str(path)]


def test_an_index_that_lies(laion: Path) -> None:
    index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    path = laion / "00000.idx"
    whole = path.read_bytes()
    for place, value, message in (
        (0, 1 << 60, "index gives bytes"),
        (0, 7, "not a readable tar"),
        (7, 1 << 50, "metadata"),
    ):
        numbers = bytearray(whole)
        numbers[8 * place : 8 * place + 8] = value.to_bytes(8, "little")
        path.write_bytes(numbers)
        reader = ShardReader(laion, read_manifest(laion))
        with pytest.raises(DataError, match=message):
            reader.read(0)


def test_scanning_holds_no_list_of_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s" / "0.tar", [(f"{n}.txt", b"") for n in range(2000)], tarfile.GNU_FORMAT)
    groups = list(scan_tar(path, "x"))
    assert len(groups) == 2000
    assert groups[1999].end == 512 * 2000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_scan, "MAX_SAMPLES", 1999)
        with pytest.raises(DataError, match="more than 1999 samples; split the tar"):
            list(scan_tar(path, "x"))


def test_the_command(laion: Path, tmp_path: Path) -> None:
    from vitgraft.launch.shards_cli import shards

    run = CliRunner()
    base = ["index", str(laion), "--kind", "image", "--classes", "manx,tabby", "--member", "label=json:breed"]
    done = run.invoke(shards, [*base, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "9 samples in 3 tars indexed; the data set is" in done.output
    assert "  in all: 0 turned, 0 clipped, 0 left out, 0 passed over, 0 crowds; faults: none" in done.output
    assert run.invoke(shards, ["verify", str(tmp_path / "out")]).exit_code == 0
    wrong = run.invoke(shards, [*base, "--member", "label"])
    assert isinstance(wrong.exception, ConfigError)
    help_text = run.invoke(shards, ["index", "--help"]).output
    assert "vitgraft shards index" in help_text


def test_the_same_pixels_as_packed(laion: Path, configure: Configure) -> None:
    """The way through the index changes nothing about a picture."""
    index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    dataset = PackedDataset(laion, configure(laion, image_size=[30, 40]), "image", train=False)
    found = dataset.eval_batch([1]).batch.images[0]
    expected = torch.tensor((10 / 255 - 0.485) / 0.229)
    assert torch.allclose(found[0], expected.expand(30, 40), atol=0.01)
    assert hashlib.sha256((laion / "00000.tar").read_bytes()).hexdigest() == dataset.manifest.shards[0].sha256


def boxed(*annotations: dict[str, Any]) -> bytes:
    return json.dumps({"annotations": [{"bbox": [1, 2, 10, 8], "class": 0} | item for item in annotations]}).encode()


def test_an_indexed_detection_set_can_be_evaluated(tmp_path: Path, configure: Configure) -> None:
    """Areas come from the mask, else from the box, unless the tar has them; a perfect prediction scores 1."""
    from pycocotools import mask as coco_mask

    from vitgraft.trainer.tasks.detection import DetectionTask

    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[2:10, 1:6] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    masked = {"segmentation": {"size": [30, 40], "counts": rle["counts"].decode()}}
    members = [("1.jpg", picture(1)), ("1.json", boxed(masked, masked | {"area": 7}))]
    members += [("2.jpg", picture(2)), ("2.json", boxed({}, {"iscrowd": True, "bbox": [20, 5, 4, 6.5]}))]
    members += [("3.jpg", picture(3)), ("3.json", boxed())]
    write_tar(tmp_path / "set" / "0.tar", members)
    index_tars(tmp_path / "set", "detection", ["a"])
    config = configure(tmp_path / "set", image_size=[30, 40])
    dataset = PackedDataset(tmp_path / "set", config, "detection", train=False)
    item = dataset.eval_batch([0, 1, 2])
    assert item.errors == []
    assert [[found["area"] for found in truth.value] for truth in item.batch.truths] == [[40, 7], [80, 26], []]
    predictions: list[Any] = []
    for truth in item.batch.truths:
        boxes = torch.tensor([found["bbox"] for found in truth.value]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        predictions.append({"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))})
    metric = DetectionTask(["a"]).metric()
    metric.add(predictions, item.batch)
    assert metric.compute()["box_AP"] == pytest.approx(1)


@pytest.mark.parametrize("area", ["-1", "NaN", "Infinity", '"x"', "[7]", "true", "1" + "0" * 400])
def test_areas_that_are_none_are_those_of_the_box(tmp_path: Path, area: str) -> None:
    text = b'{"annotations": [{"bbox": [1, 2, 3, 4], "class": 0, "area": ' + area.encode() + b"}]}"
    write_tar(tmp_path / "set" / "0.tar", [("1.jpg", picture(1)), ("1.json", text)])
    manifest = index_tars(tmp_path / "set", "detection", ["a"])
    metadata = json.loads(ShardReader(tmp_path / "set", manifest).read(0).members["json"])
    assert metadata["annotations"][0]["area"] == 12


def test_annotations_in_tars_are_repaired_and_counted_as_in_coco_files(tmp_path: Path) -> None:
    items = [
        {"bbox": ["1", 2, 10, 8], "class": "0", "iscrowd": "0", "segmentation": []},
        {"bbox": [30, 20, 15, 8], "class": 0, "iscrowd": 1, "segmentation": {}},
        {"class": 0, "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11], [1, 1, 2, 2]]},
        {"bbox": [1, 2, 0, 8], "class": 0},
        {"bbox": "none", "class": 0},
    ]
    text = json.dumps({"annotations": items}).encode()
    write_tar(tmp_path / "set" / "0.tar", [("1.jpg", picture(1)), ("1.json", text)])
    told: list[str] = []
    with pytest.raises(DataError, match="annotation 4: bbox none"):
        index_tars(tmp_path / "set", "detection", ["a"])
    manifest = index_tars(tmp_path / "set", "detection", ["a"], on_error="skip", say=told.append)
    metadata = json.loads(ShardReader(tmp_path / "set", manifest).read(0).members["json"])
    assert [a["bbox"] for a in metadata["annotations"]] == [[1, 2, 10, 8], [30, 20, 10, 8], [2, 3, 10, 8]]
    assert [a["segmentation"] is None for a in metadata["annotations"]] == [True, True, False]
    assert told[-1].startswith("  in all: 0 turned, 1 clipped, ")
    assert told[-1].endswith(", 2 left out, 0 passed over, 1 crowds; faults: none")
    assert verify(tmp_path / "set").ok


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoil(laion: Path) -> Callable[[], None]:
    """Makes the second tar one that is refused, and gives what makes it good again."""
    path = laion / "00001.tar"
    good = path.read_bytes()
    path.write_bytes(good * 2)
    return lambda: (path.write_bytes(good), None)[1]


def test_a_fault_in_the_second_tar_leaves_nothing(laion: Path) -> None:
    mend = spoil(laion)
    before = content(laion)
    with pytest.raises(DataError, match=r"00001\.tar: no tar header"):
        index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    assert content(laion) == before
    assert not (laion / "index.part").exists()
    mend()
    assert index_tars(laion, "image", ["manx", "tabby"], **BREEDS).samples == 9


def test_a_fault_leaves_what_was_indexed_before(laion: Path) -> None:
    index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    whole = content(laion)
    mend = spoil(laion)
    with pytest.raises(DataError, match=r"00001\.tar: no tar header"):
        index_tars(laion, "image", ["tabby", "manx"], **BREEDS, overwrite=True)
    mend()
    assert content(laion) == whole
    assert verify(laion).ok


def index_and_die(folder: Path, moves: int, overwrite: bool) -> None:
    """Kills itself when so many files have been moved."""
    replace, left = os.replace, [moves]

    def counted(old: Path, new: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = counted  # type: ignore[assignment]
    index_tars(folder, "image", ["tabby", "manx"], **BREEDS, overwrite=overwrite)


@pytest.mark.parametrize("moves", range(6))
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_while_publishing_it_is_given_again(laion: Path, moves: int, overwrite: bool) -> None:
    """Of the moves the first decides, and then come three indices and the manifest."""
    if overwrite:
        index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    old = content(laion)
    process = multiprocessing.get_context("fork").Process(target=index_and_die, args=(laion, moves, overwrite))
    process.start()
    process.join()
    assert process.exitcode == (0 if moves == 5 else -signal.SIGKILL)
    if moves == 0:
        assert {name: data for name, data in content(laion).items() if not name.startswith("index.part")} == old
    elif moves < 5:
        # Never an old manifest beside new indices, which have the same sizes here.
        with pytest.raises(DataError, match="is not a packed data set, or packing was interrupted"):
            read_manifest(laion)
    again = index_tars(laion, "image", ["tabby", "manx"], **BREEDS, overwrite=overwrite or moves == 5)
    assert again.classes == ["tabby", "manx"]
    assert verify(laion).ok
    assert sorted(path.suffix for path in laion.iterdir()) == [".idx"] * 3 + [".json"] + [".tar"] * 3


def test_what_a_killed_command_had_published_is_not_lost(laion: Path) -> None:
    """It is there again before anything new is made, which may fail."""
    process = multiprocessing.get_context("fork").Process(target=index_and_die, args=(laion, 2, False))
    process.start()
    process.join()
    with pytest.raises(DataError, match="is none of the 1 classes"):
        index_tars(laion, "image", ["lion"], **BREEDS)
    assert read_manifest(laion).classes == ["tabby", "manx"]
    assert verify(laion).ok


def test_a_disk_that_fails_while_publishing(laion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decided is kept for the next command."""
    index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    replace = os.replace

    def fail(old: Path, new: Path) -> None:
        if new.name == "00001.idx":
            raise OSError(errno.EIO, "Input/output error")
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(DataError, match="laion: Input/output error; check space"):
            index_tars(laion, "image", ["tabby", "manx"], **BREEDS, overwrite=True)
    assert not (laion / "manifest.json").exists()
    with pytest.raises(DataError, match="is none of the 1 classes"):
        index_tars(laion, "image", ["lion"], **BREEDS)
    assert read_manifest(laion).classes == ["tabby", "manx"]
    assert verify(laion).ok


def test_one_process_indexes_a_folder(laion: Path) -> None:
    with IndexFolder(laion), pytest.raises(ConfigError, match="another process is indexing it"):
        index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    assert index_tars(laion, "image", ["manx", "tabby"], **BREEDS).samples == 9


@pytest.mark.parametrize("names", [["notes.txt"], ["lock", "notes.txt"], ["manifest.json"], ["lock", "a.idx/b"]])
def test_a_folder_of_that_name_that_is_anothers_is_left_alone(laion: Path, names: list[str]) -> None:
    for name in names:
        path = laion / "index.part" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = content(laion)
    with pytest.raises(ConfigError, match=r"index\.part: holds '.*', which no indexing wrote; move it away"):
        index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    assert content(laion) == before


def test_a_link_in_that_folder_is_not_written_through(laion: Path, tmp_path: Path) -> None:
    (laion / "index.part").mkdir()
    (laion / "index.part" / "lock").write_text("")
    (tmp_path / "precious").write_text("mine")
    name = sorted(path.stem for path in laion.glob("*.tar"))[0]
    (laion / "index.part" / f"{name}.idx").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=r"index\.part: holds '.*', which no indexing wrote; move it away"):
        index_tars(laion, "image", ["manx", "tabby"], **BREEDS)
    assert (tmp_path / "precious").read_text() == "mine"


def test_class_names_that_cannot_be_written(laion: Path) -> None:
    with pytest.raises(DataError, match="holds what is no character"):
        index_tars(laion, "image", ["manx", "tab\udce9"], **BREEDS)
    assert not list(laion.glob("*.idx"))


@pytest.mark.parametrize("kind", ["image", "detection", "semantic"])
@pytest.mark.parametrize("stored", [False, True])
def test_images_in_tars_are_turned_unless_their_labels_are_of_stored_pixels(
    kind: Any, stored: bool, tmp_path: Path, configure: Configure
) -> None:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    pixels = np.random.RandomState(0).randint(0, 255, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "PNG" if kind != "semantic" else "WEBP", lossless=True, exif=exif)
    size = (30, 40) if stored else (40, 30)
    box = {"bbox": [1, 2, 3, 4], "class": 0}
    members = {
        "image": [("a.png", stream.getvalue()), ("a.cls", b"0")],
        "semantic": [("a.webp", stream.getvalue()), ("a.png", label_map(0, size[::-1]))],
        "detection": [
            ("a.png", stream.getvalue()),
            ("a.json", json.dumps({"height": size[0], "width": size[1], "annotations": [box]}).encode()),
        ],
    }
    write_tar(tmp_path / "tars" / "0.tar", members[kind])
    turned = kind == "image" or not stored
    repaired = index_tars(tmp_path / "tars", kind, ["x"]).source["label_report"]["repaired"]
    assert ("turned" in repaired) == turned
    dataset = PackedDataset(tmp_path / "tars", configure(tmp_path / "tars"), kind, train=False)
    raw = dataset.reader.read(0)
    image = dataset._pixels(raw, dataset._metadata(raw)).permute(1, 2, 0).numpy()
    assert np.array_equal(image, np.rot90(pixels, -1) if turned else pixels)
    assert verify(tmp_path / "tars").ok
    index_tars(tmp_path / "tars", kind, ["x"], exif="ignore" if stored or kind == "image" else "apply", overwrite=True)


def test_decoding_finds_images_that_are_cut_short(tmp_path: Path) -> None:
    data = picture(100, size=(400, 300))
    write_tar(
        tmp_path / "0.tar", [("a.jpg", data), ("a.cls", b"0"), ("b.jpg", data[: len(data) // 2]), ("b.cls", b"0")]
    )
    assert index_tars(tmp_path, "image", ["x"]).samples == 2
    with pytest.raises(DataError, match="broken image"):
        index_tars(tmp_path, "image", ["x"], decode=True, overwrite=True)
    assert index_tars(tmp_path, "image", ["x"], decode=True, on_error="skip", overwrite=True).samples == 1
    assert verify(tmp_path).ok


def test_what_a_mac_adds_to_a_tar_is_passed_over(tmp_path: Path) -> None:
    """A hidden member beside each file, in the middle of samples too."""
    members: Members = [("._.", b"")]
    for key in ("./a", "./b"):
        folder, name = key.split("/")
        for extension, data in (("jpg", picture(9)), ("cls", b"1")):
            members += [(f"{folder}/._{name}.{extension}", b"Mac OS X"), (f"{key}.{extension}", data)]
    write_tar(tmp_path / "set" / "mac.tar", members)
    (tmp_path / "set" / "._mac.tar").write_bytes(b"Mac OS X")
    told: list[str] = []
    manifest = index_tars(tmp_path / "set", "image", ["x", "y"], say=told.append)
    assert manifest.samples == 2
    assert any("passed over: 5 hidden files" in line for line in told)
    raw = ShardReader(tmp_path / "set", manifest).read(1)
    assert sorted(raw.members) == ["jpg", "json"]
    assert raw.members["jpg"] == picture(9)
    assert verify(tmp_path / "set").ok


def test_unusual_images_are_taken_and_usual_ones_first(tmp_path: Path) -> None:
    members: Members = []
    for number, format in enumerate(("BMP", "TIFF", "GIF")):
        extension = {"BMP": "bmp", "TIFF": "TIF", "GIF": "gif"}[format]
        members += [(f"{number}.{extension}", picture(9 * number, format)), (f"{number}.cls", b"0")]
    members.append(("2.png", picture(90, "PNG")))
    write_tar(tmp_path / "set" / "a.tar", members)
    manifest = index_tars(tmp_path / "set", "image", ["x"])
    assert manifest.samples == 3
    assert verify(tmp_path / "set").ok
    metadata = json.loads(ShardReader(tmp_path / "set", manifest).read(2).members["json"])
    assert metadata["file_name"] == "2.png"


def test_masks_whose_255_is_a_class_are_doubted_in_tars_too(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[5:10] = 255
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    write_tar(tmp_path / "set" / "a.tar", [("0.jpg", picture(0)), ("0.png", stream.getvalue())])
    with pytest.raises(DataError, match=r"class 'object' has no pixel.* shards pack semantic with --ids 0,255; if it"):
        index_tars(tmp_path / "set", "semantic", ["background", "object"])
    manifest = index_tars(tmp_path / "set", "semantic", ["background", "object"], on_error="skip")
    assert manifest.samples == 1


def test_deep_images_in_tars_that_would_be_black_are_a_fault(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(stream, "PNG")
    write_tar(tmp_path / "0.tar", [("a.png", stream.getvalue()), ("a.cls", b"0")])
    with pytest.raises(DataError, match=r"from 4000 to 4000 of .*; pack the images of the tars, with --range 0,4095"):
        index_tars(tmp_path, "image", ["x"])
