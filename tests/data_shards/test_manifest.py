"""A reader trusts a manifest, and a manifest that lies is found."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitgraft.configs.errors import DataError
from vitgraft.configs.hashing import sha256_of
from vitgraft.data_shards.manifest import (
    Foreign,
    Shard,
    dump_manifest,
    make_manifest,
    parse_manifest,
    read_manifest,
)
from vitgraft.data_shards.shards import Shards


@pytest.fixture
def copy(packed: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed["detection"], tmp_path / "set"))


def test_round_trip(copy: Path) -> None:
    manifest = read_manifest(copy)
    assert parse_manifest(dump_manifest(manifest).encode(), "x") == manifest
    assert json.loads((copy / "manifest.json").read_text())["schema"] == 1


def test_missing_folder_and_manifest(copy: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; pack .* vitgraft shards pack"):
        read_manifest(copy / "nowhere")
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match="packing was interrupted; pack it again"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx"])
def test_truncated_and_missing_files_are_named(copy: Path, name: str) -> None:
    size = (copy / name).stat().st_size
    with (copy / name).open("r+b") as stream:
        stream.truncate(size - 8)
    with pytest.raises(DataError, match=rf"{name}: {size - 8} bytes, expected {size} .*verify"):
        read_manifest(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: missing"):
        read_manifest(copy)


Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(schema=2), "manifest schema 2, expected 1"),
        (lambda m: m["classes"].reverse(), "fingerprint does not fit"),
        (lambda m: m["shards"].reverse(), "fingerprint does not fit"),
        (lambda m: m["category_ids"].reverse(), "fingerprint does not fit"),
        (lambda m: m["shards"][0].update(sha256="0" * 64), "fingerprint does not fit"),
        (lambda m: m.update(samples=23), "samples is 23, but the shards hold 22"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), r"shards\.0\.name"),
        (lambda m: m["shards"][0].update(samples="10"), r"shards\.0\.samples"),
        (lambda m: m["shards"][0].update(name=7), r"shards\.0\.name: Input should be a valid string"),
        (lambda m: m["shards"][1].update(name="a.tar\n"), r"shards\.1\.name"),
        (lambda m: m["shards"][2].update(samples=True), r"shards\.2\.samples"),
        (lambda m: m["shards"][2].update(samples=2.0), r"shards\.2\.samples"),
        (lambda m: m["shards"][2].update(samples=0), r"shards\.2\.samples: .* greater than or equal to 1"),
        (lambda m: m["shards"][2].update(bytes=-1), r"shards\.2\.bytes"),
        (lambda m: m["shards"][2].update(bytes=10**30), r"shards: 1000000.* in a shard; expected less than 2\^62"),
        (lambda m: m["shards"][2].update(samples=1 << 62), r"bytes in a shard; expected less than 2\^62"),
        (lambda m: m["shards"][1].update(sha256="A" * 64), r"shards\.1\.sha256"),
        (lambda m: m["shards"][1].update(sha256=m["shards"][1]["sha256"][1:]), r"shards\.1\.sha256"),
        (lambda m: m["shards"][1].update(sha256=" " + m["shards"][1]["sha256"][1:]), r"shards\.1\.sha256"),
        (lambda m: m["shards"][1].update(index_sha256="é" * 64), r"shards\.1\.index_sha256"),
        (lambda m: m["shards"][1].update(index_size=0), r"shards\.1\.index_size"),
        (lambda m: m["shards"][1].update(index_size=100), "index_size belongs to the shards of foreign tars"),
        (lambda m: [shard.update(index_size=100) for shard in m["shards"]], "index_size belongs to the shards"),
        (lambda m: m["shards"][1].update(surprise=1), r"shards\.1\.surprise: Extra inputs"),
        (lambda m: m["shards"][1].pop("bytes"), r"shards\.1\.bytes: Field required"),
        (lambda m: m["shards"].insert(1, None), r"shards\.1: Input should be a valid dictionary"),
        (lambda m: m["shards"].insert(0, []), r"shards\.0: Input should be a valid dictionary"),
        (lambda m: m.update(shards={"0": m["shards"][0]}), "shards: expected a list"),
        (lambda m: m["shards"].append(m["shards"][0]), "samples is 22, but the shards hold 32"),
        (lambda m: m["shards"][2].update(name=m["shards"][0]["name"]), "a shard is listed twice"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("kind"), "kind"),
    ],
)
def test_edited_manifests_are_refused(copy: Path, edit: Edit, message: str) -> None:
    path = copy / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(copy)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_garbage_is_refused(text: bytes) -> None:
    with pytest.raises(DataError):
        parse_manifest(text, "manifest.json")


def test_how_it_was_packed_does_not_change_the_fingerprint(copy: Path) -> None:
    path = copy / "manifest.json"
    tree = json.loads(path.read_text())
    tree["source"] = {"packer": "another"}
    path.write_text(json.dumps(tree))
    read_manifest(copy)


def shards_of(count: int, index_size: int | None = None) -> list[Shard]:
    return [
        Shard(
            name=f"shard-{number:06d}.tar",
            samples=number + 1,
            bytes=1000 + number,
            sha256=f"{number:064x}",
            index_sha256=f"{number + count:064x}",
            index_size=index_size,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("foreign", [None, Foreign(members={"jpg": "jpg"})])
def test_shards_are_columns_and_a_list(foreign: Foreign | None) -> None:
    expected = shards_of(5, None if foreign is None else 77)
    manifest = make_manifest("image", ["a"], None, expected, {}, foreign)
    read = parse_manifest(dump_manifest(manifest).encode(), "x")
    assert read == manifest == pickle.loads(pickle.dumps(manifest))
    assert list(read.shards) == expected == read.shards[:]
    assert (read.shards[-1], read.shards[1:3], len(read.shards)) == (expected[-1], expected[1:3], 5)
    assert read.shards.index_bytes.tolist() == [shard.index_bytes for shard in expected]
    assert read.shards != Shards(expected[:4])
    assert expected[2] in read.shards
    with pytest.raises(IndexError):
        read.shards[5]
    assert json.loads(dump_manifest(read))["shards"][0].keys() == {
        *("name", "samples", "bytes", "sha256", "index_sha256"),
        *(() if foreign is None else ("index_size",)),
    }


@pytest.mark.parametrize("foreign", [None, Foreign(members={"jpg": "jpg", "é": "x"})])
def test_the_fingerprint_is_the_hash_of_the_canonical_content(foreign: Foreign | None) -> None:
    """So it is that of every version."""
    shards = shards_of(3, None if foreign is None else 7)
    tree: dict[str, Any] = {"kind": "image", "classes": ["ü", 'a"b'], "category_ids": None}
    tree["shards"] = [[shard.name, shard.samples, shard.sha256] for shard in shards]
    if foreign is not None:
        tree["foreign"] = [foreign.members, [shard.index_sha256 for shard in shards]]
    manifest = make_manifest("image", tree["classes"], None, shards, {}, foreign)
    assert manifest.fingerprint == sha256_of(tree)


def test_an_index_size_of_null_is_none(copy: Path) -> None:
    """As manifests may say that others wrote."""
    tree = json.loads((copy / "manifest.json").read_text())
    for shard in tree["shards"]:
        shard["index_size"] = None
    assert parse_manifest(json.dumps(tree).encode(), "x") == read_manifest(copy)


def test_many_shards_take_little_memory() -> None:
    """A quarter of what an object for each would take; and a worker gets them as few bytes."""
    text = dump_manifest(make_manifest("image", ["a"], None, shards_of(20_000), {})).encode()
    tracemalloc.start()
    try:
        manifest = parse_manifest(text, "x")
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 220 * 20_000
    assert len(pickle.dumps(manifest)) < 130 * 20_000


def test_sizes_are_read_in_one_walk_over_the_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question for each file takes minutes where the folder is far away and the shards are many."""
    (copy / "shard-000009.tar").symlink_to(copy / "nowhere")
    (copy / "notes.txt").write_text("mine")
    asked: list[str] = []
    original = os.stat

    def counting(path: Any, *args: Any, **options: Any) -> os.stat_result:
        asked.append(str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(os, "stat", counting)
    read_manifest(copy)
    assert [path for path in asked if "shard-" in path] == []


def test_a_shard_that_is_a_broken_link_is_missing(copy: Path) -> None:
    (copy / "shard-000001.tar").unlink()
    (copy / "shard-000001.tar").symlink_to(copy / "nowhere")
    with pytest.raises(DataError, match=r"shard-000001\.tar: missing"):
        read_manifest(copy)


def test_manifests_made_to_do_harm_are_one_line(packed: dict[str, Path], tmp_path: Path) -> None:
    good = json.loads((packed["semantic"] / "manifest.json").read_text())
    shard = good["shards"][0]
    deep = "[" * 100_000
    for text, message in (
        ('{"schema": ' + "9" * 5000 + "}", "manifest schema 99999999999999999999, expected 1"),
        ('{"schema": 01}', "Invalid JSON"),
        ('{"schema": 1, "samples": ' + "9" * 5000 + "}", "^m: "),
        ('{"schema": 1, "samples": 1e400}', "^m: "),
        ('{"schema": 1, "kind": "\ud800"}'.encode("utf-8", "surrogatepass"), "manifest: Invalid JSON"),
        ('{"schema": 1, "source": ' + deep, "manifest: Invalid JSON"),
        (json.dumps(good | {"shards": [shard | {"samples": 2**61}], "samples": 2**61}), "fingerprint does not fit"),
        (json.dumps(good | {"shards": [shard | {"bytes": 1e400}]}), "shards"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            parse_manifest(text if isinstance(text, bytes) else text.encode(), "m")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    huge = Shard.model_validate(shard | {"samples": 2**61, "bytes": 2**61})
    manifest = make_manifest("semantic", good["classes"], None, [huge], {})
    (tmp_path / "manifest.json").write_text(dump_manifest(manifest))
    with pytest.raises(DataError, match="more samples than bytes can hold"):
        read_manifest(tmp_path)


def test_manifests_that_are_no_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"manifest\.json: not a regular file"):
        read_manifest(tmp_path)
    for target in ("/dev/zero", str(tmp_path)):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(DataError, match=r"manifest\.json: (not a regular file|a folder)"):
            read_manifest(tmp_path)
    path.unlink()
    with path.open("wb") as stream:
        stream.truncate(257 << 20)
    with pytest.raises(DataError, match="larger than 268,435,456 bytes"):
        read_manifest(tmp_path)
