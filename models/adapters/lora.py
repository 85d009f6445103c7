"""LoRA (arXiv 2106.09685): a low-rank update beside Linear layers of the trunk's blocks.

    W x + b + (alpha / rank) · B A x        (the paper's equation 3)

with A: (rank, in) at random and B: (out, rank) at zero, so a grafted trunk computes at first what it computed before.
Only a layer's class changes: ``qkv.weight`` stays ``qkv.weight``, beside ``qkv.lora.q.A.weight`` and
``qkv.lora.q.B.weight`` for the rows of the queries alone, or ``qkv.lora.all.A.weight`` for all rows.
:func:`merge` adds the updates to the weights and leaves plain layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import LoRAConfig
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.grafting import Graft, GraftableBlock, trunk_modules
from vitgraft.models.registry import register


class LowRank(nn.Module):
    """(…, in) → B A x, (…, out)."""

    def __init__(self, inputs: int, outputs: int, config: LoRAConfig) -> None:
        super().__init__()
        self.A = nn.Linear(inputs, config.rank, bias=False)
        self.B = nn.Linear(config.rank, outputs, bias=False)
        self.dropout = config.dropout
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.B(self.A(F.dropout(x, self.dropout, self.training)))
        return update


class LoRA(Graft):
    """Return the low-rank update of a layer's output: (…, in) → (…, out). ``parts``: q, k or v of a fused qkv, or none
    for all."""

    tuning: ClassVar[str] = "lora"

    def __init__(self, layer: nn.Linear, parts: list[str], config: LoRAConfig) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.parts = ["q", "k", "v"] if parts else ["all"]
        for part in parts or self.parts:
            self.add_module(part, LowRank(layer.in_features, layer.out_features // len(self.parts), config))

    def forward(self, x: Tensor) -> Tensor:
        updates = {part: module(x) for part, module in self.named_children()}
        like = next(iter(updates.values()))
        return torch.cat([updates[p] if p in updates else torch.zeros_like(like) for p in self.parts], -1) * self.scale

    def delta(self) -> Tensor:
        """The update as a matrix, (out, in) float32."""
        updates = {part: module.B.weight.float() @ module.A.weight.float() for part, module in self._low_ranks()}
        like = next(iter(updates.values()))
        return torch.cat([updates[p] if p in updates else torch.zeros_like(like) for p in self.parts]) * self.scale

    def _low_ranks(self) -> Iterator[tuple[str, LowRank]]:
        return cast(Iterator[tuple[str, LowRank]], self.named_children())


class LoRALinear(nn.Linear):
    """A Linear layer with ``lora`` beside it; made from a plain one by :func:`graft_lora`."""

    lora: LoRA

    def forward(self, input: Tensor) -> Tensor:
        update: Tensor = self.lora(input)
        return super().forward(input) + update


@register("graft", "lora")
def graft_lora(config: LoRAConfig, *, trunk: Trunk) -> None:
    """Graft an update on every layer of the trunk's blocks that the recipe names, in place.

    Raises ``ConfigError`` for a name that no layer has, and for blocks of which it is not known that they call their
    Linear layers.
    """
    names: set[str] = set()
    found: set[str] = set()
    for index, block in enumerate(trunk.blocks):
        if not isinstance(block, GraftableBlock | Block | EvaBlock):
            raise ConfigError(
                f"model.adapter: lora does not fit block {index} of this trunk, a {type(block).__name__}; choose "
                "another trunk or another adapter"
            )
        for module in list(trunk_modules(block)):
            if isinstance(module, EvaAttention):
                module.qkv_bias_separate = True  # otherwise timm multiplies by the weight without calling the layer
        for name, layer in _linears(block):
            names.add(name)
            targets, parts = _wanted(name, layer, config.targets)
            if targets:
                found.update(targets)
                cast(Any, layer).__class__ = LoRALinear
                layer.lora = LoRA(layer, parts, config)
    missing = [target for target in config.targets if target not in found]
    if missing:
        raise ConfigError(
            f"model.adapter: lora.targets: no layer {missing[0]!r} in the trunk's blocks; name some of "
            f"{', '.join(sorted(names))}" + (", q, k, v" if {"qkv", "q_proj"} & names else "")
        )


@torch.no_grad()
def merge(root: nn.Module) -> None:
    """Add every update under ``root`` to its layer's weight and take it out, in place: plain layers remain."""
    for layer in [module for module in root.modules() if isinstance(module, LoRALinear)]:
        layer.weight.copy_(layer.weight.float() + layer.lora.delta())
        del layer.lora
        cast(Any, layer).__class__ = nn.Linear


def _linears(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The block's own plain Linear layers with the last part of their names."""
    own = set(trunk_modules(block))
    for name, module in block.named_modules():
        if type(module) is nn.Linear and module in own:
            yield name.rpartition(".")[2], module


def _wanted(name: str, layer: nn.Linear, targets: list[str]) -> tuple[list[str], list[str]]:
    """Return the targets that match this layer, and the parts of it that they name (none: the whole)."""
    if name in targets:
        return [name], []
    if name == "qkv":
        parts = [part for part in "qkv" if part in targets]
        return parts, parts
    part = name.removesuffix("_proj")
    return ([part], []) if part in ("q", "k", "v") and part in targets and part != name else ([], [])
