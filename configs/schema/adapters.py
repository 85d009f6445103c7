"""model.adapter: grafts on the trunk, the adapter that makes feature maps of it, and the neck over those."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from vitgraft.configs.schema.section import (
    BelowOne,
    Channels,
    Fraction,
    ImageSide,
    NonNegative,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    SmallCount,
)

Norm = Literal["syncbn", "bn", "gn", "ln"]
Role = Literal["graft", "adapter", "neck"]


class AdapterSection(Section):
    """Base of the sections of ``model.adapter``."""

    role: ClassVar[Role] = "adapter"
    """graft: changes the trunk's blocks; adapter: makes the maps; neck: makes maps of maps."""

    def map_strides(self) -> list[int] | None:
        """Return the strides of the output maps, ascending; ``None`` where the trunk decides them."""
        return None

    def strides_over(self, below: list[int] | None) -> list[int] | None:
        """Return the strides of the output maps for input maps of strides ``below``."""
        return self.map_strides() or below


class NoAdapterConfig(AdapterSection):
    """The trunk's own last map, at the stride of its patches."""

    name: Literal["none"] = "none"


class SimplePyramidConfig(AdapterSection):
    """ViTDet's simple feature pyramid: maps of several strides from the trunk's last map (arXiv 2203.16527)."""

    name: Literal["simple_pyramid"] = "simple_pyramid"
    channels: Channels = 256
    strides: Annotated[list[ImageSide], Field(max_length=100)] = [4, 8, 16, 32]
    norm: Norm = "ln"
    top_block: bool = False
    """One map more, of twice the largest stride: every other place of that map, as in ViTDet (p6 of p5)."""

    def map_strides(self) -> list[int] | None:
        return [*self.strides, 2 * self.strides[-1]] if self.top_block else self.strides

    @field_validator("strides")
    @classmethod
    def _ascending(cls, strides: list[int]) -> list[int]:
        if len(strides) < 1 or sorted(set(strides)) != strides:
            raise ValueError(f"strides must be ascending and distinct, e.g. [4, 8, 16, 32], not {strides}")
        return strides


class ViTAdapterConfig(AdapterSection):
    """ViT-Adapter: a convolutional branch that exchanges features with a plain trunk (arXiv 2205.08534).

    The defaults are those of the tiny and small adapters; base and large take 12 and 16 heads and ratio 0.5.
    """

    name: Literal["vit_adapter"] = "vit_adapter"
    conv_inplane: Channels = 64
    n_points: SmallCount = 4
    deform_num_heads: SmallCount = 6
    deform_ratio: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Channels of the deformable attention's values, as a part of the trunk's."""
    interaction_indexes: list[list[NonNegative]] | None = None
    """First and last block of every group, e.g. [[0, 2], [3, 5], [6, 8], [9, 11]]; ``null``: four equal groups."""
    with_cffn: bool = True
    cffn_ratio: Annotated[float, Field(gt=0, le=100)] = 0.25
    init_values: NonNegativeFloat = 0.0
    """Initial value of the injectors' gamma; with 0 the trunk is unchanged at the start."""
    add_vit_feature: bool = True
    fusion: Literal["last", "stages"] = "last"
    """Features that ``add_vit_feature`` adds to the four maps: the trunk's last map to all (detection), or that after
    group i to map i (segmentation)."""
    use_extra_extractor: bool = True
    drop_path: BelowOne = 0.0
    """Rate of the extractors' FFNs, the same in every group."""
    layer_norm_eps: PositiveFloat = 1e-6
    """1e-5 for Uni-Perceiver."""
    norm: Norm = "syncbn"

    def map_strides(self) -> list[int] | None:
        return [4, 8, 16, 32]

    @field_validator("interaction_indexes")
    @classmethod
    def _one_after_the_other(cls, indexes: list[list[int]] | None) -> list[list[int]] | None:
        if indexes is None:
            return None
        firsts = [0, *(pair[-1] + 1 for pair in indexes if pair)]
        ordered = [pair for pair, first in zip(indexes, firsts, strict=False) if len(pair) == 2 and first == pair[0]]
        if not indexes or len(ordered) < len(indexes) or any(first > last for first, last in ordered):
            raise ValueError(
                "interaction_indexes must be [first, last] blocks of groups that follow each other from block 0, "
                f"e.g. [[0, 2], [3, 5], [6, 8], [9, 11]], not {indexes}"
            )
        return indexes


class FPNConfig(AdapterSection):
    """A feature pyramid network over maps of several strides (arXiv 1612.03144)."""

    role: ClassVar[Role] = "neck"
    name: Literal["fpn"] = "fpn"
    channels: Channels = 256
    norm: Norm | Literal["none"] = "none"
    top_block: bool = False
    """One map more, of twice the largest stride: every other place of that map (p6 of p5)."""

    def strides_over(self, below: list[int] | None) -> list[int] | None:
        return [*below, 2 * below[-1]] if below and self.top_block else below


class AdaptFormerConfig(AdapterSection):
    """AdaptFormer bottlenecks beside the FFN of the trunk's blocks (arXiv 2205.13535)."""

    role: ClassVar[Role] = "graft"
    name: Literal["adaptformer"] = "adaptformer"
    bottleneck: Channels = 64
    scale: PositiveFloat | Literal["learnable"] = 0.1
    layout: Literal["parallel", "sequential"] = "parallel"
    layernorm: Literal["none", "in", "out"] = "none"
    dropout: Fraction = 0.0
    init: Literal["lora", "trunc_normal", "default"] = "lora"
    """lora: the up-projection starts at zero, so the trunk computes at first what it computed before. trunc_normal:
    both projections start at random, as the original's video model has them. default: as torch starts a Linear."""
    blocks: list[NonNegative] | None = None
    """The blocks (from 0) that get a bottleneck; ``null``: all of them."""

    @field_validator("blocks")
    @classmethod
    def _some_blocks(cls, blocks: list[int] | None) -> list[int] | None:
        if blocks is not None and (not blocks or sorted(set(blocks)) != blocks):
            raise ValueError(f"blocks must be ascending and distinct, e.g. [0, 1, 2], or null for all, not {blocks}")
        return blocks


class LoRAConfig(AdapterSection):
    """LoRA: a low-rank update beside Linear layers of the trunk's blocks (arXiv 2106.09685)."""

    role: ClassVar[Role] = "graft"
    name: Literal["lora"] = "lora"
    rank: Channels = 8
    alpha: PositiveFloat = 8.0
    """The update is scaled by alpha / rank."""
    dropout: BelowOne = 0.0
    targets: Annotated[list[str], Field(max_length=1000)] = ["q", "v"]
    """Names of layers, e.g. qkv, proj, fc1, fc2, q_proj. q, k and v are those parts of a fused qkv, or q_proj, k_proj
    and v_proj."""

    @field_validator("targets")
    @classmethod
    def _distinct(cls, targets: list[str]) -> list[str]:
        if not targets or len(set(targets)) < len(targets):
            raise ValueError(f"targets must be distinct names of layers, e.g. [q, v], not {targets}")
        twice = [part for part in "qkv" if part in targets and {"qkv", f"{part}_proj"} & set(targets)]
        if twice:
            raise ValueError(f"targets name {twice[0]} twice: alone and within another layer; keep one")
        return targets


class VPTConfig(AdapterSection):
    """Visual prompt tuning: learned tokens among those of the image (arXiv 2203.12119)."""

    role: ClassVar[Role] = "graft"
    name: Literal["vpt"] = "vpt"
    prompts: SmallCount = 1
    """Prompts of each block (deep), or in all (shallow)."""
    depth: Literal["deep", "shallow"] = "deep"
    """deep: every block has its own, cut off after it. shallow: they enter before the first block and stay."""


class BitFitConfig(AdapterSection):
    """BitFit: the biases of a frozen trunk are trained (arXiv 2106.10199)."""

    role: ClassVar[Role] = "graft"
    name: Literal["bitfit"] = "bitfit"


AdapterConfig = Annotated[
    NoAdapterConfig
    | SimplePyramidConfig
    | ViTAdapterConfig
    | AdaptFormerConfig
    | LoRAConfig
    | VPTConfig
    | BitFitConfig
    | FPNConfig,
    Field(discriminator="name"),
]
