"""What is found under the name of a file of weights, and which of the state dicts in it is taken."""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.models.weight_files import read_tensors
from vitgraft.models.weight_names import check_file


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def program() -> bytes:
    stream = io.BytesIO()
    warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and found all the same; pytest restores this
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), stream)
    return stream.getvalue()


def arrays() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    return stream.getvalue()


def old_archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as file:
        file.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346284714\n"
STRANGERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "LFS pointer": (lambda: LFS, "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"),
    "web page": (lambda: b"\n<!DOCTYPE html><html><title>x</title>", "is a web page; download the file itself"),
    "error of a server": (lambda: b'<?xml version="1.0"?><Error/>', "is an XML document"),
    "index": (lambda: b'{"metadata": {}, "weight_map": {}}', "is JSON text, perhaps an index"),
    "empty": (lambda: b"", "is empty; expected a whole .safetensors file"),
    "gzip": (lambda: b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "is compressed; unpack it first"),
    "Keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file; convert it"),
    "TorchScript": (program, "is a TorchScript program; load it with torch.jit.load and save its state_dict"),
    "npz": (arrays, "is an .npz file of numpy arrays"),
    "tar": (old_archive, "is a tar archive, which torch wrote before"),
    "module": (lambda: saved(torch.nn.Linear(2, 2)), r"holds a whole Python object \(torch.nn.modules.linear.Linear\)"),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_what_is_no_file_of_tensors_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    make, message = STRANGERS[kind]
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(make())
    with pytest.raises(CheckpointError, match=rf"^model\.backbone\.weights: .*weights\.{suffix} {message}") as error:
        read_tensors(file)
    assert "\n" not in str(error.value)
    if kind not in ("TorchScript", "npz", "module"):  # those are found out by reading them
        with pytest.raises(CheckpointError, match=message):
            check_file(str(file), "model.weights")


def test_names_that_are_no_files(tmp_path: Path) -> None:
    for name in "https://a.org/b.pth", "s3://a/b", "http://x":
        with pytest.raises(ConfigError, match=r"is an address; download the file and name it, or give hf:OWNER/REPO"):
            check_file(name, "model.weights")
    for name, message in (
        (tmp_path, r"is a folder; name the \.safetensors or \.pth file in it"),
        (tmp_path / "none.pth#model", r"no such file; name a \.safetensors or \.pth file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_tensors(name)
        with pytest.raises(ConfigError, match=message):
            check_file(str(name), "model.weights")
    check_file("hf:a/b/c.pth#model", "model.weights")  # not fetched here


def test_the_content_says_what_a_file_is(tmp_path: Path) -> None:
    """Not its name; of headers of every length, some of which begin as JSON or an archive does."""
    for index, name in enumerate(["x.pth", "x.bin", "x.pkl", "x"]):
        (tmp_path / name).write_bytes(save({"a.weight": torch.full((2,), float(index))}))
        assert read_tensors(tmp_path / name)["a.weight"].tolist() == [index, index]
    (tmp_path / "y.safetensors").write_bytes(saved({"a.weight": torch.ones(2)}))
    assert read_tensors(tmp_path / "y.safetensors")["a.weight"].tolist() == [1, 1]
    for length in range(60, 400):
        header = b'{"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
        (tmp_path / "z").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        assert read_tensors(tmp_path / "z")["a.weight"].tolist() == [0]


def one(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.tensor([value])}


CHOICES: dict[str, tuple[Any, str, float, str | None]] = {
    "teacher": ({"teacher": one(1)}, "", 1, "taken: teacher"),
    "any name": ({"my_net": one(1), "epoch": 3}, "", 1, "taken: my_net"),
    "deeper": ({"state": {"net": one(1)}}, "", 1, "taken: state.net"),
    "the usual one": ({"state_dict": one(1), "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, "", 1, None),
    "DINO": (
        {"student": one(1), "teacher": one(2), "dino_loss": {"center": torch.ones(1)}},
        "",
        2,
        "taken: teacher; the file also holds student, which FILE#NAME chooses",
    ),
    "an average beside": (
        {"state_dict": one(1), "state_dict_ema": one(2)},
        "",
        1,
        "taken: state_dict; the file also holds state_dict_ema, which FILE#NAME chooses",
    ),
    "the average": ({"state_dict": one(1), "state_dict_ema": one(2)}, "#state_dict_ema", 2, "taken: state_dict_ema"),
    "the average alone": ({"model_ema": one(2)}, "", 2, "taken: model_ema"),
    "a queue beside": ({"queue": torch.ones(1), "state_dict": one(1)}, "", 1, None),
    "a prefix": (
        {"student.a.weight": torch.ones(1), "teacher.a.weight": torch.zeros(1)},
        "#student",
        1,
        "taken: student",
    ),
    "a prefix inside": ({"model": {"net.a.weight": torch.ones(1)}}, "#net", 1, "taken: net"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_which_state_dict_is_taken_and_said(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content, key, value, said = CHOICES[case]
    (tmp_path / "x.pth").write_bytes(saved(content))
    with caplog.at_level(logging.INFO, logger="vitgraft.models.weight_files"):
        read = read_tensors(f"{tmp_path / 'x.pth'}{key}")
    assert read["a.weight"].tolist() == [value]
    assert [record.getMessage().partition("x.pth: ")[2] for record in caplog.records] == ([said] if said else [])


def test_what_is_not_clear_is_asked(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(saved({"net_a": one(1), "net_b": one(2)}))
    with pytest.raises(ConfigError, match=r"several state dicts; choose one of net_a, net_b as FILE#NAME"):
        read_tensors(tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"holds nothing of the name 'net_c'; it holds net_a, net_b"):
        read_tensors(f"{tmp_path / 'x.pth'}#net_c")
    (tmp_path / "y#2.pkl").write_bytes(pickle.dumps({"a.weight": np.ones(2)}))
    assert list(read_tensors(tmp_path / "y#2.pkl")) == ["a.weight"]


@pytest.mark.parametrize("kind", ["8-bit floats", "sparse", "without elements"])
@pytest.mark.parametrize("alone", [True, False])
def test_tensors_of_other_kinds_are_named(kind: str, alone: bool, tmp_path: Path) -> None:
    made = {
        "8-bit floats": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.eye(2).to_sparse(),
        "without elements": torch.empty(2, device="meta"),
    }[kind]
    path = tmp_path / "a.pth"
    path.write_bytes(saved({"a.weight": made, **({} if alone else {"b.weight": torch.ones(1)})}))
    with pytest.raises(CheckpointError, match=r"a\.weight is a tensor of 8-bit floats, sparse, quantised or without"):
        read_tensors(path)


def test_what_modules_keep_beside_their_tensors_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(saved({"a.weight": torch.ones(2), "a._extra_state": None, "b._extra_state": io.BytesIO(b"x")}))
    assert list(read_tensors(path)) == ["a.weight"]


def test_a_single_tensor_and_a_name_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(saved(torch.ones(2)))
    with pytest.raises(CheckpointError, match="holds a single tensor; expected a dictionary"):
        read_tensors(path)
    path.write_bytes(saved({"encoder.a": torch.ones(2), "encoder.b": torch.ones(2), "head.a": torch.ones(2)}))
    with pytest.raises(ConfigError, match="holds nothing of the name 'trunk'; it holds encoder, head"):
        read_tensors(f"{path}#trunk")
