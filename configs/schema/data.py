"""data: data sets, transforms of their samples, and sampling of clips."""

from __future__ import annotations

from fractions import Fraction as Rational
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from vitgraft.configs.schema.section import ImageSide, LargeCount, Positive, PositiveFloat, Section, SmallCount
from vitgraft.configs.schema.transforms import Resize, TransformConfig, check_transforms


class EvaluationSourceConfig(Section):
    """One packed data set: a folder of shards with a manifest, or ``digits:KIND/SPLIT`` for the built-in one."""

    path: str


class SourceConfig(EvaluationSourceConfig):
    """A data set to train on."""

    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Number of visits of each sample in an epoch, each with another augmentation (repeated augmentation)."""
    weight: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    """The same as a number that need not be whole, instead of ``repeats``: 0.25 is a quarter of the samples, another
    one in each epoch; 2.5 is two visits of each and a third of half of them. It gives exactly weight x samples
    entries, rounded."""

    @model_validator(mode="after")
    def _one_of_both(self) -> SourceConfig:
        if self.weight is not None and self.repeats != 1:
            raise ValueError(f"repeats {self.repeats} and weight {self.weight} say the same; keep one")
        return self

    @property
    def visits(self) -> Rational:
        """Mean visits of a sample in an epoch, exactly as written: 0.1 is a tenth."""
        return Rational(self.repeats) if self.weight is None else Rational(str(self.weight))


class ClipConfig(Section):
    """Sampling of a clip's frames from a video."""

    frames: SmallCount = 8
    sampling: Literal["dense", "uniform"] = "dense"
    """dense: ``frames`` frames ``stride`` apart from one window (random in training, central in evaluation);
    uniform: one frame of each of ``frames`` equal segments (random in training, its middle in evaluation)."""
    stride: Positive = 4
    decoder: Literal["pyav", "torchcodec"] | None = None
    """``null``: torchcodec where it is installed, else PyAV. Their pixels may differ: name one where a run must be
    bit-exact on hosts that are not installed alike."""


class ViewsConfig(Section):
    """Evaluation of a video by several views of it: ``clips`` places in time × ``crops`` places along the long side."""

    clips: SmallCount = 1
    crops: SmallCount = 1

    @property
    def count(self) -> int:
        """Views of each video."""
        return self.clips * self.crops


class CacheConfig(Section):
    """Local cache of the shards of data sets behind URLs, shared by all processes and runs of this machine."""

    folder: str | None = None
    """``null``: $VITGRAFT_CACHE/shards, or ~/.cache/vitgraft/shards."""
    max_bytes: Annotated[int, Field(ge=1, lt=1 << 62)] = 64 << 30
    """Least recently used shards go when it is full. It must hold 32 shards of each data set: those that a run
    shuffles together, and the next, which it fetches meanwhile."""


class SkipConfig(Section):
    """Leave damaged samples out: each keeps its place in the order, at weight zero, and is recorded."""

    skip: LargeCount
    """Largest number of different samples left out in a run, over all ranks and epochs, before it stops."""


class DataConfig(Section):
    """Shards, canvas, normalisation, transforms and loading."""

    train: Annotated[list[SourceConfig], Field(min_length=1, max_length=1000)]
    """One data set, or a list of them with the same kind and classes: a mixture, in which every epoch has exactly each
    source's entries (its samples times ``repeats`` or ``weight``) and every part of an epoch has them in proportion."""
    val: EvaluationSourceConfig | None = None
    image_size: list[ImageSide]
    """The canvas [height, width]: every image is resized into it and padded at the bottom and right."""
    mean: list[FiniteFloat] = [0.485, 0.456, 0.406]
    std: list[PositiveFloat] = [0.229, 0.224, 0.225]
    """Of pixels from 0 to 1. Where the recipe gives none, those with which the weights that it names were trained, if
    that is known (timm's, exported ones, those of ``train.init_from``)."""
    transforms: Annotated[list[TransformConfig], Field(max_length=100)] = [Resize()]
    """Training transforms in order; padding to the canvas and normalisation always follow."""
    clip: ClipConfig = ClipConfig()
    workers: Annotated[int, Field(ge=0, le=1 << 10)] = 1
    """Loader processes per rank; 0: decode in the training process."""
    prefetch: SmallCount = 4
    """Batches each worker prepares ahead."""
    cache: CacheConfig = CacheConfig()
    on_error: Literal["stop"] | SkipConfig = "stop"
    """Policy for training samples that cannot be decoded. Data that cannot be fetched always stops the run."""

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        # Validated here, so that an error names data.train.path and not data.train.0.path.
        return [SourceConfig.model_validate(value)] if isinstance(value, dict) else value

    @field_serializer("train", mode="wrap")
    def _as_written(self, value: list[SourceConfig], handler: SerializerFunctionWrapHandler) -> Any:
        tree = handler(value)
        return tree[0] if len(tree) == 1 else tree

    def paths(self) -> dict[str, str]:
        """Return the path of each data set, by its key in the recipe."""
        keys = ["data.train.path"] if len(self.train) == 1 else [f"data.train.{i}.path" for i in range(len(self.train))]
        paths = {key: source.path for key, source in zip(keys, self.train, strict=True)}
        return paths if self.val is None else paths | {"data.val.path": self.val.path}

    @field_validator("image_size")
    @classmethod
    def _height_width(cls, value: list[int]) -> list[int]:
        if len(value) != 2:
            raise ValueError(f"expected [height, width], e.g. [512, 512], not {value}")
        return value

    @field_validator("transforms")
    @classmethod
    def _order(cls, value: list[TransformConfig]) -> list[TransformConfig]:
        check_transforms(value)
        return value

    @field_validator("mean", "std")
    @classmethod
    def _three(cls, value: list[float]) -> list[float]:
        if len(value) != 3:
            raise ValueError(f"expected three numbers (R, G, B), not {len(value)}")
        return value
