"""The short way through tar headers finds what tarfile finds, or leaves it to tarfile."""

from __future__ import annotations

import io
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from vitgraft.data_shards.ustar import BLOCK, plain_members

Found = list[tuple[str, bytes]]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def ours(data: bytes) -> Found | None:
    found = plain_members(data)
    return None if found is None else [(name, data[first:end]) for name, first, end in found]


def theirs(data: bytes) -> Found | None:
    """What tarfile finds; ``None``: it refuses, or finds what is no plain file."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    return None
                stream = tar.extractfile(member)
                assert stream is not None
                found.append((member.name, stream.read()))
    except (tarfile.TarError, ValueError, EOFError):
        return None
    return found


def written(members: Found, format: int = tarfile.USTAR_FORMAT, mtime: float = 0, uid: int = 0) -> bytes:
    """The members as tarfile writes them, without the blocks at the end."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = len(data), mtime, uid
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return stream.getvalue()[:end]


def with_checksum(header: bytes) -> bytes:
    """A header with the checksum that its bytes have."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


PLAIN = st.text("abcXYZ019._-é", min_size=1, max_size=40).filter(lambda name: not name.endswith("/"))
NAMES = st.one_of(PLAIN, st.text("ab/.é\udcff\n ", min_size=1, max_size=150), st.text(min_size=1, max_size=60))
CONTENTS = st.one_of(st.binary(max_size=40), st.integers(500, 530).map(bytes))


@given(st.lists(st.tuples(PLAIN, CONTENTS), min_size=1, max_size=4), st.sampled_from(FORMATS[:2]))
def test_plain_members_need_no_tarfile(members: Found, format: int) -> None:
    data = written(members, format)
    assert ours(data) == theirs(data) == members


@given(
    st.lists(st.tuples(NAMES, CONTENTS), min_size=1, max_size=3),
    st.sampled_from(FORMATS),
    st.sampled_from([0, 1.5, -1, 8**11]),
    st.sampled_from([0, 8**7 - 1, 8**7]),
)
def test_what_is_found_is_what_tarfile_finds(members: Found, format: int, mtime: float, uid: int) -> None:
    try:
        data = written(members, format, mtime, uid)
    except (ValueError, UnicodeEncodeError):
        # The format cannot hold it.
        return
    found = ours(data)
    assert found is None or found == theirs(data)


def test_webdatasets_own_writer_writes_what_is_found() -> None:
    stream = io.BytesIO()
    writer = webdataset.TarWriter(stream, encoder=False, mtime=0)
    writer.write({"__key__": "a/b", "jpg": b"1" * 700, "json": b"{}"})
    end = writer.tarstream.offset
    writer.close()
    assert ours(stream.getvalue()[:end]) == [("a/b.jpg", b"1" * 700), ("a/b.json", b"{}")]


TWO = written([("000000007.jpg", b"\xff" * 600), ("000000007.json", b"{}")])
HEADERS = (0, 3 * BLOCK)
"""Where the headers of TWO begin."""


@settings(max_examples=400)
@given(
    st.sampled_from(FORMATS[:2]),
    st.lists(st.tuples(st.sampled_from(HEADERS), st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=3),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, len(TWO))),
)
def test_changed_bytes_are_found_as_tarfile_finds_them_or_not_at_all(
    format: int, changes: list[tuple[int, int, int]], repair: bool, cut: int | None
) -> None:
    """With the checksums made to fit, too."""
    data = bytearray(written([("000000007.jpg", b"\xff" * 600), ("000000007.json", b"{}")], format))
    for start, place, value in changes:
        data[start + place] = value
    if repair:
        for start in HEADERS:
            data[start : start + BLOCK] = with_checksum(bytes(data[start : start + BLOCK]))
    changed = bytes(data[:cut])
    found = ours(changed)
    if found:
        assert found == theirs(changed)


FIELDS = {"name": 0, "mode": 100, "size": 124, "checksum": 148, "type": 156, "magic": 257, "prefix": 345}


@settings(max_examples=300)
@given(st.sampled_from(list(FIELDS)), st.one_of(st.binary(max_size=16), st.text("01 7\0", max_size=12)))
def test_fields_of_any_content_are_found_as_tarfile_finds_them_or_not_at_all(field: str, content: bytes | str) -> None:
    text = content.encode() if isinstance(content, str) else content
    start = FIELDS[field]
    data = with_checksum(TWO[:start] + text + TWO[start + len(text) : BLOCK]) + TWO[BLOCK:]
    if field == "checksum":
        data = TWO[:start] + text + TWO[start + len(text) :]
    found = ours(data)
    if found:
        assert found == theirs(data)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"g", b"x", b"L", b"K", b"S", b"Z"])
def test_other_kinds_of_members_are_left_to_tarfile(kind: bytes) -> None:
    assert ours(with_checksum(TWO[:156] + kind + TWO[157:BLOCK]) + TWO[BLOCK:]) is None


@pytest.mark.parametrize(
    "data",
    [TWO[:-1], TWO[:-512], TWO[: BLOCK - 1], TWO + bytes(1024), bytes(BLOCK), b"\xff" * 1024, TWO[BLOCK:]],
    ids=["byte missing", "block missing", "header cut", "end of archive", "zeros", "ones", "not at a header"],
)
def test_what_is_cut_or_no_header_is_left_to_tarfile(data: bytes) -> None:
    assert ours(data) is None


def test_a_sum_of_bytes_that_is_right_only_modulo_adlers_prime_is_none() -> None:
    header = bytearray(TWO[:BLOCK])
    header[1:100] = b"\xff" * 99
    header[157:257] = b"\xff" * 100
    header[345:512] = b"\xff" * 167
    honest = with_checksum(bytes(header))
    total = int(honest[148:154], 8)
    assert total > 65521
    assert ours(honest + TWO[BLOCK:]) is not None
    lying = honest[:148] + b"%06o\0 " % (total - 65521) + honest[156:]
    assert ours(lying + TWO[BLOCK:]) is None


def test_a_long_name_in_two_fields() -> None:
    name = "folder/" * 15 + "000000001.json"
    data = written([(name, b"{}")])
    assert data[345]
    assert ours(data) == [(name, b"{}")]
