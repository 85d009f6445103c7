"""No adapter: the trunk's own maps."""

from __future__ import annotations

from torch import Tensor

from vitgraft.configs.schema.model import NoAdapterConfig
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.registry import register


@register("adapter", "none")
class NoAdapter(Adapter):
    """A plain trunk's one map under the stride of its patches; a hierarchical trunk's maps as they are."""

    def __init__(self, config: NoAdapterConfig, *, trunk: Trunk) -> None:
        super().__init__()
        self.channels = dict(trunk.channels)
        self.strides = list(self.channels)

    def forward(self, trunk: Trunk, images: Tensor) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = trunk(images)
        return maps
