"""Tensors of files of weights, read without running any code from them.

What is read: .safetensors, what ``torch.save`` writes (.pth, .pt, .bin), and pickles of numpy arrays (detectron2's
model zoo, .pkl). The content of a file says what it is, not its name.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import load_file
from torch import Tensor

from vitgraft.configs.errors import CheckpointError, VitgraftError
from vitgraft.configs.files import open_regular
from vitgraft.models.pickles import PickleError, ProgramError
from vitgraft.models.state_dicts import chosen_state, kind_of
from vitgraft.models.tensor_records import TensorError, is_foreign_tensor, is_tensor, tensor_of
from vitgraft.models.torch_files import Content, UnreadableError, read_archive, read_stream
from vitgraft.models.weight_names import MAX_HEADER_BYTES, check_kind, locate, metadata_of, numbers_of, shown

log = logging.getLogger(__name__)

MAX_NAME = 200
_EXTRA = "_extra_state"
"""Suffix of torch's names for the results of a module's ``get_extra_state``."""


def read_tensors(file: str | Path, *, where: str = "model.backbone.weights") -> dict[str, Tensor]:
    """Return the tensors of a file by name, out of the state dict that :func:`chosen_state` chooses.

    ``where``: the key of the recipe that names the file, for errors. Raises ``CheckpointError`` when the file is
    missing, truncated, of another kind, or holds something else than tensors under a tensor's name; ``ConfigError``
    when it cannot be fetched, or has several state dicts and none is chosen.
    """
    path, key = locate(file, where)
    check_kind(path, where)
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            content = _content(stream, path)
            state, note = chosen_state(content.value, key, f"{where}: {path}")
            tensors = _tensors(state, content, f"{where}: {path}")
    except UnreadableError as error:
        raise CheckpointError(f"{where}: {path} is {error}") from None
    except ProgramError as error:
        raise CheckpointError(
            f"{where}: {path} holds Python objects beside tensors ({shown(error, 100)}), and loading them elsewhere "
            "could run code; save its tensors alone, best as .safetensors"
        ) from None
    except VitgraftError:
        raise
    except Exception as error:  # a foreign file makes the readers raise almost anything
        raise CheckpointError(
            f"{where}: {path} cannot be read ({type(error).__name__}: {shown(error)}); "
            "expected a whole .safetensors file, or a .pth file of tensors"
        ) from error
    if note:
        log.info("%s: %s: %s", where, path, note)
    return tensors


def canvas_of(file: str | Path, where: str) -> tuple[int, int] | None:
    """Return the canvas (height, width) of a file's position embeddings, as ``vitgraft export`` wrote it; else
    ``None``."""
    found = numbers_of(metadata_of(str(file), where), "image_size", 2)
    return None if found is None or not 0 < min(found) <= max(found) < 1 << 20 else (int(found[0]), int(found[1]))


def _content(stream: BinaryIO, path: Path) -> Content:
    """Raises ``UnreadableError`` for a file of another kind, and whatever the readers raise for a damaged one."""
    head, size = stream.read(9), os.fstat(stream.fileno()).st_size
    stream.seek(0)
    if _is_safetensors(head, size):
        return Content(load_file(path), _no_storage)
    if head.startswith(b"PK\x03\x04"):
        return read_archive(stream)
    try:
        return read_stream(stream)
    except ProgramError:
        raise
    except PickleError:
        if head.startswith(b"\x80"):  # as pickles do but for the oldest, which begin in many ways
            raise
        raise UnreadableError(
            "no file of weights (neither .safetensors nor what torch.save or pickle write); check what it is"
        ) from None


def _is_safetensors(head: bytes, size: int) -> bool:
    """Tell whether a file begins as .safetensors do.

    Raises:
        PickleError: a header longer than the file.
        UnreadableError: a header longer than the limit.
    """
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    if length > size - 8:
        raise PickleError("a header longer than the file")
    if length > MAX_HEADER_BYTES:
        raise UnreadableError(f"of a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}; save its tensors anew")
    return True


def _tensors(state: dict[str, Any], content: Content, where: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict; raise ``CheckpointError`` for another value under a tensor's name."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise CheckpointError(
                f"{where} holds the name {name[:40]!a}, which no tensor has; save the state dict again"
            )
        if isinstance(value, Tensor):
            tensors[name] = value
        elif is_tensor(value):
            try:
                tensors[name] = tensor_of(value, content.storages)
            except TensorError as error:
                raise CheckpointError(f"{where}: {name} is {shown(error)}; fetch or save the file again") from None
        elif is_foreign_tensor(value):
            raise CheckpointError(
                f"{where}: {name} is a tensor of 8-bit floats, sparse, quantised or without elements; convert it by "
                "to_dense(), dequantize() or float() where it was made, and save the state dict again"
            )
        elif name.endswith(_EXTRA):
            continue  # what a module keeps beside its tensors
        elif "." in name:
            raise CheckpointError(
                f"{where}: {name} is a {kind_of(value)}, expected a tensor; save the state dict alone"
            )
    return tensors


def _no_storage(reference: Any) -> Tensor:
    raise TensorError("no storage")
