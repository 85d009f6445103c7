"""Training transforms by name, and the placement of images and clips on the canvas.

What needs a second sample (copy-paste, mixup, cutmix) is in mixing.py, evaluation by several views in views.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vitgraft.configs.schema import transforms as schema
from vitgraft.configs.schema.data import DataConfig
from vitgraft.data_shards.geometry import Sample, crop, drop_vanished, fitted, flip, pad, resize, shortest
from vitgraft.data_shards.manifest import IGNORE
from vitgraft.data_shards.mixing import copy_paste, mix

CROP_TRIES = 10
"""Number of crops drawn for ``cat_max_ratio``; the last one is always accepted."""


class Prepared(NamedTuple):
    """An image or clip on the canvas, for evaluation and prediction.

    ``canvas``: (3, H, W) or (3, T, H, W) float32, normalised, zero beyond ``size``. ``size``: valid (height, width).
    ``scale``: (vertical, horizontal) factor from stored pixels to canvas pixels: divide to get back.
    """

    canvas: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]


Step = Callable[[Sample], Sample]
Size = tuple[int, int]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator, which the transforms use, inside the block."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _random(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _scale_jitter(config: schema.ScaleJitter, canvas: Size) -> Step:
    def apply(sample: Sample) -> Sample:
        return resize(sample, fitted(sample.size, canvas, _random(config.min, config.max)))

    return apply


def _multi_scale(config: schema.MultiScale) -> Step:
    short = config.short

    def apply(sample: Sample) -> Sample:
        if config.sampling == "range":
            side = int(torch.randint(short[0], short[1] + 1, ()))
        else:
            side = short[int(torch.randint(0, len(short), ()))]
        return resize(sample, shortest(sample.size, side, config.max_long))

    return apply


def _random_crop(config: schema.RandomCrop, canvas: Size) -> Step:
    def place(size: Size) -> tuple[int, int, int, int]:
        height, width = min(size[0], canvas[0]), min(size[1], canvas[1])
        if config.sides is not None:
            low, high = config.sides
            height, width = (int(torch.randint(min(side, low), min(side, high) + 1, ())) for side in size)
        top = int(torch.randint(0, size[0] - height + 1, ()))
        left = int(torch.randint(0, size[1] - width + 1, ()))
        return top, left, height, width

    def apply(sample: Sample) -> Sample:
        for _ in range(CROP_TRIES):
            part = crop(sample, *place(sample.size))
            if config.cat_max_ratio is None or _varied(part.label_map, config.cat_max_ratio):
                break
        return part

    return apply


def _varied(label_map: Tensor | None, limit: float) -> bool:
    """Tell whether there are several classes, each below ``limit`` of the labelled pixels (mmseg's RandomCrop)."""
    assert label_map is not None
    counts = label_map[label_map != IGNORE].long().bincount()
    counts = counts[counts > 0]
    return len(counts) > 1 and float(counts.max()) < limit * float(counts.sum())


def _random_resized_crop(config: schema.RandomResizedCrop, canvas: Size) -> Step:
    drawer = v2.RandomResizedCrop(canvas, scale=(config.min_area, config.max_area))

    def apply(sample: Sample) -> Sample:
        place = drawer.make_params([tv_tensors.Image(sample.image)])
        return resize(crop(sample, place["top"], place["left"], place["height"], place["width"]), canvas)

    return apply


def _horizontal_flip(config: schema.HorizontalFlip) -> Step:
    return lambda sample: flip(sample) if _random(0, 1) < config.probability else sample


def _photometric(config: schema.Photometric) -> Step:
    def factors(spread: float) -> tuple[float, float]:
        return max(0.0, 1 - spread), 1 + spread

    colours = (factors(config.brightness), factors(config.contrast), factors(config.saturation))
    distort = v2.RandomPhotometricDistort(*colours, (-config.hue, config.hue), config.probability)

    def apply(sample: Sample) -> Sample:
        # Drawn once, so that all frames of a clip are changed alike. SSD also exchanges the channels, mmseg does not.
        image = tv_tensors.Image(sample.image)
        drawn = distort.make_params([image]) | {"channel_permutation": None}
        return replace(sample, image=distort.transform(image, drawn).as_subclass(Tensor))

    return apply


def _rand_augment(config: schema.RandAugment, colour: Sequence[int]) -> Step:
    # Drawn once for each call, so that all frames of a clip are changed alike.
    augment = v2.RandAugment(
        config.operations, config.magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=list(colour)
    )
    return lambda sample: replace(sample, image=augment(tv_tensors.Image(sample.image)).as_subclass(Tensor))


def _random_erasing(config: schema.RandomErasing, mean: Tensor, std: Tensor) -> Step:
    aspect = (0.3, 1 / 0.3)
    drawer = v2.RandomErasing(1.0, scale=(config.min_area, config.max_area), ratio=aspect, value=0)

    def apply(sample: Sample) -> Sample:
        if _random(0, 1) >= config.probability:
            return sample
        place = drawer.make_params([tv_tensors.Image(sample.image)])
        if place["v"] is None:
            return sample
        top, left, height, width = (place[key] for key in "ijhw")
        image = sample.image.clone()
        hole = image[..., top : top + height, left : left + width]
        noise = torch.randn(hole.shape) if config.fill == "noise" else torch.zeros(hole.shape)
        # Normal once normalised, as timm's; what no pixel can have is cut off.
        hole.copy_(((mean + std * noise) * 255).round().clamp(0, 255))
        return replace(sample, image=image)

    return apply


def _one_of(options: Sequence[Sequence[Step]]) -> Step:
    def apply(sample: Sample) -> Sample:
        for step in options[int(torch.randint(0, len(options), ()))]:
            sample = step(sample)
        return sample

    return apply


class Transforms:
    """A recipe's transforms.

    Training: ``data.transforms`` in order, then the canvas. An image that they leave larger than the canvas (scale
    jitter without a crop) is resized to fit. Evaluation: resize to fit, then the canvas.
    """

    def __init__(self, config: DataConfig) -> None:
        self.canvas = (config.image_size[0], config.image_size[1])
        self._mean = torch.tensor(config.mean).view(3, 1, 1)
        self._std = torch.tensor(config.std).view(3, 1, 1)
        self._colour = [min(255, max(0, round(255 * value))) for value in config.mean]
        names = [item.name for item in config.transforms]
        at = names.index("copy_paste") if "copy_paste" in names else len(names)
        self._steps = [self._step(item) for item in config.transforms[:at] if not _mixes(item)]
        self._paste: schema.CopyPaste | None = None
        self._after: list[Step] = []
        if at < len(names):
            paste, *after = config.transforms[at:]
            assert isinstance(paste, schema.CopyPaste)
            self._paste, self._after = paste, [self._step(item) for item in after]
        self._mixing = [item for item in config.transforms if isinstance(item, schema.Mixup | schema.CutMix)]

    @property
    def pastes(self) -> bool:
        """Tell whether instances of a partner are pasted: :meth:`paste` must follow :meth:`train`."""
        return self._paste is not None

    @property
    def mixes(self) -> bool:
        """Tell whether finished samples are mixed with a partner: :meth:`mix` must follow :meth:`place`."""
        return bool(self._mixing)

    def train(self, sample: Sample) -> Sample:
        """Transform a sample randomly, to at most the canvas, without instances that became empty; still uint8.

        With copy-paste in the recipe, transformed as far as it: what :meth:`paste` takes. Draws from torch's global CPU
        generator: call it inside :func:`seeded`.
        """
        for step in self._steps:
            sample = step(sample)
        return self._fit(sample)

    def paste(self, sample: Sample, partner: Sample) -> Sample:
        """Paste instances of ``partner``, and apply the recipe's later transforms; both come from :meth:`train`.

        Draws from torch's global CPU generator, as :meth:`train` does.
        """
        assert self._paste is not None
        sample = copy_paste(sample, partner, self._paste, self._colour)
        for step in self._after:
            sample = step(sample)
        return self._fit(sample)

    def mix(self, sample: Sample, partner: Callable[[], Sample], classes: int) -> Sample:
        """Mix a sample with its partner, at random; the class becomes (K,) float32. Both come from :meth:`place`.

        Draws from torch's global CPU generator, as :meth:`train` does.
        """
        return mix(sample, partner, self._mixing, classes)

    def evaluation(self, sample: Sample) -> Sample:
        """Resize a sample to fit the canvas; still uint8."""
        return resize(sample, self.fitted(sample.size))

    def place(self, sample: Sample, place: Tensor | None = None) -> Sample:
        """Normalise and pad at the bottom and right: image zero, masks 0, labels 255; clips become (3, T, H, W).

        Args:
            place: where the image is written, of the size of the canvas; ``None``: memory of its own.
        """
        stored, (height, width) = sample.image, sample.size
        if place is None:
            shape = (3, *self.canvas) if stored.ndim == 3 else (3, len(stored), *self.canvas)
            place = torch.empty(shape)
        if (height, width) != self.canvas:
            place.zero_()
        pixels = (place if stored.ndim == 3 else place.transpose(0, 1))[..., :height, :width]
        pixels.copy_(stored).div_(255).sub_(self._mean).div_(self._std)
        masks = None if sample.masks is None else pad(sample.masks, self.canvas, 0)
        label_map = None if sample.label_map is None else pad(sample.label_map, self.canvas, IGNORE).long()
        return Sample(place, sample.boxes, sample.labels, masks, label_map)

    def prepare(self, image: Tensor) -> Prepared:
        """Apply the evaluation transform to an image (3, h, w) or clip (T, 3, h, w), uint8."""
        before = Sample(image)
        return self.prepare_fitted(self.evaluation(before).image, before.size)

    def fitted(self, size: Size) -> Size:
        """Return the (height, width) to which evaluation resizes."""
        return fitted(size, self.canvas)

    def prepare_fitted(self, image: Tensor, before: Size) -> Prepared:
        """Prepare an input that already has the size of :meth:`fitted`, and had ``before``."""
        after = Sample(image)
        scale = after.size[0] / before[0], after.size[1] / before[1]
        return Prepared(self.place(after).image, after.size, scale)

    def _fit(self, sample: Sample) -> Sample:
        if sample.size[0] > self.canvas[0] or sample.size[1] > self.canvas[1]:
            sample = resize(sample, fitted(sample.size, self.canvas))
        return drop_vanished(sample)

    def _step(self, config: schema.TransformConfig) -> Step:
        match config:
            case schema.ScaleJitter():
                return _scale_jitter(config, self.canvas)
            case schema.MultiScale():
                return _multi_scale(config)
            case schema.RandomCrop():
                return _random_crop(config, self.canvas)
            case schema.RandomResizedCrop():
                return _random_resized_crop(config, self.canvas)
            case schema.HorizontalFlip():
                return _horizontal_flip(config)
            case schema.Photometric():
                return _photometric(config)
            case schema.Resize():
                return lambda sample: self.evaluation(sample)
            case schema.RandAugment():
                return _rand_augment(config, self._colour)
            case schema.RandomErasing():
                return _random_erasing(config, self._mean, self._std)
            case schema.OneOf():
                return _one_of([[self._step(item) for item in option] for option in config.options])
        raise AssertionError(f"{config.name} takes two samples")


def _mixes(config: schema.TransformConfig) -> bool:
    return isinstance(config, schema.Mixup | schema.CutMix)
