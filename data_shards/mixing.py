"""Transforms of two samples: copy-paste, mixup and cutmix.

The partner of an entry is its neighbour in the epoch's plan, 0 with 1, 2 with 3 and so on. The order is shuffled anew
in every epoch, so that is a random sample, but one that no change of workers, prefetch or world can replace; and as the
two stand in the same batch as a rule, it is already there: nothing is read or decoded twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraft.configs.schema.transforms import CopyPaste, CutMix, Mixup
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.geometry import Sample, extend, tight_boxes
from vitgraft.data_shards.plan import Plan


def partner_of(position: int, plan: Plan) -> Entry:
    """The entry with which the one at ``position`` of the epoch is mixed.

    At the end of an odd epoch it is the one before; the only entry of an epoch is its own partner.
    """
    other = position ^ 1
    other = other if other < len(plan) else max(position - 1, 0)
    return plan.entries(other, other + 1)[0]


def copy_paste(sample: Sample, partner: Sample, config: CopyPaste, colour: Sequence[int]) -> Sample:
    """A random part of the partner's instances laid over the image (simple copy-paste, arXiv 2012.07177, section 3).

    No blending, as the paper finds none is needed. The smaller image is first enlarged with ``colour``, so that an
    instance may lie beyond its edge. What is covered leaves its mask, and boxes of covered instances are tightened; one
    that is covered wholly is left with an empty mask.

    Args:
        sample, partner: of uint8, with boxes, labels and masks.
    """
    if float(torch.rand(())) >= config.probability:
        return sample
    count = len(_instances(partner)[0])
    chosen = torch.randperm(count)[: int(torch.randint(0, min(count, config.max_instances) + 1, ()))]
    if not len(chosen):
        return sample
    size = max(sample.size[0], partner.size[0]), max(sample.size[1], partner.size[1])
    sample, partner = extend(sample, size, colour), extend(partner, size, colour)
    boxes, labels, before = _instances(sample)
    pasted_boxes, pasted_labels, pasted = (value[chosen] for value in _instances(partner))
    over = pasted.bool().any(0)
    masks = before * ~over
    covered = (masks != before).flatten(1).any(1)
    boxes = torch.where(covered[:, None], tight_boxes(masks), boxes)
    image = torch.where(over, partner.image, sample.image)
    return Sample(
        image, torch.cat([boxes, pasted_boxes]), torch.cat([labels, pasted_labels]), torch.cat([masks, pasted])
    )


def _instances(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    assert sample.boxes is not None
    assert sample.labels is not None
    assert sample.masks is not None
    return sample.boxes, sample.labels, sample.masks


def mix(sample: Sample, partner: Callable[[], Sample], configs: Sequence[Mixup | CutMix], classes: int) -> Sample:
    """Mixed in one of these ways, each at its probability, or left alone.

    lambda ~ Beta(alpha, alpha), drawn for each sample. mixup: lambda x own + (1 - lambda) x partner's, in pixels and
    classes. cutmix: a rectangle of 1 - lambda of the canvas, centred anywhere and cut at the edges, comes from the
    partner, and the classes are weighted by the areas.

    Args:
        sample: (3, H, W) or (3, T, H, W) float32 on the canvas, with its class () int64.
        partner: gives the other one; only called where it is needed.

    Returns:
        The same shapes, the class as (K,) float32 that sums to 1.
    """
    label = _one_hot(sample, classes)
    draw = float(torch.rand(()))
    for config in configs:
        if draw < config.probability:
            break
        draw -= config.probability
    else:
        return replace(sample, labels=label)
    share = float(torch.distributions.Beta(config.alpha, config.alpha).sample())
    other = partner()
    height, width = sample.size
    if isinstance(config, Mixup):
        image = sample.image * share + other.image * (1 - share)
    else:
        top, bottom, left, right = _cut(share, (height, width))
        image = sample.image.clone()
        image[..., top:bottom, left:right] = other.image[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return replace(sample, image=image, labels=label * share + _one_hot(other, classes) * (1 - share))


def _one_hot(sample: Sample, classes: int) -> Tensor:
    assert sample.labels is not None
    return F.one_hot(sample.labels, classes).float()


def _cut(share: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of CutMix's rectangle (its equation 2), cut at the edges."""
    edges: list[int] = []
    for side in size:
        centre = int(torch.randint(0, side, ()))
        half = side * math.sqrt(1 - share) / 2
        edges += [max(0, round(centre - half)), min(side, round(centre + half))]
    return edges[0], edges[1], edges[2], edges[3]
