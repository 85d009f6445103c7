"""Packed data made to do harm: every sample is answered with one line, little memory and no file written.

Packing foreign files is tested with the packers, the network with the cache. Here the shards themselves are hostile:
their manifest, sizes and hashes are right, what they hold is not.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards import decode
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.manifest import Kind, Shard, dump_manifest, make_manifest, read_manifest
from vitgraft.data_shards.stream import ShardReader

Configure = Callable[..., DataConfig]
Member = tuple[tarfile.TarInfo, bytes]
KEY = "KEY"  # replaced by the key that the sample must have


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def declared(name: str, data: bytes, size: int, kind: bytes = tarfile.REGTYPE) -> Member:
    """A member whose header claims another size."""
    info, _ = member(name, data, kind)
    info.size = size
    return info, data


def raw(members: list[Member], key: str) -> bytes:
    """The members as they would lie in a shard, headers unchecked."""
    parts = []
    for info, data in members:
        copy = tarfile.TarInfo(info.name.replace(KEY, key))
        copy.type, copy.linkname, copy.size = info.type, info.linkname, info.size
        parts += [copy.tobuf(tarfile.GNU_FORMAT), data, b"\0" * (-len(data) % 512)]
    return b"".join(parts)


def write(folder: Path, kind: Kind, samples: list[list[Member] | bytes]) -> Path:
    """A data set with one shard of these samples, whatever they are; bytes lie in it as they are."""
    folder.mkdir()
    offsets, stream = [0], io.BytesIO()
    for number, sample in enumerate(samples):
        stream.write(sample if isinstance(sample, bytes) else raw(sample, f"{number:09d}"))
        offsets.append(stream.tell())
    tar, index = stream.getvalue() + b"\0" * 1024, np.asarray(offsets, dtype="<u8").tobytes()
    (folder / "shard-000000.tar").write_bytes(tar)
    (folder / "shard-000000.idx").write_bytes(index)
    shard = Shard(
        name="shard-000000.tar",
        samples=len(samples),
        bytes=len(tar),
        sha256=sha256(tar).hexdigest(),
        index_sha256=sha256(index).hexdigest(),
    )
    ids = [1, 2] if kind == "detection" else None
    (folder / "manifest.json").write_text(dump_manifest(make_manifest(kind, ["a", "b"], ids, [shard], {})))
    return folder


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, extra: bytes = b"", pixels: bytes = b"") -> bytes:
    """A grey PNG with whatever chunks and pixel data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GOOD_PNG = png(4, 4, pixels=zlib.compress(b"\0\1\2\3\4" * 4))
ZEROS = zlib.compress(b"\0" * (1 << 30), 9)
"""A gigabyte in a megabyte."""
SPARSE = tarfile.GNUTYPE_SPARSE
BOX = {"id": 1, "bbox": [0, 0, 2, 2], "class": 1, "area": 4, "iscrowd": 0, "segmentation": None}
FACTS = {"image_id": 1, "file_name": "x.png", "height": 4, "width": 4, "annotations": [BOX]}


def sample(image: bytes = GOOD_PNG, metadata: Any = FACTS) -> list[Member]:
    text = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    return [member(f"{KEY}.png", image), member(f"{KEY}.json", text)]


def box(**changes: Any) -> list[Member]:
    return sample(metadata=FACTS | {"annotations": [BOX | changes]})


def large_image() -> bytes:
    """5000 x 5000 valid pixels."""
    return png(5000, 5000, pixels=zlib.compress((b"\0" + b"\7" * 5000) * 5000))


TAR: dict[str, list[Member] | bytes] = {
    "absolute path": [member("/tmp/vitgraft-hostile.json", b"{}"), *sample()],
    "parent path": [member(f"../../{KEY}.json", b"{}"), *sample()],
    "key of another sample": [member("000000099.json", b"{}"), *sample()],
    "symbolic link": [*sample()[:1], member(f"{KEY}.json", kind=tarfile.SYMTYPE, link="/etc/passwd")],
    "hard link": [*sample()[:1], member(f"{KEY}.json", kind=tarfile.LNKTYPE, link="/etc/passwd")],
    "device": [*sample()[:1], member(f"{KEY}.json", kind=tarfile.CHRTYPE)],
    "directory": [member(f"{KEY}.d", kind=tarfile.DIRTYPE), *sample()],
    "10 GB declared": [declared(f"{KEY}.png", GOOD_PNG, 10 << 30), *sample()[1:]],
    "10 GB in a sparse member": [declared(f"{KEY}.png", b"", 10 << 30, SPARSE), *sample()[1:]],
    "10 GB of extended header": [declared(f"{KEY}.png", b"9 size=1\n", 10 << 30, tarfile.XHDTYPE), *sample()],
    "10 GB by an extended header": [member("x", b"20 size=10737418240\n", tarfile.XHDTYPE), *sample()],
    "10 GB of long name": [declared("././@LongLink", b"name", 10 << 30, tarfile.GNUTYPE_LONGNAME), *sample()],
    "negative size": [member("x", b"11 size=-1\n", tarfile.XHDTYPE), *sample()],
    "duplicate member": [*sample(), *sample()],
    "no image": sample()[1:],
    "no metadata": sample()[:1],
    "no tar": b"\xff" * 1024,
    "truncated in a member": raw(sample(), "000000017")[:600],
    "truncated in a header": raw(sample(), "000000018")[:300],
    "nothing but zeros": b"\0" * 1024,
}
IMAGES: dict[str, list[Member] | bytes] = {
    "decompression bomb by its size": sample(png(60_000, 60_000, pixels=ZEROS[: 1 << 20])),
    "2^31 pixels wide": sample(png(2**31 - 1, 1, pixels=ZEROS[:1000])),
    "gigabyte of compressed text": sample(png(4, 4, chunk(b"zTXt", b"Comment\0\0" + ZEROS), zlib.compress(b"\0" * 20))),
    "gigabyte of colour profile": sample(png(4, 4, chunk(b"iCCP", b"icc\0\0" + ZEROS), zlib.compress(b"\0" * 20))),
    "truncated image": sample(GOOD_PNG[:48]),
    "image cut in its header": sample(GOOD_PNG[:20]),
    "no image at all": sample(b"GIF89a" + b"\0" * 100),
    "empty image": sample(b""),
    "zero pixels": sample(png(0, 0)),
}
METADATA: dict[str, list[Member] | bytes] = {
    "NaN box": box(bbox=[0, 0, float("nan"), 1]),
    "infinite box": box(bbox=[0, 0, float("inf"), 1]),
    "box beyond any number": sample(
        metadata=json.dumps(FACTS).replace("[0, 0, 2, 2]", "[0, 0, 1" + "0" * 400 + ", 2]").encode()
    ),
    "box of three": box(bbox=[0, 0, 1]),
    "box of strings": box(bbox=["0", "0", "1", "1"]),
    "box as a string": box(bbox="0011"),
    "box as a mapping": box(bbox={"0": 1, "1": 1, "2": 1, "3": 1}),
    "box of lists": box(bbox=[[0], [0], [1], [1]]),
    "class that is none": box(**{"class": 2}),
    "class as text": box(**{"class": "1"}),
    "class as a truth value": box(**{"class": True}),
    "segmentation as a list": box(segmentation=[[0, 0, 1, 1, 2, 2]]),
    "segmentation of another size": box(segmentation={"size": [9, 9], "counts": "1"}),
    "segmentation of 10^10 pixels": sample(
        metadata=FACTS
        | {
            "height": 10**5,
            "width": 10**5,
            "annotations": [BOX | {"segmentation": {"size": [10**5] * 2, "counts": "1"}}],
        }
    ),
    "run lengths beyond the mask": box(segmentation={"size": [4, 4], "counts": "oooooooo0"}),
    "run lengths as numbers": box(segmentation={"size": [4, 4], "counts": [1, 2, 3]}),
    "annotation as text": sample(metadata=FACTS | {"annotations": ["x"]}),
    "annotations as a mapping": sample(metadata=FACTS | {"annotations": {"0": BOX}}),
    "annotations as a number": sample(metadata=FACTS | {"annotations": 7}),
    "no annotations": sample(metadata={"height": 4, "width": 4}),
    "infinite height": sample(metadata=FACTS | {"height": float("inf")}),
    "height as text": sample(metadata=FACTS | {"height": "tall"}),
    "another height": sample(metadata=FACTS | {"height": 5}),
    "masks of 75 GB": sample(
        large_image(), FACTS | {"height": 5000, "width": 5000, "annotations": [BOX | {"id": i} for i in range(3000)]}
    ),
    "list instead of an object": sample(metadata=[FACTS]),
    "deep nesting": sample(metadata=b"[" * 200_000),
    "no JSON": sample(metadata=b"\xff\xfe"),
    "number of 10^5 digits": sample(metadata=b'{"height": ' + b"9" * 100_000 + b"}"),
    "file name of many lines": sample(b"broken", FACTS | {"file_name": "a\nvitgraft: all is well\n" * 50_000}),
}
CASES = TAR | IMAGES | METADATA

READ = """
import json, resource, sys
from pathlib import Path
from vitgraft.configs.errors import DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset

folder, kind, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = DataConfig.model_validate({"train": {"path": folder}, "image_size": [16, 16], "workers": 0})
train = PackedDataset(folder, config, kind)
evaluation = PackedDataset(folder, config, kind, train=False)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit,) * 2)
for sample in range(len(train)):
    try:
        train.train_batch([Entry(0, sample, sample, 0)])
        answer = None
    except DataError as error:
        answer = str(error)
    errors = evaluation.eval_batch([sample]).errors
    print(json.dumps([answer, [message for _, message in errors]]), flush=True)
"""


def answers(folder: Path, kind: Kind, limit: int) -> list[tuple[str | None, list[str]]]:
    """What training and evaluation say of each sample, in a process that may take so many bytes more than it has."""
    command = [sys.executable, "-c", READ, str(folder), kind, str(limit)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return [tuple(json.loads(line)) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str | None, list[str]]]]:
    """All cases in one data set, read in one process."""
    folder = write(tmp_path_factory.mktemp("hostile") / "set", "detection", list(CASES.values()))
    return folder, dict(zip(CASES, answers(folder, "detection", 512 << 20), strict=True))


HARMLESS_IN_EVALUATION = {"masks of 75 GB", "another height", "run lengths beyond the mask", "run lengths as numbers"}
"""Evaluation keeps masks as they are packed and takes sizes from the image."""


@pytest.mark.parametrize("case", CASES)
def test_hostile_samples_are_answered_with_one_line(hostile: Any, case: str) -> None:
    folder, found = hostile
    answer, errors = found[case]
    place = f"{folder}/shard-000000.tar:{list(CASES).index(case):09d}"
    assert answer is not None
    for text in [answer, *errors]:
        assert text.startswith(place)
        assert "\n" not in text
        assert len(text) < 1000
    assert len(errors) == 1 or case in HARMLESS_IN_EVALUATION


def test_nothing_is_written(hostile: Any) -> None:
    folder, _ = hostile
    assert sorted(path.name for path in folder.parent.rglob("*") if path.is_file()) == [
        "manifest.json",
        "shard-000000.idx",
        "shard-000000.tar",
    ]
    assert not Path("/tmp/vitgraft-hostile.json").exists()


def test_the_same_sample_without_harm_is_read(tmp_path: Path) -> None:
    """So it is the harm that the other tests find."""
    folder = write(tmp_path / "set", "detection", [sample()])
    assert answers(folder, "detection", 512 << 20) == [(None, [])]


def test_hostile_label_maps_and_clips(tmp_path: Path) -> None:
    def semantic(label: bytes) -> list[Member]:
        return [*sample(), member(f"{KEY}.label.png", label)]

    labels = {
        "good": png(4, 4, pixels=zlib.compress(b"\0\1\1\0\1" * 4)),
        "bomb": png(60_000, 60_000, pixels=ZEROS),
        "cut": large_image()[:100],
        "of another size": png(5, 4, pixels=zlib.compress(b"\0" * 24)),
        "an id that is none": GOOD_PNG,
    }
    found = answers(
        write(tmp_path / "semantic", "semantic", [semantic(label) for label in labels.values()]), "semantic", 512 << 20
    )
    assert found[0] == (None, [])
    for case, (answer, errors) in zip([*labels][1:], found[1:], strict=True):
        assert answer is not None
        # An evaluation compares in the size of the label map.
        assert len(errors) == (case != "of another size")

    def video(data: bytes, **facts: Any) -> list[Member]:
        tree = {"label": 0, "file_name": "x", "frames": 8, "fps": 5, "height": 4, "width": 4} | facts
        return [member(f"{KEY}.mp4", data), member(f"{KEY}.json", json.dumps(tree).encode())]

    clips = [
        video(b"no video"),
        video(b"", frames=10**12),
        video(b"x" * 100, frames=-1),
        video(b"x", label=[0]),
        video(b"x", label=-1),
        video(b"x", label=1e400),
    ]
    for answer, errors in answers(write(tmp_path / "video", "video", clips), "video", 512 << 20):
        assert answer is not None
        assert len(errors) == 1


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from([*BOX, "size"]), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FACTS) + [f"annotations.{key}" for key in BOX]), ANYTHING)
def test_metadata_of_any_shape_is_read_or_refused(key: str, value: Any) -> None:
    """Nothing but a DataError comes out of checking, and what passes can be made into tensors."""
    outer, _, inner = key.partition(".")
    tree = FACTS | ({"annotations": [BOX | {inner: value}]} if inner else {outer: value})
    message = ""
    try:
        metadata = decode.decode_json(json.dumps(tree).encode(), "x")
        annotations = decode.check_annotations(metadata, 2, "x")
        masks = decode.decode_masks(annotations, (4, 4), "x")
    except DataError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    if message:
        return
    boxes = np.asarray([item["bbox"] for item in annotations], dtype=np.float64).reshape(-1, 4)
    assert np.isfinite(boxes).all()
    assert masks.shape == (len(annotations), 4, 4)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=40))
def test_run_lengths_of_any_kind_make_a_mask_or_an_error(counts: str) -> None:
    item = BOX | {"segmentation": {"size": [4, 4], "counts": counts}}
    try:
        masks = decode.decode_masks([item], (4, 4), "x")
    except DataError:
        return
    assert set(masks.unique().tolist()) <= {0, 1}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.3, 0.99]))
def test_run_lengths_must_cover_the_mask(height: int, width: int, seed: int, density: float) -> None:
    """pycocotools leaves what they do not cover uninitialised."""
    from pycocotools import mask as coco_mask

    truth = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    counts = coco_mask.encode(np.asfortranarray(truth))["counts"]
    assert decode.covered(counts) == height * width
    item = BOX | {"segmentation": {"size": [height, width], "counts": counts.decode()}}
    assert np.array_equal(decode.decode_masks([item], (height, width), "x")[0].numpy(), truth)
    for size in ((height + 1, width), (height, width + 1)):
        with pytest.raises(DataError, match=rf"damaged mask \(run lengths of {height * width} pixels\)"):
            decode.decode_masks([item], size, "x")


def test_the_entry_that_is_named_is_the_one_that_is_read(tmp_path: Path, configure: Configure) -> None:
    """Between two good samples a hostile one harms neither."""
    folder = write(tmp_path / "set", "detection", [sample(), CASES["duplicate member"], sample()])
    dataset = PackedDataset(folder, configure(folder, image_size=[16, 16]), "detection")
    for number in (0, 2):
        assert len(dataset.train_batch([Entry(0, 0, number, 0)]).targets[0]["labels"]) == 1
    with pytest.raises(DataError, match="000000001"):
        dataset.train_batch([Entry(0, 0, 1, 0)])


def test_a_shard_that_became_a_fifo_is_not_waited_for(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed["semantic"], tmp_path / "set"))
    manifest = read_manifest(folder)
    for name in ("shard-000000.tar", "shard-000000.idx"):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match="not a regular file"):
            ShardReader(folder, manifest).read(0)
        path.unlink()
        path.write_bytes(content)
    assert ShardReader(folder, manifest).read(0)
