"""No adapter: the trunk's own last map."""

from __future__ import annotations

from torch import Tensor

from vitgraft.configs.schema.model import NoAdapterConfig
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.registry import register


@register("adapter", "none")
class NoAdapter(Adapter):
    """The trunk's map under the stride of its patches: (B, C, h, w) → {patch_size: (B, C, h, w)}."""

    def __init__(self, config: NoAdapterConfig, *, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.strides = [patch_size]
        self.channels = {patch_size: embed_dim}

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return (features,)
