"""Grafting of modules into a trunk's blocks: their marks and attachment points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn


class Graft(nn.Module):
    """Base of modules that are inserted into a trunk's blocks: trained, and in training mode, when the trunk is not."""

    tuning: ClassVar[str] = "graft"
    """The recipe's name for what it belongs to, under which its parameters are reported."""


class GraftableBlock(nn.Module):
    """Base of the transformer blocks written here: the place beside the FFN where a bottleneck can be grafted.

    A block adds its FFN branch with :meth:`add_ffn` instead of ``+``, and calls its Linear layers as modules (not
    their weights through ``F.linear``), so that a graft on a layer is seen.
    """

    adapt_parallel: bool = True
    """The grafted module ``adaptmlp`` reads the residual stream if true, else the output of the FFN's branch."""
    takes_prompts: bool = False
    """True if extra tokens may be prepended: global attention without a position table bound to the grid."""

    def add_ffn(self, stream: Tensor, branch: Tensor) -> Tensor:
        """``stream``: (B, N, C) after the attention's residual. ``branch``: (B, N, C), what the FFN adds to it."""
        graft = self._modules.get("adaptmlp")
        if graft is None:
            return stream + branch
        grafted: Tensor = graft(stream if self.adapt_parallel else branch)
        return stream + branch + grafted


def trunk_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Every module under ``root``, itself included, that is neither a graft nor inside one."""
    if isinstance(root, Graft):
        return
    yield root
    for child in root.children():
        yield from trunk_modules(child)


def trunk_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter under ``root`` that belongs to no graft."""
    for module in trunk_modules(root):
        yield from module.parameters(recurse=False)
