"""From a recipe's three model axes to one module: trunk → weights → freezing → grafts → adapter → head."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import ModelConfig, NoAdapterConfig
from vitgraft.models import registry
from vitgraft.models.adapters import adaptformer, bitfit, lora, none, simple_pyramid, vit_adapter, vpt
from vitgraft.models.adapters.base import Adapter, Neck
from vitgraft.models.backbones import beit, eva01, eva02, mimdet, uniperceiver, videomae, vit
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.contract import Counts, Losses, Predictions, Targets
from vitgraft.models.heads import classifier, mask_rcnn, upernet, video_transformer
from vitgraft.models.necks import fpn
from vitgraft.models.weight_files import canvas_of
from vitgraft.models.weights import load_weights, read_tensors

# Imported for what they register.
REGISTERING = (
    adaptformer,
    bitfit,
    lora,
    none,
    simple_pyramid,
    vit_adapter,
    vpt,
    beit,
    eva01,
    eva02,
    mimdet,
    videomae,
    uniperceiver,
    vit,
    classifier,
    mask_rcnn,
    upernet,
    video_transformer,
    fpn,
)


class GraftedModel(nn.Module):
    """A trunk with what is grafted on it, an adapter that makes maps, maybe a neck, and a head that reads them."""

    def __init__(self, backbone: Trunk, adapter: Adapter, neck: Neck | None, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.neck = neck
        self.head = head

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Targets | None = None, weights: Tensor | None = None
    ) -> Losses | Predictions:
        """Run trunk, adapter and head on images: (B, 3, H, W), or clips (B, 3, T, H, W), float, normalised RGB; sizes:
        (B, 2) valid height and width.

        With targets, losses by name as sums beside their normalisers, with per-sample weights (B,); else predictions.
        """
        result: Any = self.head(self._maps(images), sizes, (images.shape[-2], images.shape[-1]), targets, weights)
        return cast(Losses | Predictions, result)

    def counts(self, targets: Targets, weights: Tensor) -> Counts:
        """Return the normalisers of the head's losses that are known without a forward pass; arguments as there."""
        head: Any = self.head
        return cast(Counts, head.counts(targets, weights))

    def evaluate(self, images: Tensor, sizes: Tensor, targets: Targets, weights: Tensor) -> tuple[Predictions, Losses]:
        """Return predictions and losses of the same maps, of which :meth:`forward` returns one."""
        maps, canvas = self._maps(images), (images.shape[-2], images.shape[-1])
        predictions, losses = self.head(maps, sizes, canvas), self.head(maps, sizes, canvas, targets, weights)
        return cast(Predictions, predictions), cast(Losses, losses)

    def _maps(self, images: Tensor) -> Any:
        maps = self.adapter.maps(self.backbone, images.to(next(self.backbone.parameters()).dtype))
        return maps if self.neck is None else self.neck.maps(maps)

    def recompute_units(self) -> list[nn.Module]:
        """Return the units of activation checkpointing: the trunk's blocks and parts of the adapter and the head."""
        parts: list[Any] = [self.backbone, self.adapter, self.neck, self.head]
        return [unit for part in parts if part is not None for unit in part.recompute_units()]


def build_model(config: ModelConfig, *, num_classes: int, image_size: tuple[int, int]) -> GraftedModel:
    """Return the model of a recipe for a data set of ``num_classes`` (foreground) classes on a canvas (height, width).

    Random weights come from torch's global generator. Raises ``ConfigError`` when the recipe's number of classes is
    another, or when trunk, adapter, head and canvas do not fit; ``CheckpointError`` for weights that do not fit.
    """
    wanted = config.head.num_classes
    if wanted is not None and wanted != num_classes:
        raise ConfigError(
            f"model.head.num_classes: {wanted} in the recipe, but the data set names {num_classes} classes; "
            f"set it to {num_classes}, or to null to take the data set's"
        )
    trunk: Trunk = registry.build("backbone", config.backbone, image_size=image_size)
    parts: dict[str, list[Any]] = {kind: [] for kind in ("graft", "adapter", "neck")}
    for part in config.adapter:
        parts[next((kind for kind in ("graft", "neck") if part.name in registry.names(kind)), "adapter")].append(part)
    for graft in parts["graft"]:
        registry.build("graft", graft, trunk=trunk)
    adapter: Adapter = registry.build("adapter", (parts["adapter"] or [NoAdapterConfig()])[0], trunk=trunk)
    if not adapter.reads_final_norm:
        trunk.without_final_norm()
    neck: Neck | None = None
    for part in parts["neck"]:
        neck = registry.build("neck", part, channels=adapter.channels)
    channels = adapter.channels if neck is None else neck.channels
    head = registry.build("head", config.head, channels=channels, num_classes=num_classes)
    if config.weights is not None:
        tensors = read_tensors(config.weights, where="model.weights")
        loaded = {"backbone": trunk, "adapter": adapter} | ({} if neck is None else {"neck": neck})
        canvas = canvas_of(config.weights, "model.weights")
        load_weights(loaded, tensors, where=f"model.weights: {config.weights}", canvas=canvas)
    return GraftedModel(trunk, adapter, neck, head)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained parameters and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


__all__ = ["GraftedModel", "build_model", "parameter_counts"]
