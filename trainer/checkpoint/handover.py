"""The hand-over buffer: memory that a rank and its host's checkpointer share, so that a rank only copies.

The launcher makes one memfd for each rank (no name that could be left behind, freed by the kernel with its last holder)
and tells both sides its path in /proc; each opens its own. Layout: header | control record | answer record | payload.
The rank writes payload and control record, the checkpointer the answer; both take the file's lock for a record, and the
system calls around it order the payload's bytes too. One save is outstanding at most: the one whose sequence number is
not answered yet.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

BUFFER_VARIABLE = "VITGRAFT_HANDOVER"
"""Environment variable with the path of a rank's buffer."""
_MAGIC = b"vitgraft"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ")  # magic, version, bytes of the control record, where the payload begins, its bytes
_RECORD = struct.Struct("<QQ")  # sequence number, bytes of the text that follows
_CONTROL = 4096
_ANSWER_BYTES = 8192
_PAGE = mmap.PAGESIZE
_POLL_S = 0.002


class FilePart(BaseModel):
    """A file in the payload: its bytes lie from ``offset`` on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    offset: int
    bytes: int


class Control(BaseModel):
    """What a rank hands over. ``manifest``: the draft as JSON text, from rank 0 alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int
    step: int
    last_step: int
    world: int
    rank: int
    files: list[FilePart]
    manifest: str | None = None


class Answer(BaseModel):
    """What became of it. ``error``: one line, or ``None`` when it is committed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int
    step: int
    error: str | None = None


_Record = TypeVar("_Record", Control, Answer)


class HandoverBuffer:
    """One side's view of a buffer. ``payload``: its bytes, shared with the other side."""

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        magic, version, capacity, start, size = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError("not a hand-over buffer of this version")
        self._descriptor, self._capacity, self.payload_start = descriptor, capacity, start
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # Every page is there and mapped before the first save.
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if writable else 0)
        self.mapped = mmap.mmap(descriptor, start + size, flags=flags, prot=access)
        self.payload = memoryview(self.mapped)[start : start + size]

    @classmethod
    def create(cls, path: str, control_bytes: int, payload_bytes: int) -> HandoverBuffer:
        """Lay the buffer out; the rank's side.

        Raises:
            OSError: it cannot be opened, or there is not enough memory.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            capacity = _pages(control_bytes)
            start = _CONTROL + capacity + _ANSWER_BYTES
            os.posix_fallocate(descriptor, 0, start + max(1, payload_bytes))
            header = _HEADER.pack(_MAGIC, _VERSION, capacity, start, max(1, payload_bytes))
            with _locked(descriptor, fcntl.LOCK_EX):
                os.pwrite(descriptor, header, 0)
            return cls(descriptor, writable=True)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, path: str) -> HandoverBuffer | None:
        """The checkpointer's side; ``None`` while the rank has not laid it out.

        Raises:
            OSError: it cannot be opened.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with _locked(descriptor, fcntl.LOCK_SH):
            ready = os.fstat(descriptor).st_size > 0 and os.pread(descriptor, len(_MAGIC), 0) == _MAGIC
        if not ready:
            os.close(descriptor)
            return None
        return cls(descriptor, writable=False)

    def hand_over(self, control: Control) -> None:
        """Give the payload, copied before, to the checkpointer.

        Raises:
            OSError: the record is larger than what was reserved for it.
        """
        self._write(_CONTROL, self._capacity, control)

    def answer(self, answer: Answer) -> None:
        """Tell the rank; it may copy again."""
        short = answer.model_copy(update={"error": answer.error and answer.error[:1000]})
        self._write(_CONTROL + self._capacity, _ANSWER_BYTES, short)

    def control(self, after: int) -> Control | None:
        """What was handed over after that number; ``None``: nothing yet, or the other side is writing it, or was
        killed between text and number, so that they do not belong together."""
        return _whole(Control, *self._read(_CONTROL, after))

    def answered(self, after: int = 0, *, wait: bool = False) -> Answer | None:
        """What was answered after that sequence number; ``None``: nothing yet, or the other side is writing it, which
        ``wait`` waits for. An answer whose writer was killed between text and number is none: what it was about is
        still outstanding."""
        return _whole(Answer, *self._read(_CONTROL + self._capacity, after, wait=wait))

    def wait(self, sequence: int) -> Answer:
        """The answer to a hand-over. Waits for as long as it takes: the launcher watches the checkpointer."""
        while True:
            answer = self.answered(sequence - 1)
            if answer is not None:
                return answer
            time.sleep(_POLL_S)

    def _write(self, offset: int, capacity: int, record: Control | Answer) -> None:
        text = record.model_dump_json().encode()
        if len(text) > capacity - _RECORD.size:
            raise OSError(errno.EFBIG, f"a record of {len(text)} bytes for a place of {capacity}")
        with _locked(self._descriptor, fcntl.LOCK_EX):
            # The number last: a side that is killed in the middle of a long text leaves nothing that counts.
            os.pwrite(self._descriptor, text, offset + _RECORD.size)
            os.pwrite(self._descriptor, _RECORD.pack(record.sequence, len(text)), offset)

    def _read(self, offset: int, after: int, *, wait: bool = False) -> tuple[int, bytes]:
        # Whoever holds the lock may have been stopped, which must not stop this side too.
        how = fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB
        with contextlib.suppress(BlockingIOError), _locked(self._descriptor, how):
            sequence, length = _RECORD.unpack(os.pread(self._descriptor, _RECORD.size, offset))
            if sequence > after:
                return sequence, os.pread(self._descriptor, length, offset + _RECORD.size)
        return 0, b""


def _whole(kind: type[_Record], sequence: int, text: bytes) -> _Record | None:
    with contextlib.suppress(ValueError):
        record = kind.model_validate_json(text)
        return record if record.sequence == sequence else None
    return None


@contextlib.contextmanager
def _locked(descriptor: int, how: int) -> Iterator[None]:
    fcntl.flock(descriptor, how)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _pages(size: int) -> int:
    return -(-(size + _RECORD.size) // _PAGE) * _PAGE


def place_files(sizes: dict[str, int]) -> tuple[list[FilePart], int]:
    """Where each file lies in the payload, at the start of a page, and the bytes of the payload."""
    parts, offset = [], 0
    for path, size in sizes.items():
        parts.append(FilePart(path=path, offset=offset, bytes=size))
        offset += -(-size // _PAGE) * _PAGE
    return parts, offset
