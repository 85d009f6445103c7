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
from vitgraft.configs.schema.heads import (
    ClassifierConfig,
    HeadConfig,
    ImageClassifierConfig,
    MaskRCNNConfig,
    Task,
    UperNetConfig,
    VideoTransformerConfig,
)
from vitgraft.configs.schema.section import Section


class ModelConfig(Section):
    """Three of the five axes."""

    backbone: BackboneConfig
    adapter: list[AdapterConfig] = [NoAdapterConfig()]
    """One adapter or a list: grafts on the trunk's blocks (adaptformer), at most one that makes the maps, and at most
    one neck."""
    head: HeadConfig
    weights: str | None = None
    """One official file (or ``hf:OWNER/REPO/FILE``) for trunk, grafts, adapter and neck together, instead of
    ``backbone.weights``; what of the last three it holds nothing of starts at random, and so does the head."""

    def without_weights(self) -> ModelConfig:
        """The same model with random weights: what a checkpoint is loaded into."""
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"weights": None}), "weights": None})

    @field_validator("adapter", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _combination(self) -> ModelConfig:
        if self.weights is not None and self.backbone.weights is not None:
            raise ValueError("weights names a file for the trunk too; remove backbone.weights, or weights")
        for role in ("adapter", "neck"):
            same = [part.name for part in self.adapter if part.role == role]
            if len(same) > 1:
                raise ValueError(f"adapter: {' and '.join(same)} cannot both make the maps; keep one")
        if len({part.name for part in self.adapter}) < len(self.adapter):
            raise ValueError("adapter: the same adapter is listed twice; keep one")
        makers = [part for part in self.adapter if part.role != "graft"]
        strides = self.backbone.map_strides()
        for part in sorted(makers, key=lambda part: part.role == "neck"):
            strides = part.strides_over(strides)
        if isinstance(self.head, MaskRCNNConfig | UperNetConfig) and strides is None:
            raise ValueError(f"head {self.head.name} reads several strides; add adapter simple_pyramid")
        if (
            isinstance(self.head, VideoTransformerConfig | ClassifierConfig | ImageClassifierConfig)
            and strides is not None
        ):
            named = ", ".join(part.name for part in makers)
            remedy = "choose a plain backbone" if self.backbone.map_strides() else f"remove adapter {named}"
            raise ValueError(f"head {self.head.name} reads the trunk's last map; {remedy}")
        if self.backbone.takes_clips and self.head.task != "video":
            raise ValueError(f"backbone {self.backbone.name} reads clips, head {self.head.name} images; change one")
        if any(part.name == "bitfit" for part in self.adapter) and not self.backbone.frozen:
            raise ValueError("adapter bitfit trains the biases of a frozen trunk; set backbone.frozen: true")
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
