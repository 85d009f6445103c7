"""Small models and batches for the tests of ``vitgraft.models``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.backbones.trunk import Trunk, Visit
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.contract import DetectionTarget, Losses


class Stub(Trunk):
    """A trunk that is nothing but blocks, or one whose map is its input."""

    def __init__(self, *blocks: nn.Module, embed_dim: int, patch_size: int = 16) -> None:
        super().__init__()
        self.stack = nn.Sequential(*blocks)
        self.embed_dim, self.patch_size = embed_dim, patch_size

    @property
    def blocks(self) -> nn.Sequential:
        return self.stack

    def forward(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, ...]:
        return (images,)


BACKBONE: dict[str, Any] = {"name": "vit", "embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
PYRAMID: dict[str, Any] = {"name": "simple_pyramid", "channels": 16, "strides": [4, 8, 16]}
ADAPTFORMER: dict[str, Any] = {"name": "adaptformer", "bottleneck": 4}
HEADS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {
        "name": "mask_rcnn",
        "anchor_sizes": [8, 16, 32],
        "rpn_batch": 32,
        "rpn_proposals": 30,
        "roi_batch": 16,
        "box_channels": 32,
        "mask_channels": 8,
        "mask_convs": 2,
        "score_threshold": 0.0,
        "detections_per_image": 10,
    },
    "upernet": {"name": "upernet", "channels": 16, "norm": "gn", "dropout": 0.0},
    "video_transformer": {"name": "video_transformer", "embed_dim": 16, "num_heads": 2, "grid": 2},
}
CLASSES = 5


def model_of(
    head: str,
    *,
    adapter: list[dict[str, Any]] | None = None,
    backbone: dict[str, Any] | None = None,
    size: tuple[int, int] = (64, 64),
    **options: Any,
) -> GraftedModel:
    """A small model with fixed random weights; ``options`` go to its head."""
    if adapter is None:
        adapter = [{"name": "none"}] if head == "video_transformer" else [PYRAMID]
    config = ModelConfig.model_validate(
        {"backbone": BACKBONE | (backbone or {}), "adapter": adapter, "head": HEADS[head] | options}
    )
    torch.manual_seed(0)
    return build_model(config, num_classes=CLASSES, image_size=size)


def detection_target(objects: int, size: tuple[int, int], generator: torch.Generator) -> DetectionTarget:
    """Rectangles on a canvas, with masks that fill them."""
    height, width = size
    corner = torch.rand(objects, 2, generator=generator) * torch.tensor([width * 0.5, height * 0.5])
    extent = 8 + torch.rand(objects, 2, generator=generator) * torch.tensor([width * 0.4 - 8, height * 0.4 - 8])
    boxes = torch.cat([corner, corner + extent], 1)
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().long().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.randint(0, CLASSES, (objects,), generator=generator), "masks": masks}


def batch_of(head: str, batch: int = 2, size: tuple[int, int] = (64, 64), seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of a model's forward in training."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    shape = (batch, 3, 3, height, width) if head == "video_transformer" else (batch, 3, height, width)
    targets: Any
    if head == "mask_rcnn":
        targets = [detection_target(2 + index, size, generator) for index in range(batch)]
    elif head == "upernet":
        targets = torch.randint(0, CLASSES, (batch, height, width), generator=generator)
        targets[:, : height // 4] = 255
        targets[0, :, : width // 2] = 255
    else:
        targets = torch.randint(0, CLASSES, (batch,), generator=generator)
    return {
        "images": torch.randn(shape, generator=generator),
        "sizes": torch.tensor([size] * batch),
        "targets": targets,
        "weights": torch.ones(batch),
    }


def loss_of(losses: Losses) -> Tensor:
    """The scalar that a single rank minimises."""
    return torch.stack([term.total / term.count.clamp(min=1) for term in losses.values()]).sum()
