"""Reading by offset; what a hostile or damaged shard may not do."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.manifest import Shard, make_manifest, read_manifest
from vitgraft.data_shards.report import verify
from vitgraft.data_shards.stream import ShardReader


def crafted(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> ShardReader:
    """A set of one sample made of these tar members, whatever they are."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    data = stream.getvalue()
    (tmp_path / "shard-000000.tar").write_bytes(data)
    np.asarray([0, end], dtype="<u8").tofile(tmp_path / "shard-000000.idx")
    shard = Shard(name="shard-000000.tar", samples=1, bytes=len(data), sha256="0" * 64, index_sha256="0" * 64)
    return ShardReader(tmp_path, make_manifest("video", ["a"], None, [shard], {}))


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_plain_members_are_read(tmp_path: Path) -> None:
    reader = crafted(tmp_path, (info("000000000.a.b"), b"1"), (info("000000000.json"), b"{}"))
    assert reader.read(0).members == {"a.b": b"1", "json": b"{}"}


@pytest.mark.parametrize(
    "member",
    [
        info("000000001.json"),
        info("../000000000.json"),
        info("/etc/000000000.json"),
        info("000000000"),
        info("000000000.json", tarfile.SYMTYPE, "/etc/passwd"),
        info("000000000.json", tarfile.LNKTYPE, "/etc/passwd"),
        info("000000000.json", tarfile.CHRTYPE),
        info("000000000.json", tarfile.DIRTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.type!r}",
)
def test_unexpected_members_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with pytest.raises(DataError, match=r"shard-000000\.tar:000000000: unexpected tar member"):
        crafted(tmp_path, (member, b"")).read(0)


def test_a_member_may_not_occur_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        crafted(tmp_path, (info("000000000.json"), b"1"), (info("000000000.json"), b"2")).read(0)


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    reader = crafted(tmp_path, (info("000000000.json"), b"{}"))
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    member = info("000000000.json")
    member.size = 1 << 40
    data[:512] = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    with pytest.raises(DataError, match="shard-000000"):
        reader.read(0)


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 1 << 62], "index gives bytes"),
        ([1024, 512], "index gives bytes"),
        ([0, 512, 1024], "3 offsets, expected 2"),
    ],
)
def test_impossible_offsets_are_refused(tmp_path: Path, offsets: list[int], message: str) -> None:
    reader = crafted(tmp_path, (info("000000000.json"), b"{}"))
    np.asarray(offsets, dtype="<u8").tofile(tmp_path / "shard-000000.idx")
    with pytest.raises(DataError, match=message):
        reader.read(0)


def test_an_offset_off_by_one_block_is_found(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed["detection"], tmp_path / "set"))
    index = np.fromfile(folder / "shard-000000.idx", dtype="<u8")
    index[3] += 512
    index.tofile(folder / "shard-000000.idx")
    reader = ShardReader(folder, read_manifest(folder))
    with pytest.raises(DataError, match="000000003"):
        reader.read(3)


def test_readers_can_be_pickled_and_keep_few_files_open(packed: dict[str, Path]) -> None:
    folder = packed["video"]
    reader = ShardReader(folder, read_manifest(folder))
    first = reader.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(0) == first
    with pytest.raises(IndexError):
        reader.read(22)
    reader.close()
    assert reader.read(0) == first


def test_verify_finds_one_flipped_bit(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed["semantic"], tmp_path / "set"))
    assert verify(folder).ok
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b'"file_name"') + 3
    data[place] ^= 1
    path.write_bytes(data)
    report = verify(folder)
    assert not report.ok
    assert len(report.bad_files) == 1
    assert "shard-000001.tar" in report.bad_files[0]


def test_verify_lists_the_samples_that_cannot_be_decoded(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed["detection"], tmp_path / "set"))
    index = np.fromfile(folder / "shard-000002.idx", dtype="<u8")
    with (folder / "shard-000002.tar").open("r+b") as stream:
        # The first member is the image; its header stays, its content goes.
        stream.seek(int(index[1]) + 512)
        stream.write(b"\0" * 600)
    report = verify(folder)
    assert list(report.bad_samples) == ["000000021"]
    assert "broken image" in report.bad_samples["000000021"]


def test_verify_decodes_every_kind(packed: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    for folder in packed.values():
        assert verify(folder, lambda done, total: seen.append((done, total))).ok
    assert seen == [(i + 1, 22) for i in range(22)] * 3


def test_metadata_is_json_with_boxes_of_this_image(packed: dict[str, Path]) -> None:
    reader = ShardReader(packed["detection"], read_manifest(packed["detection"]))
    metadata = json.loads(reader.read(5).members["json"])
    assert metadata["annotations"][0]["segmentation"]["size"] == [metadata["height"], metadata["width"]]
