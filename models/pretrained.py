"""With which mean and standard deviation images were normalised when weights were trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.weight_names import metadata_of, numbers_of

_TIMM_ON_HUB = re.compile(r"hf(?:-hub)?:timm/([^/@#]+)")


@dataclass(frozen=True)
class Normalisation:
    """Of pixels from 0 to 1: ``(pixel - mean) / std``, for red, green and blue."""

    mean: list[float]
    std: list[float]


def normalisation_of(config: ModelConfig) -> tuple[Normalisation, bool] | None:
    """What is known of the weights that a model names: by timm, or by the file itself if ``vitgraft export`` wrote it.

    Returns:
        The numbers, and whether they are those of the weights themselves. Of another file beside a timm name it is not
        known where its weights come from: then they are those of timm's weights of that name. ``None``: nothing is
        known.
    """
    for key, file in ("model.weights", config.weights), ("model.backbone.weights", config.backbone.weights):
        if file is not None and file != "timm":
            texts = metadata_of(file, key)
            mean, std = numbers_of(texts, "mean", 3), numbers_of(texts, "std", 3)
            if mean is not None and std is not None and min(std) > 0:
                return Normalisation(mean, std), True
    return _by_timm(config.backbone)


def _by_timm(backbone: Any) -> tuple[Normalisation, bool] | None:
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
