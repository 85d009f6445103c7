"""AdaptFormer (arXiv 2205.13535): a bottleneck beside the FFN of the trunk's blocks.

    parallel (the paper's equation 3):  x' + ffn(norm(x')) + s · up(relu(down(x')))
    sequential:                         x' + y + s · up(relu(down(y))),  y = ffn(norm(x'))

with x' the stream after the attention's residual. The up-projection starts at zero, so a grafted trunk computes at
first what it computed before, unless ``init`` says otherwise: the original's video model starts every Linear again once
it is built, its bottlenecks included, and so loses the zero. Names in the state dict are those of the official code:
``blocks.i.adaptmlp.down_proj``, ``.up_proj``, ``.adapter_layer_norm_before`` and ``.scale``; the block's own names
stay.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import AdaptFormerConfig
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.grafting import Graft, GraftableBlock
from vitgraft.models.registry import register


class AdaptMLP(Graft):
    """The bottleneck: tokens (B, N, C) → what is added to the stream, (B, N, C)."""

    tuning: ClassVar[str] = "adaptformer"

    def __init__(self, config: AdaptFormerConfig, width: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, config.bottleneck)
        self.up_proj = nn.Linear(config.bottleneck, width)
        self.dropout = config.dropout
        self.layernorm = config.layernorm
        self.init = config.init
        if config.layernorm != "none":
            # One name for both places, as in the official state dict.
            self.adapter_layer_norm_before = nn.LayerNorm(width)
        self.scale: nn.Parameter | float
        self.scale = nn.Parameter(torch.ones(1)) if config.scale == "learnable" else float(config.scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start that ``init`` names; the paper's (that of LoRA) is a random down- and a zero up-projection."""
        for layer in (self.down_proj, self.up_proj):
            if self.init == "default":
                layer.reset_parameters()
                continue
            nn.init.zeros_(layer.bias)
            if self.init == "trunc_normal":
                nn.init.trunc_normal_(layer.weight, std=0.02)
            elif layer is self.up_proj:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if self.layernorm != "none":
            self.adapter_layer_norm_before.reset_parameters()
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.layernorm == "in":
            tokens = self.adapter_layer_norm_before(tokens)
        hidden = F.dropout(F.relu(self.down_proj(tokens)), self.dropout, self.training)
        added: Tensor = self.up_proj(hidden) * self.scale
        if self.layernorm == "out":
            added = self.adapter_layer_norm_before(added)
        return added


class AdaptFormerBlock(GraftableBlock, Block):  # type: ignore[misc]
    """A timm block with the place for a graft; made from a plain one by :func:`graft_adaptformer`."""

    takes_prompts = True

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        block: Any = self  # timm's modules are not typed
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **mask)))
        return self.add_ffn(x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


class AdaptFormerEvaBlock(GraftableBlock, EvaBlock):  # type: ignore[misc]
    """The same for timm's block with rotary positions (EVA-02, DINOv3)."""

    def forward(self, x: Tensor, rope: Tensor | None = None, **mask: Any) -> Tensor:
        block: Any = self
        attended = block.attn(block.norm1(x), rope=rope, **mask)
        x = x + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
        branch = block.mlp(block.norm2(x))
        return self.add_ffn(x, block.drop_path2(branch if block.gamma_2 is None else block.gamma_2 * branch))


_GRAFTABLE: dict[type, type] = {Block: AdaptFormerBlock, EvaBlock: AdaptFormerEvaBlock}


@register("graft", "adaptformer")
def graft_adaptformer(config: AdaptFormerConfig, *, trunk: Trunk) -> None:
    """Graft a bottleneck on every block, or on those that the recipe names, in place.

    Only a timm block's class changes, so its modules, their names and the weights already loaded stay. Raises
    ``ConfigError`` when the trunk's blocks are neither timm's standard ones nor made for grafts, or are fewer than the
    recipe names.
    """
    chosen = range(trunk.depth) if config.blocks is None else config.blocks
    if chosen[-1] >= trunk.depth:
        raise ConfigError(
            f"model.adapter: adaptformer.blocks: {chosen[-1]} is beyond the last of this trunk's {trunk.depth} blocks; "
            f"count from 0 to {trunk.depth - 1}"
        )
    for index in chosen:
        module = trunk.blocks[index]
        block: Any = module
        if type(block) in _GRAFTABLE:
            block.__class__ = _GRAFTABLE[type(block)]
        if not isinstance(block, GraftableBlock):
            raise ConfigError(
                f"model.adapter: adaptformer fits timm's Block and EvaBlock, but block {index} of this trunk is a "
                f"{type(module).__name__}; choose another trunk or another adapter"
            )
        block.adaptmlp = AdaptMLP(config, trunk.embed_dim)
        block.adapt_parallel = config.layout == "parallel"
