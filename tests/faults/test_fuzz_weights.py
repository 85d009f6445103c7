"""Damaged and crafted files of weights, by the thousand: each loads or is answered with one line.

``make soak``; ``SOAK_SEED`` chooses the files, ``SOAK_SECONDS`` how long. Every file is a function of the seed and its
number, both of which a failure names.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import resource
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor

from vitgraft.configs.errors import VitgraftError
from vitgraft.configs.schema.model import BackboneConfig
from vitgraft.models.build import registry
from vitgraft.models.weights import load_trunk

SEED = int(os.environ.get("SOAK_SEED", "0"))
SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
MEMORY = 768 << 20
"""What the process that reads may take beyond what it has at first."""
PATIENCE = 30.0
"""Seconds in which any of these files, of some 100 kB, is read on a busy machine."""
SECTION = {"name": "vit", "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    255,
    256,
    65535,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    -(1 << 63),
)
VALUES: list[Any] = [
    *NUMBERS,
    (1 << 64) - 1,
    1e308,
    -0.5,
    None,
    True,
    "",
    "F32",
    "BF16",
    "x" * 300,
    "\x00",
    [],
    {},
    [0],
]


def trunk() -> Any:
    config: Any = TypeAdapter(BackboneConfig).validate_python(SECTION)
    return registry.build("backbone", config, image_size=(8, 8))


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def flipped(data: bytes, draw: Random) -> bytes:
    """A few bytes changed, cut out, put in, or doubled."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(result) + 1)
        match draw.randrange(6):
            case 0:
                result[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del result[place : place + draw.choice((1, 2, 8, 1000))]
            case 2:
                result[place:place] = draw.randbytes(draw.choice((1, 4, 9)))
            case 3:
                size = draw.choice((1, 2, 4, 8))
                result[place : place + size] = (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
            case 4:
                end = place + draw.choice((1, 10, 500))
                other = draw.randrange(len(result) + 1)
                result[other:other] = result[place:end]
            case _:
                if not draw.randrange(4):
                    del result[place:]
    return bytes(result)


def repickled(program: bytes, draw: Random) -> bytes:
    """The instructions of a pickle, some of them left out, doubled, swapped, or with another argument."""
    places = [position for _, _, position in pickletools.genops(program)] + [len(program)]
    parts = [program[begin:end] for begin, end in pairwise(places)]
    for _ in range(draw.choice((1, 2, 5))):
        index, other = draw.randrange(len(parts)), draw.randrange(len(parts))
        match draw.randrange(5):
            case 0:
                parts[index] = b""
            case 1:
                parts[index] *= draw.choice((2, 100))
            case 2:
                parts[index], parts[other] = parts[other], parts[index]
            case 3:
                parts[index] = parts[other]
            case _:
                parts[index] = argument(draw)
    return b"".join(parts)


def argument(draw: Random) -> bytes:
    """An instruction that puts something on the stack."""
    value = draw.choice((*VALUES, (), (1,), b"", b"abcd", 1 << 200, "blocks.0.norm1.weight"))
    return pickle.dumps(value, 2)[2:-1]


def invented(draw: Random) -> bytes:
    """A pickle of instructions drawn at random."""
    codes = [i.code.encode("latin1") for i in pickletools.opcodes]
    program = b"\x80\x02"
    for _ in range(draw.choice((3, 30, 300))):
        program += argument(draw) if draw.randrange(2) else draw.choice(codes)
        if not draw.randrange(5):
            program += draw.randbytes(draw.choice((1, 4)))
    return program + b"."


def rezipped(data: bytes, draw: Random) -> bytes:
    """An archive with another pickle, and storages of other sizes and names."""
    source, stream = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    method = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(stream, "w", method) as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = repickled(content, draw) if draw.randrange(4) else invented(draw)
            elif not draw.randrange(20):
                content = draw.choice((b"", content[:-1], content * 3, bytes(1 << 20)))
            if draw.randrange(40):
                target.writestr(name, content)
    whole = stream.getvalue()
    return whole if draw.randrange(4) else flipped(whole, draw)


def retabled(data: bytes, draw: Random) -> bytes:
    """A .safetensors file with other values in its header."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(draw.choice((1, 2, 5))):
        name = draw.choice(list(header))
        match draw.randrange(5):
            case 0:
                header[name] = draw.choice(VALUES)
            case 1:
                header[draw.choice(("a", "", "\n", "x" * 10_000, "__metadata__"))] = header[name]
            case 2 if isinstance(header[name], dict):
                header[name][draw.choice(("dtype", "shape", "data_offsets", "more"))] = draw.choice(VALUES)
            case 3 if isinstance(header[name], dict) and isinstance(header[name].get("shape"), list):
                header[name]["shape"] = [draw.choice(NUMBERS) for _ in range(draw.choice((1, 2, 9)))]
            case _:
                del header[name]
                header["_"] = {}
    text = json.dumps(header).encode()
    if not draw.randrange(4):
        text = flipped(text, draw)
    return struct.pack("<Q", len(text) if draw.randrange(8) else draw.choice(NUMBERS) % (1 << 64)) + text + rest


def bases() -> dict[str, tuple[bytes, Callable[[bytes, Random], bytes]]]:
    """Whole files of each format, and how to make others of the same structure."""
    state: dict[str, Tensor] = {name: value.clone() for name, value in trunk().state_dict().items()}
    content = {"model": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    arrays = {"model": {name: value.numpy() for name, value in state.items()}, "score": np.float64(1)}
    return {
        "archive": (saved(content), rezipped),
        "old": (saved(content, _use_new_zipfile_serialization=False), flipped),
        "safetensors": (save(state), retabled),
        "pickle 2": (pickle.dumps(arrays, 2), repickled),
        "pickle 5": (pickle.dumps(arrays, 5), repickled),
        "pickle 0": (pickle.dumps(arrays, 0), repickled),
    }


def file_of(number: int, whole: dict[str, tuple[bytes, Callable[[bytes, Random], bytes]]]) -> bytes:
    """The file of this number."""
    draw = Random(f"{SEED} {number}")
    data, remade = whole[draw.choice(list(whole))]
    return draw.choice((remade, remade, flipped, lambda _, drawn: invented(drawn)))(data, draw)


def read_all(folder: Path, first: int, deadline: float) -> None:
    """Read one file after the other; what number is being read, and what went wrong, stands in the folder."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    whole, target, number = bases(), trunk(), first
    while time.monotonic() < deadline:
        file = folder / "weights.pth"
        file.write_bytes(file_of(number, whole))
        (folder / "number").write_text(str(number))
        try:
            load_trunk(target, file)
        except VitgraftError as error:
            said = str(error)
            if "\n" in said or len(said) > 2000 or not said.isprintable():
                raise AssertionError(f"no line: {said[:3000]!r}") from None
        number += 1


@pytest.mark.soak
def test_no_file_does_harm(tmp_path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    (tmp_path / "number").write_text("0")
    child = os.fork()
    if child == 0:
        try:
            read_all(tmp_path, 0, deadline)
            os._exit(0)
        except BaseException as error:
            import traceback

            (tmp_path / "said").write_text("".join(traceback.format_exception(error))[-5000:])
            os._exit(1)
    ended, seen, since = False, "", time.monotonic()
    while not ended:
        time.sleep(0.2)
        pid, status = os.waitpid(child, os.WNOHANG)
        ended = pid == child
        number = (tmp_path / "number").read_text() or seen
        if number != seen:
            seen, since = number, time.monotonic()
        if not ended and time.monotonic() - since > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"SOAK_SEED={SEED}: file {seen} is read for more than {PATIENCE:.0f} s")
    said = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
    print(f"{int(seen) + 1:,} files")
    assert status == 0, f"SOAK_SEED={SEED}: file {seen}: exit {os.waitstatus_to_exitcode(status)}\n{said}"
    assert int(seen) > 10 * min(SECONDS, 60)
