"""Visual prompt tuning (arXiv 2203.12119): learned tokens that the trunk's own attend to.

deep: every block has its own prompts; they stand before all other tokens and are cut off after the block (as in
AdaptFormer's code, whose ``embeddings.i`` is ``blocks.i.prompts.tokens`` here). shallow: prompts enter once, before the
first block, and stay to the last; they stand between the class token and the patches, as in the paper, so that the
class token remains the first. Prompts have no positions, so only their number matters to a trunk, not their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import VPTConfig
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.grafting import Graft, GraftableBlock
from vitgraft.models.registry import register


class Prompts(Graft):
    """Tokens (B, N, C) → the same with prompts after the first ``behind`` of them, (B, N + count, C)."""

    tuning: ClassVar[str] = "vpt"

    def __init__(self, count: int, width: int, behind: int = 0) -> None:
        super().__init__()
        self.count, self.behind = count, behind
        self.tokens = nn.Parameter(torch.empty(1, count, width))
        nn.init.xavier_uniform_(self.tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        prompts = self.tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, : self.behind], prompts, tokens[:, self.behind :]], 1)


@register("graft", "vpt")
def graft_vpt(config: VPTConfig, *, trunk: Trunk) -> None:
    """Graft prompts on the trunk, in place.

    Raises ``ConfigError`` when its blocks attend within windows or add a bias for each pair of places: there extra
    tokens have no place.
    """
    for index, block in enumerate(trunk.blocks):
        if not _takes_prompts(block):
            raise ConfigError(
                f"model.adapter: vpt needs global attention without a bias or rotation bound to the grid, but block "
                f"{index} of this trunk is a {type(block).__name__}; choose another trunk or another adapter"
            )
    if config.depth == "shallow":
        trunk.prompts = Prompts(config.prompts, trunk.embed_dim, behind=trunk.prefix_tokens)
        trunk.prefix_tokens += config.prompts
        # A partial of the bound method survives copy.deepcopy; a closure over the trunk would not.
        setattr(trunk, "embed", functools.partial(_embed_with_prompts, trunk.embed))  # noqa: B010  mypy refuses "="
        return
    for block in trunk.blocks:
        block.prompts = Prompts(config.prompts, trunk.embed_dim)
        # Hooks, because they go with any block's forward, and its arguments beside the tokens.
        block.register_forward_pre_hook(_prepend)
        block.register_forward_hook(_cut_off)


def _takes_prompts(block: nn.Module) -> bool:
    if isinstance(block, Block) and type(block.attn) is not Attention:
        return False
    return block.takes_prompts if isinstance(block, GraftableBlock) else isinstance(block, Block)


def _prepend(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (block.prompts(inputs[0]), *inputs[1:])


def _cut_off(block: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output[:, block.prompts.count :]


def _embed_with_prompts(embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    trunk: Any = embed.__self__  # type: ignore[attr-defined]
    tokens: Tensor = trunk.prompts(embed(images))
    return tokens
