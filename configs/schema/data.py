"""data: which shards, how their samples are transformed, how a clip is sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vitgraft.configs.schema.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class EvaluationSourceConfig(Section):
    """One packed data set: a folder of shards with a manifest, or ``digits:KIND/SPLIT`` for the built-in one."""

    path: str


class SourceConfig(EvaluationSourceConfig):
    """A data set to train on."""

    repeats: Positive = 1
    """How often each sample is visited in an epoch, each time augmented differently (repeated augmentation)."""


class ScaleJitter(Section):
    """Large-scale jitter: resize so that the image fits the canvas times a random factor."""

    name: Literal["scale_jitter"] = "scale_jitter"
    min: PositiveFloat = 0.1
    max: PositiveFloat = 2.0

    @model_validator(mode="after")
    def _ascending(self) -> ScaleJitter:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class RandomCrop(Section):
    """Cut (or leave room for padding) to at most the canvas size, at a random place."""

    name: Literal["random_crop"] = "random_crop"


class RandomResizedCrop(Section):
    """A random part of the image, resized to the whole canvas."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    min_area: PositiveFloat = 0.08
    max_area: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _ascending(self) -> RandomResizedCrop:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area} is larger than max_area {self.max_area}")
        return self


class HorizontalFlip(Section):
    """Mirror left and right with this probability."""

    name: Literal["horizontal_flip"] = "horizontal_flip"
    probability: Fraction = 0.5


class Photometric(Section):
    """Random brightness, contrast, saturation (factors 1 ± value) and hue (± value)."""

    name: Literal["photometric"] = "photometric"
    brightness: NonNegativeFloat = 0.125
    contrast: NonNegativeFloat = 0.5
    saturation: NonNegativeFloat = 0.5
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.07


class Resize(Section):
    """Resize so that the image fits the canvas, keeping its aspect ratio (what evaluation always does)."""

    name: Literal["resize"] = "resize"


TransformConfig = Annotated[
    ScaleJitter | RandomCrop | RandomResizedCrop | HorizontalFlip | Photometric | Resize, Field(discriminator="name")
]


class ClipConfig(Section):
    """How frames are taken from a video."""

    frames: Positive = 8
    sampling: Literal["dense", "uniform"] = "dense"
    """dense: ``frames`` frames ``stride`` apart from one window (random in training, central in evaluation);
    uniform: one frame of each of ``frames`` equal segments (random in training, its middle in evaluation)."""
    stride: Positive = 4


class DataConfig(Section):
    """Shards, canvas, normalisation, transforms and loading."""

    train: SourceConfig
    val: EvaluationSourceConfig | None = None
    image_size: list[Positive]
    """The canvas [height, width]: every image is resized into it and padded at the bottom and right."""
    mean: list[float] = [0.485, 0.456, 0.406]
    std: list[PositiveFloat] = [0.229, 0.224, 0.225]
    transforms: list[TransformConfig] = [Resize()]
    """Training transforms in order; padding to the canvas and normalisation always follow."""
    clip: ClipConfig = ClipConfig()
    workers: NonNegative = 1
    """Loader processes per rank; 0: decode in the training process."""
    prefetch: Positive = 4
    """Batches each worker prepares ahead."""

    @field_validator("image_size")
    @classmethod
    def _height_width(cls, value: list[int]) -> list[int]:
        if len(value) != 2:
            raise ValueError(f"expected [height, width], e.g. [512, 512], not {value}")
        return value

    @field_validator("mean", "std")
    @classmethod
    def _three(cls, value: list[float]) -> list[float]:
        if len(value) != 3:
            raise ValueError(f"expected three numbers (R, G, B), not {len(value)}")
        return value
