"""Loading a trunk's weights from a file, strictly and without running any code from it.

What is understood: .safetensors, and .pth/.pt/.bin files of tensors (``torch.load(weights_only=True)``); the layouts
that timm's own converter knows (DINOv2, CLIP, OpenCLIP and others); tops ``state_dict``, ``model`` and ``module``;
prefixes ``module.``, ``backbone.`` and ``vit.``. Positions and patch embeddings are resized to the trunk.
"""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError

log = logging.getLogger(__name__)

_TOPS = ("state_dict", "model", "module")
_PREFIXES = ("module.", "backbone.", "vit.")


class LoadReport(NamedTuple):
    """What a load did: the tensors loaded, those of them that were resized, and those of the file left unused."""

    loaded: int
    resized: list[str]
    unused: list[str]

    def __str__(self) -> str:
        resized = f", resized {', '.join(self.resized)}" if self.resized else ""
        unused = f", left unused {_some(self.unused)}" if self.unused else ""
        return f"{self.loaded} tensors{resized}{unused}"


def load_trunk(vit: nn.Module, file: str | Path) -> LoadReport:
    """Load every tensor of a timm VisionTransformer without head from ``file``.

    Raises ``CheckpointError`` when the file is missing or holds anything but tensors, when one of the trunk's tensors
    is missing in it or has another shape, or when it holds more blocks than the trunk.
    """
    path = Path(file).expanduser()
    state = _trunk_state(_read(path))
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    state = _convert(state, vit, path)
    wanted = vit.state_dict()
    _check(wanted, state, path)
    vit.load_state_dict({name: state[name] for name in wanted})
    resized = [name for name in wanted if name in sizes and sizes[name] != tuple(wanted[name].shape)]
    report = LoadReport(len(wanted), resized, sorted(set(state) - set(wanted)))
    log.info("trunk weights from %s: %s", path, report)
    return report


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"model.backbone.weights: no file {path}; give an existing .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about what the error then says better
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"model.backbone.weights: {path} holds Python objects beside tensors, and loading them could run code; "
            "save its tensors alone, best as .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"model.backbone.weights: {path} cannot be read ({type(error).__name__}: {str(error)[:120]}); "
            "expected a .safetensors file, or a .pth file of tensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"model.backbone.weights: {path} holds a {type(content).__name__}; expected a dictionary of tensors"
        )
    return content


def _trunk_state(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by their names in the trunk: tops unwrapped, prefixes stripped, everything else left out."""
    while (top := next((name for name in _TOPS if isinstance(content.get(name), dict)), None)) is not None:
        content = content[top]
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if inside:
            state = inside
    return state


def _convert(state: dict[str, Tensor], vit: nn.Module, path: Path) -> dict[str, Tensor]:
    """timm's names and this trunk's sizes."""
    if not state:
        raise CheckpointError(f"model.backbone.weights: {path} holds no tensors; expected those of a ViT")
    if getattr(vit, "cls_token", None) is None and "cls_token" in state:
        # A trunk given by its sizes has no class token; the token's own position comes first.
        state = {name: value for name, value in state.items() if name != "cls_token"}
        positions = state.get("pos_embed")
        if (
            positions is not None
            and positions.ndim == 3
            and math.isqrt(positions.shape[1] - 1) ** 2 == (positions.shape[1] - 1)
        ):
            state["pos_embed"] = positions[:, 1:]
    try:
        converted: dict[str, Tensor] = checkpoint_filter_fn(state, vit, adapt_layer_scale=True)
    except Exception as error:  # timm's converter meets a foreign file here: whatever it raises, the file is at fault
        raise CheckpointError(
            f"model.backbone.weights: {path} is no ViT that timm can convert ({type(error).__name__}: "
            f"{str(error)[:120]}); expected the tensors of a VisionTransformer"
        ) from error
    return converted


def _check(wanted: dict[str, Tensor], state: dict[str, Tensor], path: Path) -> None:
    missing = [name for name in wanted if name not in state]
    if missing:
        raise CheckpointError(
            f"model.backbone.weights: {path} lacks {len(missing)} of the trunk's {len(wanted)} tensors: "
            f"{_some(missing)}; it holds {_some(sorted(state))}; name the weights of the same architecture"
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"model.backbone.weights: {path}: {name} has shape {tuple(state[name].shape)}, the trunk's is "
                f"{tuple(tensor.shape)}; name the weights of the same architecture"
            )
    extra = [name for name in state if name.startswith("blocks.") and name not in wanted]
    if extra:
        raise CheckpointError(
            f"model.backbone.weights: {path} holds more than the trunk's blocks: {_some(extra)}; "
            "name the weights of the same architecture"
        )


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
