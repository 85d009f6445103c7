"""data.transforms: the transforms of a sample in training, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vitgraft.configs.schema.section import Fraction, ImageSide, Positive, PositiveFloat, Section, SmallCount

Share = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=100)]
Factor = Annotated[float, Field(ge=0, le=100)]


class ScaleJitter(Section):
    """Large-scale jitter: resize so that the image fits the canvas times a random factor."""

    name: Literal["scale_jitter"] = "scale_jitter"
    min: Scale = 0.1
    max: Scale = 2.0

    @model_validator(mode="after")
    def _ascending(self) -> ScaleJitter:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class MultiScale(Section):
    """Resize so that the short side is a random one of ``short``, or less where the long side would pass ``max_long``.

    mmdet's RandomChoiceResize and detectron2's ResizeShortestEdge. What is larger than the canvas in the end is resized
    to fit it: give a canvas of ``max_long`` both ways, or crop afterwards.
    """

    name: Literal["multi_scale"] = "multi_scale"
    short: Annotated[list[ImageSide], Field(max_length=1000)]
    """Short sides in pixels: all to choose from, or with ``sampling: range`` [smallest, largest]."""
    max_long: ImageSide = 1333
    sampling: Literal["choice", "range"] = "choice"

    @model_validator(mode="after")
    def _sides(self) -> MultiScale:
        if not self.short:
            raise ValueError("short is empty; give short sides in pixels, e.g. [480, 512, 544]")
        if self.sampling == "range" and (len(self.short) != 2 or self.short[0] > self.short[1]):
            raise ValueError(f"short {self.short} is no range; give [smallest, largest], e.g. [256, 1024]")
        return self


class RandomCrop(Section):
    """Cut to at most the canvas size, or to a random size, at a random place; smaller images stay whole."""

    name: Literal["random_crop"] = "random_crop"
    sides: list[ImageSide] | None = None
    """[smallest, largest]: height and width are each drawn from this range (DETR's crop: [384, 600]); ``null``: those
    of the canvas."""
    cat_max_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Semantic only: draw again, up to ten times, while one class has at least this share of the labelled pixels
    (mmseg: 0.75)."""

    @field_validator("sides")
    @classmethod
    def _range(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            raise ValueError(f"expected [smallest, largest], e.g. [384, 600], not {value}")
        return value


class RandomResizedCrop(Section):
    """A random part of the image, resized to the whole canvas."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    min_area: PositiveFloat = 0.08
    max_area: Share = 1.0

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
    """Brightness, contrast, saturation (factors 1 ± value) and hue (± value), each changed with this probability.

    mmseg's PhotoMetricDistortion with torchvision's operations, contrast before saturation and hue or after them at
    random. Two of them are not quite mmseg's: it adds up to 32 of 255 to every pixel, where a factor moves white by as
    much and darker pixels by less; and its contrast keeps black where it is, torchvision's the mean grey.
    """

    name: Literal["photometric"] = "photometric"
    probability: Fraction = 0.5
    brightness: Factor = 0.125
    contrast: Factor = 0.5
    saturation: Factor = 0.5
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """In turns of the colour circle: mmseg's 18 of OpenCV's 180 are 0.1."""


class Resize(Section):
    """Resize so that the image fits the canvas, keeping its aspect ratio (what evaluation always does)."""

    name: Literal["resize"] = "resize"


class RandAugment(Section):
    """RandAugment (arXiv 1909.13719) as torchvision has it; all frames of a clip alike. For class labels only."""

    name: Literal["rand_augment"] = "rand_augment"
    operations: SmallCount = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """0 to 30, torchvision's scale: timm's m9 of 10 is 27 here."""


class RandomErasing(Section):
    """Erase a random rectangle (arXiv 1708.04896), the same in all frames of a clip. For class labels only."""

    name: Literal["random_erasing"] = "random_erasing"
    probability: Fraction = 0.25
    min_area: PositiveFloat = 0.02
    max_area: Share = 1 / 3
    fill: Literal["noise", "mean"] = "noise"
    """noise: a normal colour around the mean for each pixel; mean: the mean colour."""

    @model_validator(mode="after")
    def _ascending(self) -> RandomErasing:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area} is larger than max_area {self.max_area}")
        return self


class CopyPaste(Section):
    """Simple copy-paste (arXiv 2012.07177): a random part of another image's instances. For detection only.

    The other image has gone through the transforms that stand before this one; those after it see the result.
    """

    name: Literal["copy_paste"] = "copy_paste"
    probability: Fraction = 1.0
    max_instances: Positive = 100


class Mixup(Section):
    """Mixup (arXiv 1710.09412) of two finished images or clips and their classes. For class labels only."""

    name: Literal["mixup"] = "mixup"
    alpha: PositiveFloat = 0.8
    probability: Fraction = 1.0


class CutMix(Section):
    """CutMix (arXiv 1905.04899) of two finished images or clips and their classes. For class labels only."""

    name: Literal["cutmix"] = "cutmix"
    alpha: PositiveFloat = 1.0
    probability: Fraction = 1.0


PlainTransform = (
    ScaleJitter
    | MultiScale
    | RandomCrop
    | RandomResizedCrop
    | HorizontalFlip
    | Photometric
    | Resize
    | RandAugment
    | RandomErasing
)


class OneOf(Section):
    """One of several lists of transforms, each as likely as the others."""

    name: Literal["one_of"] = "one_of"
    options: Annotated[
        list[Annotated[list[Annotated[PlainTransform, Field(discriminator="name")]], Field(max_length=100)]],
        Field(max_length=100),
    ]

    @field_validator("options")
    @classmethod
    def _some(cls, value: list[list[PlainTransform]]) -> list[list[PlainTransform]]:
        if len(value) < 2:
            raise ValueError(f"{len(value)} lists to choose from; give at least two lists of transforms")
        return value


TransformConfig = Annotated[PlainTransform | OneOf | CopyPaste | Mixup | CutMix, Field(discriminator="name")]


def check_transforms(transforms: Sequence[TransformConfig]) -> None:
    """Refuse orders and combinations that cannot work.

    Raises:
        ValueError: says which and what to do.
    """
    mixing = [item for item in transforms if isinstance(item, Mixup | CutMix)]
    for name in ("mixup", "cutmix", "copy_paste"):
        if sum(item.name == name for item in transforms) > 1:
            raise ValueError(f"{name} is listed twice; keep one")
    if list(transforms[len(transforms) - len(mixing) :]) != mixing:
        raise ValueError("mixup and cutmix mix finished samples; put them last")
    if (total := sum(item.probability for item in mixing)) > 1:
        raise ValueError(
            f"a sample is mixed by mixup or cutmix, not both: probabilities add up to {total}; give 0.5 each"
        )


def check_task(transforms: Sequence[TransformConfig], task: str) -> None:
    """Refuse transforms that a task's labels cannot follow.

    Raises:
        ValueError: names transform and task.
    """
    for item in _flat(transforms):
        if isinstance(item, RandAugment | RandomErasing | Mixup | CutMix) and task in ("detection", "semantic"):
            raise ValueError(f"data.transforms: {item.name} is for class labels, the head does {task}; remove it")
        if isinstance(item, CopyPaste) and task != "detection":
            raise ValueError(f"data.transforms: copy_paste pastes instances, the head does {task}; remove it")
        if isinstance(item, RandomCrop) and item.cat_max_ratio is not None and task != "semantic":
            raise ValueError(
                f"data.transforms: random_crop.cat_max_ratio reads a label map, the head does {task}; set it to null"
            )


def _flat(transforms: Sequence[TransformConfig]) -> Iterator[TransformConfig]:
    for item in transforms:
        if isinstance(item, OneOf):
            for option in item.options:
                yield from option
        else:
            yield item
