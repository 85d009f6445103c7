"""model.adapter: what is grafted on the trunk, what makes maps of it, and a neck over those."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from vitgraft.configs.schema.section import Fraction, Positive, PositiveFloat, Section

Norm = Literal["syncbn", "bn", "gn", "ln"]
Role = Literal["graft", "adapter", "neck"]


class AdapterSection(Section):
    """Base of the sections of ``model.adapter``."""

    role: ClassVar[Role] = "adapter"
    """graft: changes the trunk's blocks; adapter: makes the maps; neck: makes maps of maps."""

    def map_strides(self) -> list[int] | None:
        """The strides of the maps that come out, ascending; ``None`` where the trunk decides them."""
        return None


class NoAdapterConfig(AdapterSection):
    """The trunk's own last map, at the stride of its patches."""

    name: Literal["none"] = "none"


class SimplePyramidConfig(AdapterSection):
    """ViTDet's simple feature pyramid: maps of several strides from the trunk's last map (arXiv 2203.16527)."""

    name: Literal["simple_pyramid"] = "simple_pyramid"
    channels: Positive = 256
    strides: list[Positive] = [4, 8, 16, 32]
    norm: Norm = "ln"

    def map_strides(self) -> list[int] | None:
        return self.strides

    @field_validator("strides")
    @classmethod
    def _ascending(cls, strides: list[int]) -> list[int]:
        if len(strides) < 1 or sorted(set(strides)) != strides:
            raise ValueError(f"strides must be ascending and distinct, e.g. [4, 8, 16, 32], not {strides}")
        return strides


class AdaptFormerConfig(AdapterSection):
    """AdaptFormer bottlenecks beside the FFN of every block of the trunk (arXiv 2205.13535)."""

    role: ClassVar[Role] = "graft"
    name: Literal["adaptformer"] = "adaptformer"
    bottleneck: Positive = 64
    scale: PositiveFloat | Literal["learnable"] = 0.1
    layout: Literal["parallel", "sequential"] = "parallel"
    layernorm: Literal["none", "in", "out"] = "none"
    dropout: Fraction = 0.0


AdapterConfig = Annotated[NoAdapterConfig | SimplePyramidConfig | AdaptFormerConfig, Field(discriminator="name")]
