"""The hand-over buffer and the layout of the files that it holds."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, load_file
from safetensors.numpy import save as official_save
from support_writers import make_ranks, memfd

from vitgraft.trainer.checkpoint.files import write_safetensors
from vitgraft.trainer.checkpoint.handover import Answer, Control, HandoverBuffer, place_files
from vitgraft.trainer.checkpoint.image import lay_out
from vitgraft.trainer.checkpoint.memory import available_memory

TENSORS = {
    "z": np.array(7),
    "flags": np.array([True, False, True]),
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(3, np.float16),
    "a": np.zeros((0, 2), np.float32),
}


def control(sequence: int, step: int = 1, manifest: str | None = None) -> Control:
    return Control(sequence=sequence, step=step, last_step=9, world=1, rank=0, files=[], manifest=manifest)


def test_files_are_what_the_official_writer_writes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", TENSORS)
    ours, theirs = (tmp_path / "x").read_bytes(), official_save(TENSORS)
    length = int.from_bytes(ours[:8], "little")
    assert (8 + length) % 64 == 0
    assert ours[8 + length :] == theirs[8 + int.from_bytes(theirs[:8], "little") :]
    assert load(ours).keys() == TENSORS.keys()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5), st.tuples(st.sampled_from(["F32", "I64", "U8"]), st.integers(0, 9))
    )
)
def test_a_layout_has_neither_gaps_nor_overlaps_and_aligned_tensors(shapes: dict[str, tuple[str, int]]) -> None:
    image = lay_out({name: (dtype, [numel]) for name, (dtype, numel) in shapes.items()})
    widths = {"F32": 4, "I64": 8, "U8": 1}
    position = len(image.header)
    for name, offset in image.offsets.items():
        dtype, numel = shapes[name]
        assert offset == position
        assert offset % widths[dtype] == 0
        position += widths[dtype] * numel
    assert position == image.size


def test_what_one_side_writes_the_other_side_reads(tmp_path: Path) -> None:
    _, path = memfd()
    assert HandoverBuffer.attach(path) is None
    parts, size = place_files({"a": 5, "b": 4096, "c": 1})
    assert [(part.path, part.offset) for part in parts] == [("a", 0), ("b", 4096), ("c", 8192)]
    rank = HandoverBuffer.create(path, 100, size)
    role = HandoverBuffer.attach(path)
    assert role is not None
    assert role.control(0) is None
    assert rank.answered() is None
    rank.payload[:5] = b"hello"
    rank.hand_over(control(1))
    assert bytes(role.payload[:5]) == b"hello"
    assert role.control(0) == control(1)
    assert role.control(1) is None
    role.answer(Answer(sequence=1, step=1, error="x" * 20_000))
    answer = rank.wait(1)
    assert answer.error == "x" * 1000
    with pytest.raises(TypeError):
        role.payload[:1] = b"!"
    with pytest.raises(OSError, match="a record of"):
        rank.hand_over(control(2, manifest="y" * 10_000))


def test_a_stopped_holder_of_the_lock_stops_nobody_who_looks() -> None:
    descriptor, path = memfd()
    rank = HandoverBuffer.create(path, 100, 1)
    rank.hand_over(control(1))
    role = HandoverBuffer.attach(path)
    assert role is not None
    other = os.open(path, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    started = time.monotonic()
    assert role.control(0) is None
    assert rank.answered() is None
    assert time.monotonic() - started < 1
    fcntl.flock(other, fcntl.LOCK_UN)
    assert role.control(0) == control(1)
    os.close(descriptor)


@pytest.mark.parametrize("step", [2, 1000], ids=["same length", "other length"])
def test_a_rank_killed_between_text_and_number_has_handed_nothing_over(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    descriptor, path = memfd()
    rank = HandoverBuffer.create(path, 1000, 10)
    role = HandoverBuffer.attach(path)
    assert role is not None
    rank.hand_over(control(1, step=1))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: real(*a) if len(a[1]) != 16 else 0)
    rank.hand_over(control(2, step=step))
    assert role.control(0) is None
    monkeypatch.undo()
    rank.hand_over(control(2, step=step))
    assert role.control(0) == control(2, step=step)
    os.close(descriptor)


def test_pages_are_there_before_the_first_save() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    size, before = 64 << 20, resident()
    buffer = HandoverBuffer.create(memfd()[1], 100, size)
    assert resident() - before > 0.95 * size
    assert not any(buffer.payload[:: 1 << 20])


def test_a_buffer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"vitgraft" + b"\xff" * 100)
    with pytest.raises(ValueError, match="not a hand-over buffer"):
        HandoverBuffer.attach(str(tmp_path / "x"))


def test_a_tensor_of_the_buffer_is_written_as_it_lies(tmp_path: Path) -> None:
    """torch copies into the payload; its bytes alone are then a file that the library reads."""
    image = lay_out({"w": ("F32", [3]), "n": ("I64", [])})
    buffer = HandoverBuffer.create(memfd()[1], 100, image.size)
    buffer.payload[: len(image.header)] = image.header
    for name, dtype, shape, value in (("w", torch.float32, (3,), [1.0, 2.0, 3.0]), ("n", torch.int64, (), 5)):
        start = buffer.payload_start + image.offsets[name]
        numel = int(np.prod(shape))
        place = torch.frombuffer(buffer.mapped, dtype=dtype, count=numel, offset=start).view(shape)
        place.copy_(torch.tensor(value, dtype=torch.bfloat16 if dtype.is_floating_point else dtype))
    (tmp_path / "x").write_bytes(buffer.payload[: image.size])
    found = load_file(tmp_path / "x")
    assert found["w"].tolist() == [1, 2, 3]
    assert found["n"].tolist() == 5


def test_memory_is_counted() -> None:
    assert 1 << 20 < available_memory() < 1 << 50


def test_the_checkpointer_needs_no_torch_and_starts_at_once() -> None:
    code = "import sys, vitgraft.trainer.checkpointer; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fake_ranks_are_like_ranks(tmp_path: Path) -> None:
    ranks, _ = make_ranks(tmp_path, 2)
    ranks[1].hand_over(3)
    part = ranks[1].parts[0]
    found = load(bytes(ranks[1].buffer.payload[part.offset : part.offset + part.bytes]))
    assert found["master|w|5"].tolist() == [15, 18, 21, 24, 27]
