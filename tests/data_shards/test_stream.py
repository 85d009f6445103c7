"""Reading by offset; what a hostile or damaged shard may not do."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from vitgraft.configs.errors import DataError
from vitgraft.data_shards import files, stream
from vitgraft.data_shards.manifest import Foreign, Manifest, Shard, dump_manifest, make_manifest, read_manifest
from vitgraft.data_shards.remote import UnreachableError
from vitgraft.data_shards.report import verify
from vitgraft.data_shards.stream import ShardReader


def crafted(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes], offsets: list[int] | None = None) -> ShardReader:
    """A set of one sample made of these tar members, whatever they are; ``offsets``: what its index says instead."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    data = buffer.getvalue()
    (tmp_path / "shard-000000.tar").write_bytes(data)
    index = np.asarray(offsets or [0, end], dtype="<u8").tobytes()
    (tmp_path / "shard-000000.idx").write_bytes(index)
    digest = sha256(index).hexdigest()
    shard = Shard(name="shard-000000.tar", samples=1, bytes=len(data), sha256="0" * 64, index_sha256=digest)
    return stored(tmp_path, make_manifest("video", ["a"], None, [shard], {}))


def stored(folder: Path, manifest: Manifest) -> ShardReader:
    (folder / "manifest.json").write_text(dump_manifest(manifest))
    return ShardReader(folder, manifest)


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
        ([0, 512, 1024], "24 bytes, expected 16: changed"),
    ],
)
def test_impossible_offsets_are_refused(tmp_path: Path, offsets: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        crafted(tmp_path, (info("000000000.json"), b"{}"), offsets=offsets).read(0)


def test_an_offset_off_by_one_block_is_found(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed["detection"], tmp_path / "set"))
    index = np.fromfile(folder / "shard-000000.idx", dtype="<u8")
    index[3] += 512
    index.tofile(folder / "shard-000000.idx")
    old = read_manifest(folder)
    with pytest.raises(DataError, match=r"shard-000000\.idx: not the index that manifest\.json describes") as caught:
        ShardReader(folder, old).read(3)
    # Damage of this set, which a recipe may skip.
    assert not isinstance(caught.value, UnreachableError)
    shards = list(old.shards)
    shards[0] = shards[0].model_copy(update={"index_sha256": sha256(index.tobytes()).hexdigest()})
    lying = make_manifest(old.kind, old.classes, old.category_ids, shards, {})
    with pytest.raises(DataError, match="000000003"):
        ShardReader(folder, lying).read(3)


def test_a_set_packed_again_under_its_reader_is_not_read_as_the_old_one(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed["detection"], tmp_path / "set"))
    reader = ShardReader(folder, read_manifest(folder))
    first = reader.read(0)
    folder.rename(tmp_path / "old")
    shutil.copytree(packed["semantic"], folder)
    # What is open is still the old set's.
    assert reader.read(0) == first
    with pytest.raises(UnreachableError, match=r"set: packed again since it was opened; start again"):
        reader.read(10)
    # Labels alone may leave all sizes and offsets as they were.
    for name in ("shard-000001.idx", "shard-000001.tar"):
        shutil.copy(tmp_path / "old" / name, folder)
    with pytest.raises(UnreachableError, match="packed again"):
        reader.read(10)
    shutil.copy(tmp_path / "old" / "manifest.json", folder)
    assert reader.read(10).key == "000000010"
    reader.close()
    with (folder / "shard-000001.tar").open("ab") as tar:
        tar.write(b"\0")
    with pytest.raises(UnreachableError, match=r"shard-000001\.tar: \d+ bytes, expected \d+: changed since"):
        reader.read(10)


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


@pytest.mark.parametrize("kind", ["detection", "semantic", "video"])
def test_what_we_pack_is_read_without_tarfile_and_as_tarfile_reads_it(
    packed: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(packed[kind], read_manifest(packed[kind]))
    with monkeypatch.context() as patch:
        patch.setattr(stream, "plain_members", lambda data: None)
        expected = [reader.read(sample) for sample in range(22)]
    monkeypatch.setattr(tarfile, "open", None)
    assert [reader.read(sample) for sample in range(22)] == expected


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["000000000", "a/000000000", "b" * 60 + "/" + "c" * 60, "é", "a.b/c"])
def test_tars_of_others_are_read_as_tarfile_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: int, key: str
) -> None:
    """Members of other names are passed over; extensions come in small letters."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for extension, data in (("JPG", b"1"), ("txt", b"left out"), ("seg.png", b"2" * 700)):
            member = info(f"{key}.{extension}")
            member.size, member.mtime = len(data), 0.5 if format == tarfile.PAX_FORMAT else 0
            tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    tar_bytes, text = buffer.getvalue(), b'{"label": 0}'
    (tmp_path / "a.tar").write_bytes(tar_bytes)
    index = np.asarray([0, end, 32, 32 + len(text)], dtype="<u8").tobytes() + text
    (tmp_path / "a.idx").write_bytes(index)
    zero = "0" * 64
    shard = Shard(name="a.tar", samples=1, bytes=len(tar_bytes), sha256=zero, index_sha256=zero, index_size=len(index))
    foreign = Foreign(members={"jpg": "jpg", "seg.png": "label.png"})
    reader = stored(tmp_path, make_manifest("semantic", ["a"], None, [shard], {}, foreign))
    found = reader.read(0)
    assert found.members == {"jpg": b"1", "label.png": b"2" * 700, "json": text}
    monkeypatch.setattr(stream, "plain_members", lambda data: None)
    assert reader.read(0) == found


def test_a_sample_is_found_in_the_right_shard_whatever_was_read_before(packed: dict[str, Path]) -> None:
    """More shards than are kept open, forwards and backwards."""
    reader = ShardReader(packed["detection"], read_manifest(packed["detection"]))
    expected = {sample: reader.read(sample) for sample in range(22)}
    small = ShardReader(packed["detection"], read_manifest(packed["detection"]))
    order = [*range(22), *reversed(range(22)), 0, 21, 9, 10, 19, 20]
    assert all(small.read(sample) == expected[sample] for sample in order)


def test_few_indices_and_files_are_kept(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_KEPT_SHARDS", 2)
    monkeypatch.setattr(files, "_OPEN_FILES", 1)
    reader = ShardReader(packed["detection"], read_manifest(packed["detection"]))
    for sample in (0, 10, 20, 0, 20, 10):
        assert reader.read(sample).key == f"{sample:09d}"
        assert len(reader._kept) <= 2
        assert len(reader._tars._open) <= 1  # type: ignore[attr-defined]


def test_large_indices_are_not_kept(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eleven offsets fit, but no third; the one in use stays even where it does not."""
    for limit, kept in ((2 * 11 * 8, 2), (1, 1)):
        monkeypatch.setattr(stream, "_KEPT_BYTES", limit)
        reader = ShardReader(packed["detection"], read_manifest(packed["detection"]))
        for sample in (0, 1, 10, 20, 0, 20, 10):
            assert reader.read(sample).key == f"{sample:09d}"
        assert len(reader._kept) == kept


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


def test_verify_decodes_every_kind_and_counts_what_it_has_done(packed: dict[str, Path]) -> None:
    """Progress from the first file hashed: three shards and their indices, then twenty-two samples."""
    seen: list[tuple[int, int]] = []
    for folder in packed.values():
        assert verify(folder, lambda done, total: seen.append((done, total))).ok
    assert seen == [(i + 1, 28) for i in range(28)] * 3


def test_metadata_is_json_with_boxes_of_this_image(packed: dict[str, Path]) -> None:
    reader = ShardReader(packed["detection"], read_manifest(packed["detection"]))
    metadata = json.loads(reader.read(5).members["json"])
    assert metadata["annotations"][0]["segmentation"]["size"] == [metadata["height"], metadata["width"]]
