"""The forward pass of a model as an ExportedProgram, for a batch of any size and images of the recipe's size.

Inputs are normalised as the metadata says, float32. What comes out, by task:

    semantic           (B, K, H, W) logits
    image, video       (B, K) logits; videos are clips (B, 3, T, H, W)
    detection          takes ``sizes`` (B, 2) too: ``boxes``, ``scores``, ``labels``, ``masks``, with as many rows for
                       each image as it can have detections (see FixedDetections)
    --part backbone    (B, C, h, w), or of a clip (B, T, C, h, w): the trunk's last map
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema import Recipe
from vitgraft.models.build import GraftedModel
from vitgraft.models.heads.mask_rcnn import MaskRCNN
from vitgraft.models.heads.mask_rcnn_fixed import FixedDetections, FixedMaskRCNN

MAX_BATCH = 1 << 16


class _Logits(nn.Module):
    """Of a whole canvas: padding plays no part in these heads."""

    def __init__(self, model: GraftedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        sizes = torch.tensor(images.shape[-2:], device=images.device).expand(images.shape[0], 2)
        logits: Any = self.model(images, sizes)
        return torch.as_tensor(logits)


class _Detections(nn.Module):
    def __init__(self, model: GraftedModel, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        assert isinstance(model.head, MaskRCNN)
        self.head = FixedMaskRCNN(model.head, self._maps(torch.zeros(1, 3, *canvas)), canvas)

    def forward(self, images: Tensor, sizes: Tensor) -> FixedDetections:
        detections: FixedDetections = self.head(self._maps(images), sizes)
        return detections

    def _maps(self, images: Tensor) -> dict[int, Tensor]:
        maps = self.model.adapter.maps(self.model.backbone, images)
        return maps if self.model.neck is None else self.model.neck.maps(maps)


class _Trunk(nn.Module):
    def __init__(self, model: GraftedModel) -> None:
        super().__init__()
        self.trunk = model.backbone

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim == 5 and not self.trunk.takes_clips:
            frames = self.trunk.forward_features(images.transpose(1, 2).flatten(0, 1))
            return frames.reshape(images.shape[0], images.shape[2], *frames.shape[1:])
        return self.trunk.forward_features(images)


@torch.no_grad()
def capture(model: GraftedModel, recipe: Recipe, part: str) -> tuple[ExportedProgram, str]:
    """The program and a line on its inputs and outputs; the model is in evaluation mode and on the CPU.

    Raises:
        ConfigError: torch.export cannot capture this model.
    """
    height, width = recipe.data.image_size
    video = recipe.task == "video"
    shape = (3, recipe.data.clip.frames, height, width) if video else (3, height, width)
    # A batch of one would be taken for a constant.
    inputs: dict[str, Tensor] = {"images": torch.zeros(2, *shape)}
    module: nn.Module
    if part == "backbone":
        module, outputs = _Trunk(model), "the trunk's last map"
    elif isinstance(model.head, MaskRCNN):
        module, outputs = _Detections(model, (height, width)), "boxes, scores, labels, masks"
        inputs["sizes"] = torch.tensor([[height, width]] * 2)
    else:
        module, outputs = _Logits(model), "logits"
    batch = Dim("batch", min=1, max=MAX_BATCH)
    dynamic = {name: {0: batch} for name in inputs}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about its own deprecations
            program = torch.export.export(module.eval(), (), inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # what torch.export raises is not bounded to a class
        axes = [recipe.model.backbone, *recipe.model.adapter, recipe.model.head]
        raise ConfigError(
            f"--format torch-export: torch {torch.__version__} cannot capture {' + '.join(axis.name for axis in axes)} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0][:160]}); --format safetensors works for it"
        ) from error
    wants = ", ".join(f"{name} (B, {', '.join(map(str, value.shape[1:]))})" for name, value in inputs.items())
    return program, f"{wants} → {outputs}"
