"""Mean and standard deviation of the images that pretrained weights were trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.weight_names import metadata_of, numbers_of

_TIMM_ON_HUB = re.compile(r"hf(?:-hub)?:timm/([^/@#]+)")


@dataclass(frozen=True)
class Normalisation:
    """Normalisation of pixels in 0..1: ``(pixel - mean) / std``, for red, green and blue."""

    mean: list[float]
    std: list[float]


def normalisation_of(config: ModelConfig) -> tuple[Normalisation, bool] | None:
    """Return the normalisation of a model's weights, from a file's metadata (``vitgraft export``) or from timm.

    Returns:
        (mean and std, whether they belong to the loaded weights themselves). A file without metadata beside a timm name
        has an unknown source: mean and std are then timm's for that name. ``None``: unknown.
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
