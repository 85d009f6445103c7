"""model.backbone, model.adapter and model.head together."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator, model_validator

from vitgraft.configs.schema.adapters import (
    AdapterConfig,
    AdaptFormerConfig,
    NoAdapterConfig,
    Norm,
    SimplePyramidConfig,
)
from vitgraft.configs.schema.backbones import BackboneConfig, ViTConfig
from vitgraft.configs.schema.heads import HeadConfig, MaskRCNNConfig, Task, UperNetConfig, VideoTransformerConfig
from vitgraft.configs.schema.section import Section


class ModelConfig(Section):
    """Three of the five axes."""

    backbone: BackboneConfig
    adapter: list[AdapterConfig] = [NoAdapterConfig()]
    """One adapter or a list: grafts on the trunk's blocks (adaptformer), at most one that makes the maps, and at most
    one neck."""
    head: HeadConfig

    def without_weights(self) -> ModelConfig:
        """The same model with random weights: what a checkpoint is loaded into."""
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"weights": None})})

    @field_validator("adapter", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _combination(self) -> ModelConfig:
        for role in ("adapter", "neck"):
            same = [part.name for part in self.adapter if part.role == role]
            if len(same) > 1:
                raise ValueError(f"adapter: {' and '.join(same)} cannot both make the maps; keep one")
        if len({part.name for part in self.adapter}) < len(self.adapter):
            raise ValueError("adapter: the same adapter is listed twice; keep one")
        makers = [part for part in self.adapter if part.role != "graft"]
        sources = [*reversed(makers), self.backbone]
        strides = next((source.map_strides() for source in sources if source.map_strides()), None)
        if isinstance(self.head, MaskRCNNConfig | UperNetConfig) and strides is None:
            raise ValueError(f"head {self.head.name} reads several strides; add adapter simple_pyramid")
        if isinstance(self.head, VideoTransformerConfig) and strides is not None:
            named = ", ".join(part.name for part in makers)
            raise ValueError(f"head video_transformer reads the trunk's last map; remove adapter {named}")
        if (
            isinstance(self.head, MaskRCNNConfig)
            and strides is not None
            and len(self.head.anchor_sizes) != len(strides)
        ):
            raise ValueError(
                f"head.anchor_sizes has {len(self.head.anchor_sizes)} sizes for the pyramid's strides {strides}; "
                "give one size for each stride"
            )
        return self


__all__ = [
    "AdaptFormerConfig",
    "AdapterConfig",
    "BackboneConfig",
    "HeadConfig",
    "MaskRCNNConfig",
    "ModelConfig",
    "NoAdapterConfig",
    "Norm",
    "SimplePyramidConfig",
    "Task",
    "UperNetConfig",
    "ViTConfig",
    "VideoTransformerConfig",
]
