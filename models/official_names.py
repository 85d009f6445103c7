"""A trunk's tensors as its originators name them: the way back from what :mod:`vitgraft.models.weights` reads.

The trunks written here have the official names already. Those that timm builds are called ``vit.…`` inside, and lose
that prefix. What is grafted between the blocks is added to their weights where that is the same computation (LoRA);
otherwise it keeps the names of AdaptFormer's code (``blocks.0.adaptmlp.…``), which a plain trunk does not know.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitgraft.models.adapters.lora import LoRALinear, merge
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.grafting import Graft


@dataclass
class TrunkTensors:
    """``tensors``: by official name. ``grafted``: how many of them belong to each graft that could not be merged.
    ``merged``: in how many layers LoRA was added to the weights."""

    tensors: dict[str, Tensor]
    grafted: dict[str, int]
    merged: int

    def __str__(self) -> str:
        parts = [f"the trunk, {len(self.tensors) - sum(self.grafted.values())} tensors"]
        if self.merged:
            parts.append(f"lora merged into {self.merged} layers")
        for kind, count in self.grafted.items():
            parts.append(f"{count} tensors of {kind}, without which it computes something else")
        return "; ".join(parts)


def trunk_tensors(trunk: Trunk) -> TrunkTensors:
    """The state of a trunk under official names; LoRA is merged in place."""
    layers = sum(isinstance(module, LoRALinear) for module in trunk.modules())
    merge(trunk)
    grafts = {f"{path}.": module.tuning for path, module in trunk.named_modules() if isinstance(module, Graft)}
    tensors: dict[str, Tensor] = {}
    grafted: dict[str, int] = {}
    for name, value in trunk.state_dict().items():
        tensors[name.removeprefix("vit.")] = value
        kind = next((kind for path, kind in grafts.items() if name.startswith(path)), None)
        if kind is not None:
            grafted[kind] = grafted.get(kind, 0) + 1
    return TrunkTensors(tensors, grafted, layers)
