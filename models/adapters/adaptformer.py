"""AdaptFormer (arXiv 2205.13535): a bottleneck beside the FFN of every block of the trunk.

    parallel (the paper's equation 3):  x' + ffn(norm(x')) + s · up(relu(down(x')))
    sequential:                         x' + y + s · up(relu(down(y))),  y = ffn(norm(x'))

with x' the stream after the attention's residual. The up-projection starts at zero, so a grafted trunk computes at
first what it computed before. Names in the state dict are those of the official code: ``blocks.i.adaptmlp.down_proj``,
``.up_proj``, ``.adapter_layer_norm_before`` and ``.scale``; the block's own names stay.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import AdaptFormerConfig
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.grafting import Graft, GraftableBlock
from vitgraft.models.registry import register


class AdaptMLP(Graft):
    """The bottleneck: tokens (B, N, C) → what is added to the stream, (B, N, C)."""

    def __init__(self, config: AdaptFormerConfig, width: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, config.bottleneck)
        self.up_proj = nn.Linear(config.bottleneck, width)
        self.dropout = config.dropout
        self.layernorm = config.layernorm
        if config.layernorm != "none":
            # One name for both places, as in the official state dict.
            self.adapter_layer_norm_before = nn.LayerNorm(width)
        self.scale: nn.Parameter | float
        self.scale = nn.Parameter(torch.ones(1)) if config.scale == "learnable" else float(config.scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's start (that of LoRA): a random down-projection, and an up-projection that gives zero."""
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)
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

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        block: Any = self  # timm's modules are not typed
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **mask)))
        return self.add_ffn(x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


@register("graft", "adaptformer")
def graft_adaptformer(config: AdaptFormerConfig, *, trunk: Trunk) -> None:
    """Graft a bottleneck on every block, in place.

    Only a timm block's class changes, so its modules, their names and the weights already loaded stay. Raises
    ``ConfigError`` when the trunk's blocks are neither timm's standard ones nor made for grafts.
    """
    for index, module in enumerate(trunk.blocks):
        block: Any = module
        if type(block) is Block:
            block.__class__ = AdaptFormerBlock
        if not isinstance(block, GraftableBlock):
            raise ConfigError(
                f"model.adapter: adaptformer fits timm's Block, but block {index} of this trunk is a "
                f"{type(module).__name__}; choose another trunk or another adapter"
            )
        block.adaptmlp = AdaptMLP(config, trunk.embed_dim)
        block.adapt_parallel = config.layout == "parallel"
