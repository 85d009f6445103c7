"""Files of weights made to do harm: each is answered with one line, little memory, and nothing of it is run."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support_limits import outcome

from vitgraft.models.pickles import PickleError, read_pickle
from vitgraft.models.weight_files import read_tensors

MEMORY = 512 << 20
"""What reading any file of a few megabytes may take: two million instructions of some 150 bytes, and its tensors."""


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def numpy_type(code: str, state: bytes = b"") -> bytes:
    return named("numpy", "dtype") + text(code) + b"\x89\x88\x87R" + state


def archive(program: bytes, storages: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save would write with this pickle and these storages."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        file.writestr("a/data.pkl", program)
        file.writestr("a/byteorder", "little")
        for key, data in (storages or {}).items():
            file.writestr(f"a/data/{key}", data)
    return stream.getvalue()


def tensor(offset: int, size: str, stride: str, count: int = 4) -> bytes:
    """A pickle of {"a.weight": tensor}; sizes and strides as protocol-0 integers."""

    def numbers(values: str) -> bytes:
        return b"(" + b"".join(b"I" + v.encode() + b"\n" for v in values.split()) + b"t"

    storage = (
        b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"I%d\n" % count + b"tQ"
    )
    rebuilt = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"I%d\n" % offset
    return b"\x80\x02}" + text("a.weight") + rebuilt + numbers(size) + numbers(stride) + b"\x89}tRs."


def pointer_as_object() -> bytes:
    """A dtype of objects whose flags BUILD clears, and a scalar of it out of bytes, which numpy then follows."""
    unflagged = b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    scalar = named("numpy.core.multiarray", "scalar") + numpy_type("O8", unflagged) + b"C\x08AAAAAAAA\x86R"
    return b"\x80\x03}" + text("model") + b"}" + text("a.weight") + scalar + b"ss."


def pointers_in_an_array() -> bytes:
    state = b"(K\x01K\x01\x85" + numpy_type("O8") + b"\x89C\x08AAAAAAAAtb"
    made = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R" + state
    return b"\x80\x03}" + text("a.weight") + made + b"s."


def wrong_bytes_in_an_array() -> bytes:
    state = b"(K\x01J\x00\x00\x00\x7f\x85" + numpy_type("f4") + b"\x89C\x08AAAAAAAAtb"
    made = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R" + state
    return b"\x80\x03}" + text("a.weight") + made + b"s."


def doubling(levels: int = 60) -> bytes:
    """A dictionary in which each level names the one below twice: 2^60 paths."""
    program = b"\x80\x02}q\x00"
    for level in range(1, levels):
        program += b"}q" + bytes([level]) + text("a") + b"h" + bytes([level - 1]) + b"s"
        program += text("b") + b"h" + bytes([level - 1]) + b"s"
    return program + b"."


def copied(count: int = 100_000) -> bytes:
    """A list of pairs that every instruction makes another dictionary of."""
    pairs = b"](" + b"".join(text(f"{i}") + b"N\x86" for i in range(count)) + b"e\x85q\x01"
    return b"\x80\x02" + named("collections", "OrderedDict") + b"q\x00" + pairs + b"(" + b"h\x00h\x01R" * count + b"l."


def encoded(count: int = 100_000) -> bytes:
    """A text that every instruction makes other bytes of."""
    program = b"\x80\x02" + named("_codecs", "encode") + b"q\x00" + text("x" * count) + text("latin1") + b"\x86q\x01"
    return program + b"(" + b"h\x00h\x01R" * count + b"l."


def colliding(count: int = 200_000) -> bytes:
    """A dictionary, and a memo, with keys of one hash."""
    keys = [str(i * (2**61 - 1)).encode() for i in range(count)]
    return b"\x80\x02}(" + b"".join(b"L" + key + b"L\nNp" + key + b"\n" for key in keys) + b"u."


def tables(entries: int, length: int) -> bytes:
    entry = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    data = ("{" + ",".join(entry % i for i in range(entries)) + "}").encode()
    return struct.pack("<Q", length or len(data)) + data


def overlapping() -> bytes:
    """A directory in which a thousand members are the same bytes."""
    data = archive(tensor(0, "4", "1"), {"0": bytes(1 << 20)})
    tail = data.rindex(b"PK\x05\x06")
    entry, end = data[data.rindex(b"PK\x01\x02") : tail], bytearray(data[tail:])
    many = b"".join(entry.replace(b"a/data/0", b"a/d/%04d" % i) for i in range(1000))
    (size,) = struct.unpack_from("<I", end, 12)
    struct.pack_into("<HHI", end, 8, 1003, 1003, size + len(many))
    return data[:tail] + many + bytes(end)


CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a pointer as an object": (pointer_as_object, "holds no tensors"),
    "pointers in an array": (pointers_in_an_array, "a.weight is an array of another type than plain numbers"),
    "an array of other bytes": (wrong_bytes_in_an_array, "a.weight is an array of (2130706432,) float32 with other"),
    "the same in an archive": (lambda: archive(pointer_as_object()), "holds no tensors"),
    "a memo of 2e8": (lambda: b"\x80\x02}r\x00\xc2\xeb\x0b.", "holds no tensors"),
    "a memo of 4e9": (lambda: b"\x80\x02}r\xff\xff\xff\xff.", "holds no tensors"),
    "a byte array of 2^62": (lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"x.", "cannot be read"),
    "bytes of 2^62": (lambda: b"\x80\x05\x8e" + struct.pack("<Q", 1 << 62) + b"x.", "cannot be read"),
    "bytes of 2^31": (lambda: b"\x80\x05B\xff\xff\xff\x7fx.", "cannot be read"),
    "a long of 2^31": (lambda: b"\x80\x02\x8b\xff\xff\xff\x7fx.", "cannot be read"),
    "a frame of 2^62": (lambda: b"\x80\x05\x95" + struct.pack("<Q", 1 << 62) + b"}.", "holds no tensors"),
    "3 million dictionaries": (lambda: b"\x80\x02" + b"}" * 3_000_000 + b".", "more than 2,000,000 instructions"),
    "lists in lists": (lambda: b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".", "holds a list"),
    "2^60 paths": (doubling, "holds no tensors"),
    "a dictionary in itself": (lambda: b"\x80\x02}q\x00" + text("model") + b"h\x00s.", "holds no tensors"),
    "the same in an archive of torch": (
        lambda: archive(b"\x80\x02}q\x00" + text("model") + b"h\x00s."),
        "holds no tensors",
    ),
    "a list copied often": (copied, "copies its parts many times"),
    "a text encoded often": (encoded, "copies its parts many times"),
    "keys of one hash": (colliding, "a memo index of more than 64 bits"),
    "an extension code": (lambda: b"\x80\x02\x82\x01.", "the instruction EXT1"),
    "zeros that inflate": (
        lambda: archive(tensor(0, "4", "1", 1 << 24), {"0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED),
        "bytes that unpack to",
    ),
    "members upon each other": (overlapping, "bytes that unpack to"),
    "a tensor beyond its storage": (lambda: archive(tensor(0, "5", "1"), {"0": bytes(16)}), "reaches beyond"),
    "a tensor behind its storage": (lambda: archive(tensor(1, "4", "1"), {"0": bytes(16)}), "reaches beyond"),
    "a tensor of 2^61": (lambda: archive(tensor(0, str(1 << 61), "0"), {"0": bytes(16)}), "reaches beyond"),
    "a product beyond 64 bits": (
        lambda: archive(tensor(0, f"{1 << 32} {1 << 32}", "0 0"), {"0": bytes(16)}),
        "reaches beyond",
    ),
    "a negative stride": (lambda: archive(tensor(3, "4", "-1"), {"0": bytes(16)}), "whose sizes are none"),
    "a shorter storage": (lambda: archive(tensor(0, "4", "1"), {"0": bytes(12)}), "of another size than its tensor"),
    "a storage of another name": (lambda: archive(tensor(0, "4", "1"), {"1": bytes(16)}), "not in the archive"),
    "a huge .safetensors header": (lambda: tables(1, 1 << 62), "a header longer than the file"),
    "400,000 empty tensors": (lambda: tables(400_000, 0), "of a header of"),
    "a storage of an unprintable kind": (
        lambda: archive(tensor(0, "4", "1").replace(b"FloatStorage", b"\x07loatStorage"), {"0": bytes(16)}),
        "a storage of the unknown type torch.?loatStorage",
    ),
    "a text": (lambda: b"these are no weights\n", "weights.pth is no file of weights (neither .safetensors nor"),
    "zeros": (lambda: bytes(1000), "weights.pth is no file of weights (neither .safetensors nor"),
    "a name with a newline": (lambda: b"\x80\x02}" + text("a.\nb") + b"Ns.", "holds no tensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_little_memory(case: str, tmp_path: Path) -> None:
    make, expected = CASES[case]
    file = tmp_path / "weights.pth"
    file.write_bytes(make())
    said = outcome(lambda: sorted(read_tensors(file)), memory=MEMORY)
    assert said.startswith("refused: model.backbone.weights: "), said
    assert expected in said
    assert said.isprintable()
    assert len(said) < 600 + len(str(file))


def test_what_torch_writes_is_read_whatever_the_format(tmp_path: Path) -> None:
    """The formats of torch.save, parts of storages, transposed and shared tensors, parameters, every plain type."""
    base = torch.randn(6, 5)
    state = OrderedDict(
        {
            "a.part": base[2:4, 1:],
            "a.turned": base.t(),
            "a.scalar": torch.tensor(3.5),
            "a.empty": torch.empty(0, 3),
            "a.parameter": torch.nn.Parameter(base.clone()),
            "a.permuted": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            **{
                f"a.{dtype}": torch.ones(3).to(dtype)
                for dtype in (torch.half, torch.bfloat16, torch.double, torch.int, torch.long, torch.uint8, torch.bool)
            },
        }
    )
    for zipped in (True, False):
        for protocol in (2, 4):
            torch.save(
                {"model": state, "epoch": 3},
                tmp_path / "x.pth",
                _use_new_zipfile_serialization=zipped,
                pickle_protocol=protocol,
            )
            read = read_tensors(tmp_path / "x.pth")
            assert list(read) == list(state)
            for name, value in state.items():
                assert read[name].dtype == value.dtype
                assert torch.equal(read[name], value), name


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_of_every_order(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "a.c": np.arange(6, dtype="f4").reshape(2, 3),
        "a.f": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
        "a.big": np.arange(6, dtype=">i4"),
        "a.bool": np.array([True, False]),
        "a.none": np.zeros((0, 2), "f2"),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
    read = read_tensors(tmp_path / "x.pkl")
    for name, value in arrays.items():
        assert np.array_equal(read[name].numpy(), value), name


def test_a_compressed_archive_is_read(tmp_path: Path) -> None:
    data = archive(tensor(0, "4", "1"), {"0": np.arange(4, dtype="f4").tobytes()}, zipfile.ZIP_DEFLATED)
    (tmp_path / "x.pth").write_bytes(data)
    assert read_tensors(tmp_path / "x.pth")["a.weight"].tolist() == [0, 1, 2, 3]


def test_a_pickle_of_every_kind_of_value() -> None:
    values = {"a": [1, -(2**70), 2.5, None, True, b"x" * 300, "é" * 300, (), (1,), (1, 2, 3, 4), {"b": {}}], "c": "d"}
    for protocol in range(6):
        assert read_pickle(io.BytesIO(pickle.dumps(values, protocol))) == values
    with pytest.raises(PickleError, match="damaged"):
        read_pickle(io.BytesIO(zlib.compress(b"x")))
