"""model.head: the head on the feature maps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from vitgraft.configs.schema.adapters import Norm
from vitgraft.configs.schema.section import (
    Channels,
    Fraction,
    ImageSide,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    SmallCount,
)

Task = Literal["detection", "semantic", "video", "image"]


class MaskRCNNConfig(Section):
    """Mask R-CNN (arXiv 1703.06870) on the adapter's pyramid."""

    task: ClassVar[Task] = "detection"
    name: Literal["mask_rcnn"] = "mask_rcnn"
    num_classes: Positive | None = None
    """Foreground classes; ``null``: as many as the data set names."""
    masks: bool = True
    anchor_sizes: Annotated[list[ImageSide], Field(max_length=100)] = [32, 64, 128, 256]
    """One anchor size (pixels) for each stride of the pyramid."""
    anchor_ratios: Annotated[list[PositiveFloat], Field(max_length=100)] = [0.5, 1.0, 2.0]
    rpn_batch: Positive = 256
    rpn_proposals: Positive = 1000
    roi_batch: Positive = 512
    roi_positive_fraction: Fraction = 0.25
    box_channels: Channels = 1024
    mask_channels: Channels = 256
    mask_convs: SmallCount = 4
    score_threshold: Fraction = 0.05
    nms_threshold: Fraction = 0.5
    detections_per_image: Positive = 100


class UperNetConfig(Section):
    """UperNet (arXiv 1807.10221): pyramid pooling, top-down fusion, one classifier for every pixel."""

    task: ClassVar[Task] = "semantic"
    name: Literal["upernet"] = "upernet"
    num_classes: Positive | None = None
    channels: Channels = 512
    pool_scales: Annotated[list[SmallCount], Field(max_length=100)] = [1, 2, 3, 6]
    norm: Norm = "syncbn"
    dropout: Fraction = 0.1
    auxiliary_weight: NonNegativeFloat = 0.4
    """Weight of the auxiliary classifier's loss on the map of stride 16 (or the nearest); 0: none."""


class VideoTransformerConfig(Section):
    """Space-time attention over the trunk's maps of all frames, then one classifier for the clip."""

    task: ClassVar[Task] = "video"
    name: Literal["video_transformer"] = "video_transformer"
    num_classes: Positive | None = None
    embed_dim: Channels = 256
    depth: SmallCount = 2
    num_heads: SmallCount = 4
    grid: SmallCount = 4
    """Each frame's map is pooled to grid × grid tokens."""
    dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> VideoTransformerConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        return self


class ClassifierConfig(Section):
    """One linear classifier on the mean of the tokens of a clip."""

    task: ClassVar[Task] = "video"
    name: Literal["classifier"] = "classifier"
    num_classes: Positive | None = None
    fc_norm: bool = True
    """LayerNorm of the mean, as VideoMAE has it."""
    batch_norm: bool = False
    """BatchNorm without weights before the classifier, as linear probes have it (arXiv 2111.06377, appendix A.1)."""
    label_smoothing: Fraction = 0.0


class ImageClassifierConfig(Section):
    """One linear classifier on the mean of the tokens of an image."""

    task: ClassVar[Task] = "image"
    name: Literal["image_classifier"] = "image_classifier"
    num_classes: Positive | None = None
    fc_norm: bool = True
    """LayerNorm of the mean, as MAE has it when it is fine-tuned (arXiv 2111.06377)."""
    batch_norm: bool = False
    """BatchNorm without weights before the classifier, as linear probes have it (arXiv 2111.06377, appendix A.1)."""
    label_smoothing: Fraction = 0.0


HeadConfig = Annotated[
    MaskRCNNConfig | UperNetConfig | VideoTransformerConfig | ClassifierConfig | ImageClassifierConfig,
    Field(discriminator="name"),
]
