"""A reader trusts a manifest, and a manifest that lies is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.manifest import dump_manifest, parse_manifest, read_manifest


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
