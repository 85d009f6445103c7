"""What is tried with damaged tars, indices and arrays, and the whole ones that are damaged."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitgraft.configs.errors import VitgraftError
from vitgraft.data_shards.foreign import index_tars
from vitgraft.data_shards.manifest import Foreign, dump_manifest, make_manifest, read_manifest
from vitgraft.data_shards.pack.imagefolder import pack_arrays
from vitgraft.data_shards.report import verify
from vitgraft.data_shards.shards import Shard
from vitgraft.data_shards.stream import ShardReader

BLOCK = tarfile.BLOCKSIZE
_KINDS = ("image", "semantic", "detection")


def try_foreign_tar(data: bytes, generator: random.Random) -> None:
    """Index a tar of somebody else, then read and verify what was taken of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.tar").write_bytes(_with_checksums(data) if generator.random() < 0.8 else data)
        index_tars(folder, generator.choice(_KINDS), ["x", "y"], on_error=generator.choice(("raise", "skip")))  # type: ignore[arg-type]
        _read_all(folder)


def try_own_set(data: bytes, generator: random.Random) -> None:
    """Read a packed set whose manifest vouches for its bytes: the tar, then the index, then rows of the manifest."""
    split = int.from_bytes(data[:4], "little") % (len(data) + 1)
    tar, index = data[4:split], data[split:]
    if generator.random() < 0.8:
        tar = _with_checksums(tar)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shard-000000.tar").write_bytes(tar)
        (folder / "shard-000000.idx").write_bytes(index)
        shard = Shard(
            name="shard-000000.tar",
            samples=generator.choice((max(1, len(index) // 8 - 1), 3)),
            bytes=max(1, len(tar)),
            sha256=sha256(tar).hexdigest(),
            index_sha256=sha256(index).hexdigest(),
        )
        manifest = make_manifest(generator.choice(_KINDS), ["x", "y"], None, [shard], {})  # type: ignore[arg-type]
        (folder / "manifest.json").write_text(dump_manifest(manifest))
        _read_all(folder)


@functools.cache
def _indexed() -> tuple[bytes, bytes, Foreign | None]:
    """A foreign tar, its index, and what the manifest says of them."""
    with tempfile.TemporaryDirectory() as name:
        tar = _tar_of_images()
        (Path(name) / "a.tar").write_bytes(tar)
        foreign = index_tars(Path(name), "image", ["x", "y"]).foreign
        return tar, (Path(name) / "a.idx").read_bytes(), foreign


def try_index_of_foreign_tar(data: bytes, generator: random.Random) -> None:
    """Read a set of foreign tars whose index was exchanged together with its hash."""
    tar, _, foreign = _indexed()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.tar").write_bytes(tar)
        (folder / "a.idx").write_bytes(data)
        shard = Shard(
            name="a.tar",
            samples=generator.choice((3, 3, max(1, len(data) // 24))),
            bytes=len(tar),
            sha256=sha256(tar).hexdigest(),
            index_sha256=sha256(data).hexdigest(),
            index_size=max(1, len(data)),
        )
        manifest = make_manifest("image", ["x", "y"], None, [shard], {}, foreign)
        (folder / "manifest.json").write_text(dump_manifest(manifest))
        _read_all(folder)


def try_arrays(data: bytes, generator: random.Random) -> None:
    """Pack an .npz or .npy, whole files or one array of a sound archive."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if data[:2] == b"PK":
            (folder / "a.npz").write_bytes(data)
            pack_arrays(folder / "a.npz", folder / "set")
        elif generator.random() < 0.5:
            labels = _npy(np.zeros(5, np.int64))
            images, other = (data, labels) if generator.random() < 0.7 else (_npy(_pixels()), data)
            with zipfile.ZipFile(
                folder / "a.npz", "w", generator.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            ) as z:
                z.writestr("images.npy", images)
                z.writestr("labels.npy", other)
            pack_arrays(folder / "a.npz", folder / "set")
        else:
            (folder / "x.npy").write_bytes(data)
            (folder / "y.npy").write_bytes(_npy(np.zeros(5, np.int64)))
            pack_arrays(folder / "x.npy", folder / "set", labels=folder / "y.npy")


def _read_all(folder: Path) -> None:
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest)
    for number in range(min(len(reader), 20)):
        with contextlib.suppress(VitgraftError):
            reader.read(number)
    report = verify(folder)
    for line in [*report.bad_files, *report.bad_samples.values()]:
        assert "\n" not in line, line


def _with_checksums(data: bytes) -> bytes:
    """The same with the checksum of every block that may be a header, or damage there would end each trial."""
    found = bytearray(data)
    for start in range(0, len(found) - BLOCK + 1, BLOCK):
        block = found[start : start + BLOCK]
        if block[257:262] == b"ustar":
            total = sum(block[:148]) + sum(block[156:]) + 8 * 32
            found[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(found)


def _picture(form: str, value: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("L" if form == "PNG" else "RGB", (8, 6), 1 if form == "PNG" else (value,) * 3).save(stream, form)
    return stream.getvalue()


def _tar_of_images(format: int = tarfile.PAX_FORMAT, prefix: str = "") -> bytes:
    box = {"annotations": [{"bbox": [1, 1, 3, 2], "class": "x"}]}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for key in ("a", "b", "c"):
            for extension, data in (
                ("jpg", _picture("JPEG")),
                ("cls", b"1"),
                ("seg.png", _picture("PNG")),
                ("json", json.dumps(box).encode()),
            ):
                info = tarfile.TarInfo(f"{prefix}{key}.{extension}")
                info.size, info.mtime = len(data), 1700000000.25
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def tars() -> list[bytes]:
    """Small tars of images in the formats that there are, with long names too."""
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    return [_tar_of_images(format, prefix) for format in formats for prefix in ("", "./", "n" * 90 + "/" + "m" * 60)]


def own_sets() -> list[bytes]:
    """The tar and the index of a packed set, one behind the other, with the place of the second before them."""
    from vitgraft.data_shards.pack.writer import DatasetWriter

    found = []
    with tempfile.TemporaryDirectory() as name:
        for kind, label in (("image", {"label": 1}), ("detection", {"annotations": []}), ("semantic", {})):
            folder = Path(name) / kind
            with DatasetWriter(folder, kind, ["x", "y"]) as writer:  # type: ignore[arg-type]
                for _ in range(3):
                    members = {"jpg": _picture("JPEG")} | ({"label.png": _picture("PNG")} if kind == "semantic" else {})
                    writer.add(members, {"file_name": "a.jpg", "height": 6, "width": 8, **label})
            tar, index = ((folder / f"shard-000000.{end}").read_bytes() for end in ("tar", "idx"))
            found.append((4 + len(tar)).to_bytes(4, "little") + tar + index)
    return found


def indices() -> list[bytes]:
    """Indices of foreign tars."""
    return [_indexed()[1]]


def _pixels() -> np.ndarray:
    return np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


def _npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), version=version)
    return stream.getvalue()


def arrays() -> list[bytes]:
    """Archives and arrays, of pickled objects too."""
    found = [_npy(_pixels(), version) for version in ((1, 0), (2, 0), (3, 0))]
    found += [_npy(np.zeros(5, np.int64)), _npy(np.asfortranarray(_pixels())), _npy(np.array([{}, 1], object))]
    for save in (np.savez, np.savez_compressed):
        save_to: Callable[..., None] = save
        stream = io.BytesIO()
        save_to(stream, images=_pixels(), labels=np.array([0, 1, 2, 1, 0]))
        found.append(stream.getvalue())
    return found
