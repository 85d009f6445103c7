"""Files of weights: where they are, and their tensors, read without running any code from them.

What is read: .safetensors, .pth/.pt/.bin of tensors, and .pkl of numpy arrays (detectron2's model zoo).

A file is named by its path, or as ``hf:OWNER/REPO/FILE`` on the Hugging Face hub (timm's ``hf-hub:OWNER/REPO`` names
the file ``model.safetensors``; ``OWNER/REPO@REVISION`` a branch, tag or commit).
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitgraft.configs.errors import CheckpointError, ConfigError

_TOPS = ("state_dict", "model", "module")
_HUB = ("hf:", "hf-hub:")
# Beside tensors, official files hold their options and best scores; these types only carry values.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_IN_PICKLES = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict"), ("_codecs", "encode")),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers and texts; refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _IN_PICKLES:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return super().find_class(module, name)


def read_tensors(file: str | Path, *, where: str = "model.backbone.weights") -> dict[str, Tensor]:
    """The tensors of a file by name, tops (``state_dict``, ``model``, ``module``) unwrapped.

    ``where``: the key of the recipe that names the file, for errors. Raises ``CheckpointError`` when the file is
    missing, truncated, holds Python objects that loading could run, or something else than tensors under a tensor's
    name; ``ConfigError`` when it is on the hub and cannot be fetched.
    """
    path = locate(file, where=where)
    content: Any = _read(path, where)
    while isinstance(content, dict) and (top := _top(content)) is not None:
        content = content[top]
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: {path} holds a {type(content).__name__}; expected a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(value, Tensor) and "." in str(name):
            raise CheckpointError(
                f"{where}: {path}: {name} is a {type(value).__name__}, expected a tensor; save the state dict alone"
            )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{where}: {path} holds no tensors; expected a state dict, maybe under one of {_TOPS}")
    return tensors


def locate(file: str | Path, *, where: str = "model.backbone.weights") -> Path:
    """The local path of a file, fetched from the Hugging Face hub (or its cache) if it is named so.

    Raises ``ConfigError`` for a name on the hub that is malformed or cannot be fetched, ``CheckpointError`` when there
    is no such local file.
    """
    name = str(file)
    hub = next((prefix for prefix in _HUB if name.startswith(prefix)), None)
    if hub is None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise CheckpointError(f"{where}: no file {path}; give an existing .safetensors or .pth file")
        return path
    parts = name.removeprefix(hub).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"{where}: {name!r} names no file on the hub; expected {hub}OWNER/REPO/FILE")
    repo, _, revision = parts[1].partition("@")
    inside = parts[2] if len(parts) == 3 else "model.safetensors"
    try:
        return Path(huggingface_hub.hf_hub_download(f"{parts[0]}/{repo}", inside, revision=revision or None))
    except Exception as error:  # what the hub's client and the network raise is not bounded to a class
        raise ConfigError(
            f"{where}: {name} could not be fetched ({type(error).__name__}: {_short(error)}); check the name and the "
            "network, or name a local file"
        ) from error


def _top(content: dict[Any, Any]) -> str | None:
    return next((name for name in _TOPS if isinstance(content.get(name), dict)), None)


def _read(path: Path, where: str) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                return _as_tensors(_ArrayUnpickler(file).load())
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore", UserWarning)  # about what the error then says better
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the readers raise almost anything
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is not None:
            raise CheckpointError(
                f"{where}: {path} holds Python objects beside tensors ({refused[1]}), and loading them could run code; "
                "save its tensors alone, best as .safetensors"
            ) from error
        raise CheckpointError(
            f"{where}: {path} cannot be read ({type(error).__name__}: {_short(error)}); "
            "expected a whole .safetensors file, or a .pth file of tensors"
        ) from error


def _as_tensors(content: Any) -> Any:
    """Arrays as tensors, in a dictionary and those inside it."""
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content)
    return {name: _as_tensors(value) for name, value in content.items()} if isinstance(content, dict) else content


def _short(error: Exception) -> str:
    # torch puts advice before what it found, to load the file unsafely among it.
    return " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:160]
