"""model.backbone, model.adapter and model.head: which trunk, what is grafted on it, what reads it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from vitgraft.configs.schema.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Norm = Literal["syncbn", "bn", "gn", "ln"]
Task = Literal["detection", "semantic", "video"]


class ViTConfig(Section):
    """A plain ViT: any timm VisionTransformer by name, or one given by its sizes."""

    name: Literal["vit"] = "vit"
    timm: str | None = None
    """timm model name, e.g. ``vit_large_patch16_224.augreg_in21k``; the sizes below are then not given."""
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    patch_size: Positive | None = None
    mlp_ratio: PositiveFloat | None = None
    weights: str | None = None
    """``null`` (random), ``timm`` (the pretrained weights of the timm name), or a .safetensors/.pth file."""
    drop_path: Fraction = 0.0
    frozen: bool = False
    """Freeze the trunk: only what is grafted on it and the head are trained and checkpointed."""

    @model_validator(mode="after")
    def _one_way_to_say_sizes(self) -> ViTConfig:
        sizes = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")
        given = [key for key in sizes if getattr(self, key) is not None]
        if self.timm is not None and given:
            raise ValueError(f"timm names the sizes already; remove {', '.join(given)}")
        if self.timm is None:
            missing = [key for key in sizes[:4] if getattr(self, key) is None]
            if missing:
                raise ValueError(f"give timm: NAME, or the sizes: {', '.join(missing)} missing")
            if self.weights == "timm":
                raise ValueError("weights: timm needs timm: NAME")
            if (self.embed_dim or 0) % 4:
                raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of 4 (sines and cosines of two axes)")
            if (self.embed_dim or 0) % (self.num_heads or 1):
                raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        return self


BackboneConfig = Annotated[ViTConfig, Field()]


class NoAdapterConfig(Section):
    """The trunk's own last map, at the stride of its patches."""

    name: Literal["none"] = "none"


class SimplePyramidConfig(Section):
    """ViTDet's simple feature pyramid: maps of several strides from the trunk's last map (arXiv 2203.16527)."""

    name: Literal["simple_pyramid"] = "simple_pyramid"
    channels: Positive = 256
    strides: list[Positive] = [4, 8, 16, 32]
    norm: Norm = "ln"

    @field_validator("strides")
    @classmethod
    def _ascending(cls, strides: list[int]) -> list[int]:
        if len(strides) < 1 or sorted(set(strides)) != strides:
            raise ValueError(f"strides must be ascending and distinct, e.g. [4, 8, 16, 32], not {strides}")
        return strides


class AdaptFormerConfig(Section):
    """AdaptFormer bottlenecks beside the FFN of every block of the trunk (arXiv 2205.13535)."""

    name: Literal["adaptformer"] = "adaptformer"
    bottleneck: Positive = 64
    scale: PositiveFloat | Literal["learnable"] = 0.1
    layout: Literal["parallel", "sequential"] = "parallel"
    layernorm: Literal["none", "in", "out"] = "none"
    dropout: Fraction = 0.0


AdapterConfig = Annotated[NoAdapterConfig | SimplePyramidConfig | AdaptFormerConfig, Field(discriminator="name")]


class MaskRCNNConfig(Section):
    """Mask R-CNN (arXiv 1703.06870) on the adapter's pyramid."""

    task: ClassVar[Task] = "detection"
    name: Literal["mask_rcnn"] = "mask_rcnn"
    num_classes: Positive | None = None
    """Foreground classes; ``null``: as many as the data set names."""
    masks: bool = True
    anchor_sizes: list[Positive] = [32, 64, 128, 256]
    """One anchor size (pixels) for each stride of the pyramid."""
    anchor_ratios: list[PositiveFloat] = [0.5, 1.0, 2.0]
    rpn_batch: Positive = 256
    rpn_proposals: Positive = 1000
    roi_batch: Positive = 512
    roi_positive_fraction: Fraction = 0.25
    box_channels: Positive = 1024
    mask_channels: Positive = 256
    mask_convs: Positive = 4
    score_threshold: Fraction = 0.05
    nms_threshold: Fraction = 0.5
    detections_per_image: Positive = 100


class UperNetConfig(Section):
    """UperNet (arXiv 1807.10221): pyramid pooling, top-down fusion, one classifier for every pixel."""

    task: ClassVar[Task] = "semantic"
    name: Literal["upernet"] = "upernet"
    num_classes: Positive | None = None
    channels: Positive = 512
    pool_scales: list[Positive] = [1, 2, 3, 6]
    norm: Norm = "syncbn"
    dropout: Fraction = 0.1
    auxiliary_weight: NonNegativeFloat = 0.4
    """Weight of the auxiliary classifier's loss on the map of stride 16 (or the nearest); 0: none."""


class VideoTransformerConfig(Section):
    """Space-time attention over the trunk's maps of all frames, then one classifier for the clip."""

    task: ClassVar[Task] = "video"
    name: Literal["video_transformer"] = "video_transformer"
    num_classes: Positive | None = None
    embed_dim: Positive = 256
    depth: Positive = 2
    num_heads: Positive = 4
    grid: Positive = 4
    """Each frame's map is pooled to grid × grid tokens."""
    dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> VideoTransformerConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        return self


HeadConfig = Annotated[MaskRCNNConfig | UperNetConfig | VideoTransformerConfig, Field(discriminator="name")]


class ModelConfig(Section):
    """Three of the five axes."""

    backbone: BackboneConfig
    adapter: list[AdapterConfig] = [NoAdapterConfig()]
    """One adapter or a list: grafts on the trunk's blocks (adaptformer) and at most one that makes the maps."""
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
        makers = [a for a in self.adapter if not isinstance(a, AdaptFormerConfig)]
        if len(makers) > 1:
            raise ValueError(f"adapter: only one of {', '.join(a.name for a in makers)} can make the maps; keep one")
        if len({a.name for a in self.adapter}) < len(self.adapter):
            raise ValueError("adapter: the same adapter is listed twice; keep one")
        pyramid = next((a for a in self.adapter if isinstance(a, SimplePyramidConfig)), None)
        if isinstance(self.head, MaskRCNNConfig | UperNetConfig) and pyramid is None:
            raise ValueError(f"head {self.head.name} reads several strides; add adapter simple_pyramid")
        if isinstance(self.head, VideoTransformerConfig) and pyramid is not None:
            raise ValueError("head video_transformer reads the trunk's last map; remove adapter simple_pyramid")
        if isinstance(self.head, MaskRCNNConfig) and pyramid is not None:
            sizes, strides = self.head.anchor_sizes, pyramid.strides
            if len(sizes) != len(strides):
                raise ValueError(
                    f"head.anchor_sizes has {len(sizes)} sizes for the pyramid's strides {strides}; "
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
    "NonNegative",
    "Norm",
    "SimplePyramidConfig",
    "Task",
    "UperNetConfig",
    "ViTConfig",
    "VideoTransformerConfig",
]
