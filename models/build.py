"""From a recipe's three model axes to one module: trunk → weights → freezing → grafts → adapter → head."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import ModelConfig, NoAdapterConfig
from vitgraft.models import registry
from vitgraft.models.adapters import adaptformer, none, simple_pyramid
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.backbones import vit
from vitgraft.models.backbones.vit import ViT
from vitgraft.models.contract import Losses, Predictions, Targets
from vitgraft.models.heads import mask_rcnn, upernet, video_transformer

# Imported for what they register.
REGISTERING = (adaptformer, none, simple_pyramid, vit, mask_rcnn, upernet, video_transformer)


class GraftedModel(nn.Module):
    """A trunk with what is grafted on it, an adapter that makes maps, and a head that reads them."""

    def __init__(self, backbone: ViT, adapter: Adapter, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.head = head

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Targets | None = None, weights: Tensor | None = None
    ) -> Losses | Predictions:
        """images: (B, 3, H, W), or clips (B, 3, T, H, W), float, normalised RGB; sizes: (B, 2) valid height and width.

        With targets, losses by name as sums beside their normalisers, with per-sample weights (B,); else predictions.
        """
        canvas = (images.shape[-2], images.shape[-1])
        images = images.to(next(self.backbone.parameters()).dtype)
        maps = self._clip_maps(images) if images.ndim == 5 else self.adapter.maps(self.backbone(images))
        result: Any = self.head(maps, sizes, canvas, targets, weights)
        return cast(Losses | Predictions, result)

    def recompute_units(self) -> list[nn.Module]:
        """What activation checkpointing is applied to: the trunk's blocks and parts of the adapter and the head."""
        parts: list[Any] = [self.adapter, self.head]
        blocks = self.backbone.blocks
        return [*blocks, *(unit for part in parts for unit in part.recompute_units())]

    def _clip_maps(self, clips: Tensor) -> dict[int, Tensor]:
        """Clips (B, 3, T, H, W) → {stride: (B, T, C, H/stride, W/stride)}: the trunk sees frames."""
        batch = len(clips)
        maps = self.adapter.maps(self.backbone(clips.transpose(1, 2).flatten(0, 1)))
        return {stride: frames.view(batch, -1, *frames.shape[1:]) for stride, frames in maps.items()}


def build_model(config: ModelConfig, *, num_classes: int, image_size: tuple[int, int]) -> GraftedModel:
    """The model of a recipe for a data set of ``num_classes`` (foreground) classes on a canvas (height, width).

    Random weights come from torch's global generator. Raises ``ConfigError`` when the recipe's number of classes is
    another, or when trunk, adapter, head and canvas do not fit; ``CheckpointError`` for weights that do not fit.
    """
    wanted = config.head.num_classes
    if wanted is not None and wanted != num_classes:
        raise ConfigError(
            f"model.head.num_classes: {wanted} in the recipe, but the data set names {num_classes} classes; "
            f"set it to {num_classes}, or to null to take the data set's"
        )
    backbone = registry.build("backbone", config.backbone, image_size=image_size)
    makers = []
    for part in config.adapter:
        if part.name in registry.names("graft"):
            registry.build("graft", part, blocks=backbone.blocks, embed_dim=backbone.embed_dim)
        else:
            makers.append(part)
    maker = makers[0] if makers else NoAdapterConfig()
    adapter = registry.build("adapter", maker, embed_dim=backbone.embed_dim, patch_size=backbone.patch_size)
    _check_strides(adapter.strides, image_size)
    head = registry.build("head", config.head, channels=adapter.channels, num_classes=num_classes)
    return GraftedModel(backbone, adapter, head)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _check_strides(strides: list[int], image_size: tuple[int, int]) -> None:
    largest = max(strides)
    if any(side % largest for side in image_size):
        raise ConfigError(
            f"data.image_size: {list(image_size)} are no multiples of the largest stride {largest}; "
            f"use e.g. {[-(-side // largest) * largest for side in image_size]}"
        )


__all__ = ["GraftedModel", "build_model", "parameter_counts"]
