"""A short way through the headers of plain tars: all that packers write for a sample of two or three files.

Opening a ``tarfile`` for each sample costs several times what reading its bytes does. This parser takes only members
that are beyond doubt, and says so when there is anything else: then ``tarfile`` decides what it is.
"""

from __future__ import annotations

import re
from zlib import adler32

BLOCK = 512
_NAME, _CHECKSUM, _PREFIX = slice(0, 100), slice(148, 156), slice(345, 500)
# One number of 8 bytes, as GNU tar, BSD tar, Go and Python write it: octal, ended by NUL or space.
_NUMBER = rb"[0-7]{6}[0-7 \0][ \0]"
_HEADER = re.compile(
    rb"[^\0].{99}"  # name
    + 3 * _NUMBER  # mode, user, group
    + rb"([0-7]{11})[ \0]"  # size
    + rb"[0-7]{11}[ \0]"  # time
    + rb"([0-7]{6})[ \0]{2}"  # checksum
    + rb"[0\0]"  # a plain file
    + rb".{100}"  # target of a link
    + rb"(?:ustar\x0000|ustar  \0)"
    + rb".{64}"  # names of user and group
    + rb"(?:%b|\0{8}){2}" % _NUMBER  # device
    + rb".{167}",  # prefix, padding
    re.DOTALL,
)


def plain_members(data: bytes) -> list[tuple[str, int, int]] | None:
    """The members of a part of a tar, if all of them are plain files with plain headers and nothing else is there.

    Plain is: ustar or GNU magic, right checksum, octal numbers, a name within the header, all bytes and the padding
    present. What is given then is exactly what ``tarfile`` finds. Links, folders, devices, sparse files, extended
    headers, base-256 numbers, damage, an end-of-archive mark and anything unheard-of are not for this function.

    Args:
        data: from a header to the end of a member's padding.

    Returns:
        (name, first byte, end) of each member in ``data``; ``None``: ask ``tarfile``.
    """
    found: list[tuple[str, int, int]] = []
    offset, length = 0, len(data)
    while offset < length:
        match = _HEADER.match(data, offset)
        if match is None:
            return None
        header = match[0]
        # Adler-32's low half is 1 + the sum of the bytes modulo 65521, which 256 bytes do not reach: a sum at C speed.
        total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
        if total - sum(header[_CHECKSUM]) + 8 * 0x20 != int(match[2], 8):
            return None
        first = offset + BLOCK
        end = first + int(match[1], 8)
        offset = end + -end % BLOCK
        if offset > length:
            return None
        name = header[_NAME].partition(b"\0")[0]
        if header[345]:
            name = header[_PREFIX].partition(b"\0")[0] + b"/" + name
        if name[-1] == 0x2F:
            # A folder in the oldest format, which knows no types.
            return None
        # As tarfile decodes names on systems of UTF-8.
        found.append((name.decode("utf-8", "surrogateescape"), first, end))
    return found
