"""With which mean and standard deviation images were normalised when published weights were trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_TIMM_ON_HUB = re.compile(r"hf(?:-hub)?:timm/([^/@#]+)")


@dataclass(frozen=True)
class Normalisation:
    """Of pixels from 0 to 1: ``(pixel - mean) / std``, for red, green and blue."""

    mean: list[float]
    std: list[float]


def normalisation_of(backbone: Any) -> tuple[Normalisation, bool] | None:
    """What timm says of the weights that a section of ``model.backbone`` names; ``None`` where it says nothing.

    Returns:
        The numbers, and whether they are those of the weights themselves. Of a file beside a timm name it is not known
        where its weights come from: then they are those of timm's weights of that name.
    """
    weights: str | None = backbone.weights
    if weights is None:
        return None
    name = getattr(backbone, "timm", None)
    hub = _TIMM_ON_HUB.match(weights)
    if hub is not None:
        name = hub[1]
    if name is None:
        return None
    import timm  # slow to import

    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    except RuntimeError:  # an unknown tag, of which the trunk's builder says more
        return None
    certain = hub is not None or weights == "timm"
    if config is None or not (config.has_weights or certain):
        return None
    return Normalisation([float(v) for v in config.mean], [float(v) for v in config.std]), certain
