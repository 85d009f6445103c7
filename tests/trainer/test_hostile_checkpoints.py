"""A checkpoint from outside: whatever it holds, an error and nothing else. Nothing in it is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_checkpoints import model_of, save_model
from support import tiny_recipe
from support_checkpoints import VALUES, manifest_of

from vitgraft.configs.errors import CheckpointError, VitgraftError
from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.load import validate_recipe
from vitgraft.models.weight_files import read_tensors
from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.files import write_safetensors
from vitgraft.trainer.checkpoint.manifest import MAX_MANIFEST_BYTES, read_manifest
from vitgraft.trainer.checkpoint.read import (
    VectorReader,
    newest_valid,
    open_checkpoint,
    read_all,
    read_weights,
    resolve_checkpoint,
    verify,
)

Arrays = dict[str, np.ndarray[Any, Any]]


def written(run: Path, *shards: Arrays, edit: dict[str, Any] | None = None) -> Path:
    """A committed checkpoint of these shards; its manifest, edited, has the digest that belongs to it."""
    folder = commit.temporary_folder(run, 1, 1)
    folder.mkdir(parents=True)
    records = [write_safetensors(folder / layout.BUFFERS, {})]
    records += [write_safetensors(folder / layout.shard_name(rank), arrays) for rank, arrays in enumerate(shards)]
    path = commit.commit(run, manifest_of(run, 1, records, len(shards)))
    if edit is not None:
        reseal(path, edit)
    return path


def reseal(path: Path, edit: dict[str, Any]) -> None:
    """As somebody would who knows the format."""
    file = path / layout.MANIFEST
    tree = {**json.loads(file.read_text()), **edit}
    tree.pop("digest")
    file.write_text(json.dumps({**tree, "digest": sha256_of(tree)}))


WHOLE: Arrays = {"master|w|0": VALUES}

SHARDS: dict[str, tuple[tuple[Arrays, ...], str]] = {
    "a range in two shards": ((WHOLE, {"master|w|5": VALUES[5:]}), "two shards hold element 5 of master of w"),
    "a range beyond the vector": (({"master|w|4": VALUES},), "reaches to 14, but w has 10 elements"),
    "a start beyond any number": (({"master|w|" + "9" * 30: VALUES},), "not written by vitgraft"),
    "a start in other digits": (({"master|w|²": VALUES},), "not written by vitgraft"),
    "a start of too many digits": (({"master|w|00": VALUES},), "not written by vitgraft"),
    "a start and a new line": (({"master|w|0\n": VALUES},), "not written by vitgraft"),
    "no bars": (({"w": VALUES},), "not written by vitgraft"),
    "another parameter": (({"master|../../etc|0": VALUES},), "knows no such vector"),
    "another kind": (({"slave|w|0": VALUES},), "knows no such vector"),
    "another type": (({"master|w|0": VALUES.astype(np.float64)},), "F64 of shape .* expected a flat range of F32"),
    "no flat range": (({"master|w|0": VALUES.reshape(2, 5)},), "expected a flat range of F32"),
    "a gap": (({"master|w|0": VALUES[:4], "master|w|6": VALUES[6:]},), "elements 4 to 10 are missing"),
    "nothing": (({},), "holds no master of parameter w"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_do_not_fit_the_manifest(tmp_path: Path, name: str) -> None:
    shards, reason = SHARDS[name]
    checkpoint = open_checkpoint(written(tmp_path, *shards))
    with pytest.raises(CheckpointError, match=reason):
        VectorReader(checkpoint).read(layout.MASTER, "w", 0, 10)


def test_parameters_without_elements_need_no_range(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path, WHOLE, edit={"parameters": {"w": [10], "empty": [0, 3]}}))
    assert read_weights(checkpoint)["empty"].shape == (0, 3)


MANIFESTS: dict[str, dict[str, Any]] = {
    "a path upwards": {"files": [{"path": "../../x", "bytes": 1, "sha256": "0" * 64}]},
    "an absolute path": {"files": [{"path": "/etc/passwd", "bytes": 1, "sha256": "0" * 64}]},
    "a frozen trunk elsewhere": {"frozen": "../../../etc/passwd"},
    "a frozen trunk of no digest": {"frozen": "A" * 64},
    "a run elsewhere": {"run": "../other"},
    "a world beyond any": {"world": 10**9},
    "a negative step": {"step": -1},
    "a negative size": {"files": [{"path": "buffers.safetensors", "bytes": -1, "sha256": "0" * 64}]},
    "a hash of other letters": {"files": [{"path": "buffers.safetensors", "bytes": 8, "sha256": "z" * 64}]},
    "a negative dimension": {"parameters": {"w": [-1]}},
    "an unknown field": {"hook": "os.system"},
    "text for a number": {"created": "soon"},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_not_believed(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, WHOLE, edit=MANIFESTS[name])
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        open_checkpoint(path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["created", "scalars", "groups"])
def test_numbers_that_are_none(tmp_path: Path, field: str, value: str) -> None:
    path = written(tmp_path, WHOLE)
    file = path / layout.MANIFEST
    tree = json.loads(file.read_text())
    tree[field] = {"created": "@", "scalars": {"step": "@"}, "groups": [{"lr": "@"}]}[field]
    file.write_text(json.dumps(tree).replace('"@"', value))
    with pytest.raises(CheckpointError, match=r"is not a number of JSON|is not finite"):
        open_checkpoint(path)


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "nested beyond reason": b"[" * 100_000,
    "a number beyond reason": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "another schema": b'{"schema_version": 2}',
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_are_no_manifest(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, WHOLE)
    (path / layout.MANIFEST).write_bytes(CONTENTS[name])
    with pytest.raises(CheckpointError, match=r"manifest\.json(:1)?: "):
        open_checkpoint(path)


def test_a_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    os.truncate(path / layout.MANIFEST, MAX_MANIFEST_BYTES + 1)  # sparse
    with pytest.raises(CheckpointError, match="larger than"):
        open_checkpoint(path)


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


SAFETENSORS: dict[str, bytes] = {
    "a header beyond the file": struct.pack("<Q", 1 << 62) + b"{}",
    "a header beyond its bound": struct.pack("<Q", 200_000_000) + b"{}",
    "no header": b"\0" * 3,
    "no JSON": raw(b"}{"),
    "overlapping tensors": raw({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"\0" * 12),
    "a tensor beyond the file": raw({"a": tensor(0, 1 << 40, [1 << 38])}, b"\0" * 8),
    "offsets the wrong way round": raw({"a": tensor(8, 0, [2])}, b"\0" * 8),
    "a shape of another size": raw({"a": tensor(0, 8, [1 << 40])}, b"\0" * 8),
    "more data than tensors": raw({"a": tensor(0, 8, [2])}, b"\0" * 64),
    "a negative shape": raw({"a": tensor(0, 8, [-2])}, b"\0" * 8),
    "a type that numpy has not": raw({"a": tensor(0, 4, [2], "BF16")}, b"\0" * 4),
    "an unknown type": raw({"a": tensor(0, 4, [2], "X7")}, b"\0" * 4),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_are_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        read_all(path)


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle in the place of each file of a checkpoint, and as a file of weights in every form that is read."""
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.is_dir(), "the bomb works"
    trace.rmdir()
    tree = tiny_recipe("video", "data", model__backbone__frozen=True)
    run = tmp_path / "run"
    path = save_model(run, tree, model_of(validate_recipe(tree, "recipe")))
    for file in [*path.iterdir(), *(run / "blobs").iterdir(), run / "checkpoints" / "latest"]:
        honest = file.read_bytes()
        # Of the right size too, so that no check of sizes stands before the reader.
        for content in (bomb, bomb.ljust(len(honest), b"\0")[: max(len(honest), len(bomb))]):
            file.write_bytes(content)
            for use in (resolve_checkpoint, newest_valid):
                with contextlib.suppress(VitgraftError):
                    use(run)
            # Past the hashes, as the ranks read.
            with contextlib.suppress(VitgraftError):
                read_weights(open_checkpoint(path))
            with contextlib.suppress(VitgraftError):
                read_all(file)
            assert not trace.exists(), file
        file.write_bytes(honest)
    verify(open_checkpoint(path))
    for suffix in (".pth", ".pt", ".bin", ".pkl", ".safetensors"):
        weights = tmp_path / f"weights{suffix}"
        weights.write_bytes(bomb)
        with pytest.raises(CheckpointError):
            read_tensors(weights)
        torch.save({"state_dict": {"a.weight": torch.zeros(1), "b": Bomb(trace)}}, weights)
        with pytest.raises(CheckpointError):
            read_tensors(weights)
        assert not trace.exists(), suffix


@pytest.mark.parametrize(
    "shape", [[1 << 45], [1 << 23, 1 << 22], [0, 1 << 61], [1] * 100, [11]], ids=lambda shape: str(shape[:2])
)
def test_shapes_that_the_files_cannot_hold(tmp_path: Path, shape: list[int]) -> None:
    """No memory is taken for them."""
    path = written(tmp_path, WHOLE)
    manifest = read_manifest(path / layout.MANIFEST)
    size = sum(record.bytes for record in manifest.files)
    wrong = manifest.model_copy(update={"parameters": {"w": shape if shape != [11] else [size]}, "digest": None})
    (path / layout.MANIFEST).write_text(layout.seal(wrong).model_dump_json())
    with pytest.raises(CheckpointError, match=r"parameter w of shape .* does not fit into the checkpoint's files"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_manifest_that_is_no_file_does_not_block(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, WHOLE)
    manifest = path / layout.MANIFEST
    manifest.unlink()
    if kind == "fifo":
        os.mkfifo(manifest)
    elif kind == "device":
        manifest.symlink_to("/dev/zero")
    else:
        manifest.mkdir()
    with pytest.raises(CheckpointError, match=r"not a regular file|a folder"):
        open_checkpoint(path)
