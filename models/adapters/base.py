"""Interface of an adapter to the rest of a model."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from vitgraft.models.backbones.trunk import Trunk


class Adapter(nn.Module):
    """Makes maps by stride, from a trunk and the images that it sees.

    ``strides``: of the maps it makes, ascending. ``channels``: of each. A subclass's ``forward(trunk, images)`` gets
    images whose sides are multiples of :meth:`canvas_multiple`, calls the trunk, and returns the maps in the order of
    ``strides``: a tuple, because the hooks of ZeRO-3 read a module's output only from tuples and from dicts
    with names as keys. Everyone else calls :meth:`maps`.
    """

    strides: list[int]
    channels: dict[int, int]
    reads_final_norm: bool = True
    """True if the maps use the trunk's final norm; otherwise the trunk is built without it."""

    def maps(self, trunk: Trunk, images: Tensor) -> dict[int, Tensor]:
        """images: (B, 3, H, W) of any size → {stride: (B, channels, ceil(H / stride), ceil(W / stride))}.

        Images are padded with zeros at the bottom and right for the trunk, and the maps cropped back. Clips
        (B, 3, T, H, W) give (B, T, channels, …) or whatever the trunk makes of clips.
        """
        if images.ndim == 5 and not trunk.takes_clips:
            frames = self.maps(trunk, images.transpose(1, 2).flatten(0, 1))
            return {stride: x.view(images.shape[0], -1, *x.shape[1:]) for stride, x in frames.items()}
        height, width = images.shape[-2:]
        multiple = self.canvas_multiple(trunk)
        right, bottom = -width % multiple, -height % multiple
        found = self(trunk, F.pad(images, (0, right, 0, bottom)) if right or bottom else images)
        return {
            stride: x[..., : -(-height // stride), : -(-width // stride)]
            for stride, x in zip(self.strides, found, strict=True)
        }

    def canvas_multiple(self, trunk: Trunk) -> int:
        """Divisor of the sides of the images given to :meth:`forward`."""
        return math.lcm(trunk.patch_size, *self.strides)

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing."""
        return []


class Neck(nn.Module):
    """Turns maps into maps: ``forward`` takes and returns tuples, in the order of ascending strides."""

    strides: list[int]
    channels: dict[int, int]

    def maps(self, maps: dict[int, Tensor]) -> dict[int, Tensor]:
        """{stride: (B, C, h, w)} → {stride: (B, channels, h, w)}."""
        return dict(zip(self.strides, self(tuple(maps[stride] for stride in sorted(maps))), strict=True))

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing."""
        return []
