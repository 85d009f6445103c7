"""A batch of training as the model gets it, with its targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from vitgraft.configs.schema import Recipe
from vitgraft.data_shards.batch import Batch
from vitgraft.data_shards.draw import draw_clip, draw_instances, draw_label_map
from vitgraft.trainer.draw import enlarge, repeat
from vitgraft.trainer.evaluate import denormalise

MAX_SAMPLES = 8
_FRAMES = 6
_NAMED_SHARE = 0.01
"""Classes of less in a mixture are not named."""


def draw_batch(batch: Batch, recipe: Recipe, classes: list[str]) -> Tensor:
    """Return the first samples of a batch, augmented, resized and mixed, with their targets: (3, H, W) uint8."""
    pictures = [_draw(batch, number, recipe, classes) for number in range(min(MAX_SAMPLES, len(batch.images)))]
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    sheet = torch.zeros(len(pictures), 3, height, width, dtype=torch.uint8)
    for place, picture in zip(sheet, pictures, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    grid: Tensor = make_grid(sheet, nrow=1 if width > 2 * height else 4)
    return grid


def _draw(batch: Batch, number: int, recipe: Recipe, classes: list[str]) -> Tensor:
    height, width = (int(value) for value in batch.sizes[number])
    image = denormalise(batch.images[number], recipe)[..., :height, :width]
    target: Any = batch.targets[number]
    if recipe.task == "detection":
        image, factor = enlarge(image)
        labels = target["labels"].tolist()
        masks = repeat(target["masks"][:, :height, :width].cpu(), factor)
        return draw_instances(
            image, target["boxes"].cpu() * factor, labels, [classes[label] for label in labels], masks
        )
    if recipe.task == "semantic":
        image, factor = enlarge(image)
        return draw_label_map(image, repeat(target[:height, :width].cpu(), factor), classes)
    if recipe.task == "video":
        frames = image.transpose(0, 1)
        picks = torch.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().long()
        return draw_clip(frames[picks], _class(target, classes))
    return draw_clip(enlarge(image)[0][None], _class(target, classes))


def _class(target: Tensor, classes: list[str]) -> str:
    """Return the class, or those of a mixture with their shares."""
    if target.dim() == 0:
        return classes[int(target)]
    shares = sorted(((share, name) for share, name in zip(target.tolist(), classes, strict=True)), reverse=True)
    return "   ".join(f"{name} {share:.2f}" for share, name in shares if share >= _NAMED_SHARE)
