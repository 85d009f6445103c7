"""Samples of an untrusted tar, found by its headers alone, each checked."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.stream import MAX_SAMPLE_BYTES, is_hidden_member, member_name

MAX_HEADER_BYTES = 1 << 20
"""Limit of a member's extended header data beyond its 512 bytes of header (long names, times)."""
MAX_SAMPLES = 2_000_000
"""In one tar: their keys are held in memory."""


class Member(NamedTuple):
    """Position of a member's data in its tar, in bytes."""

    offset: int
    size: int


@dataclass
class Group:
    """The members of one sample, which lie together at bytes start..end."""

    key: str
    start: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)


def scan_tar(path: Path, where: str, pass_over: Callable[[str], None] = lambda _: None) -> Iterator[Group]:
    """Yield the samples of a tar by its headers alone, in order.

    Args:
        pass_over: told the names of hidden members, which are of no sample.

    Raises:
        DataError: not a plain tar, or one with anything but files and folders with relative names, sizes that cannot
            be, or members of a sample apart or twice.
    """
    size = path.stat().st_size
    keys: set[str] = set()
    group: Group | None = None
    try:
        with tarfile.open(path, mode="r:", tarinfo=_BoundedTarInfo) as tar:
            while (member := tar.next()) is not None:
                # tarfile collects all members, as if there were few.
                tar.members = []  # type: ignore[attr-defined]
                _check_member(member, size, where)
                if member.isdir():
                    continue
                if member.isreg() and is_hidden_member(member.name):
                    pass_over(member.name)
                    continue
                key, extension = member_name(member.name)
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    if key in keys:
                        raise DataError(f"{where}: key {key[:80]!r} occurs twice, apart; sort the tar by name")
                    if len(keys) >= MAX_SAMPLES:
                        raise DataError(f"{where}: more than {MAX_SAMPLES} samples; split the tar")
                    keys.add(key)
                    group = Group(key, member.offset, member.offset)
                if extension in group.members:
                    raise DataError(f"{where}: member {member.name[:80]!r} occurs twice; write the tar again")
                group.members[extension] = Member(member.offset_data, member.size)
                group.end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            end = tar.offset
    except (tarfile.TarError, ValueError, UnicodeError, EOFError, RecursionError) as error:
        raise DataError(f"{where}: not a readable tar ({error}); expected one without compression") from None
    # tarfile takes damaged headers behind the first for the end, and passes over what follows it.
    with path.open("rb") as stream:
        stream.seek(end)
        while block := stream.read(1 << 20):
            if block.strip(b"\0"):
                raise DataError(f"{where}: no tar header at byte {end} of {size}: damaged or joined; write it again")
    if group is not None:
        yield group


class _BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers about headers that are too large before tarfile reads them into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedTarInfo:
        found = super().frombuf(buf, encoding, errors)
        if found.type == tarfile.XGLTYPE:
            raise tarfile.ReadError("a global pax header, which would change all members after it")
        special = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        # Of less than nothing, tarfile would read all that follows.
        if found.type in special and not 0 <= found.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"{found.size} bytes of extended header")
        return found


def _check_member(member: tarfile.TarInfo, tar_bytes: int, where: str) -> None:
    name = member.name
    shown_name = repr(name[:80])
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise DataError(
            f"{where}: member {shown_name}: expected a relative path that stays inside; write the tar again"
        )
    if member.isdir():
        return
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "a special or sparse file"
        raise DataError(f"{where}: member {shown_name} is {kind}; expected plain files, write the tar again")
    left = tar_bytes - member.offset_data
    if not 0 <= member.size <= min(MAX_SAMPLE_BYTES, left):
        raise DataError(
            f"{where}: member {shown_name} declares {member.size} bytes, {max(left, 0)} follow and "
            f"{MAX_SAMPLE_BYTES} are allowed; copy the tar again or leave the member out"
        )
    key, extension = member_name(name)
    if is_hidden_member(name):
        return
    if not extension or key.endswith("/") or not key:
        raise DataError(f"{where}: member {shown_name}: expected KEY.EXTENSION; leave it out of the tar")
