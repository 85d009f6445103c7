"""ViTDet's simple feature pyramid (arXiv 2203.16527, section 3): every scale from the trunk's last map alone.

For a map of patch size p, the branch of stride s first changes the resolution by p / s (two transposed convolutions
for 4, one for 2, nothing for 1, max-pooling for 1/2 and 1/4) and then brings it to the pyramid's channels by a 1 × 1
and a 3 × 3 convolution, each without bias and followed by a norm. The top block adds one map more, every other place
of the last one.

Names in the state dict are the official ones: ``simfp_n`` is the branch whose stride is 2ⁿ, or, for patches that are
no power of two, lies between 2ⁿ and 2ⁿ⁺¹.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import Norm, SimplePyramidConfig
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.norms import make_norm
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout


@register("adapter", "simple_pyramid")
class SimplePyramid(Adapter):
    """Maps of several strides: (B, 3, H, W) → {stride: (B, channels, H / stride, W / stride)}, rounded up.

    Raises ``ConfigError`` for a stride that is not the patch size times 4, 2, 1, 1/2 or 1/4.
    """

    layout: ClassVar[Layout] = Layout()

    def __init__(self, config: SimplePyramidConfig, *, trunk: Trunk) -> None:
        super().__init__()
        if len(trunk.channels) > 1:
            raise ConfigError("model.adapter: simple_pyramid reads a plain trunk's one map, this trunk makes several")
        width, patch_size = trunk.embed_dim, trunk.patch_size
        self.branches: list[str] = []
        for stride in config.strides:
            name = f"simfp_{stride.bit_length() - 1}"
            resample = _resample(width, patch_size, stride, config.norm)
            project = _project(width // max(1, patch_size // stride), config.channels, config.norm)
            self.add_module(name, nn.Sequential(*resample, *project))
            self.branches.append(name)
        self.made_strides = list(config.strides)
        self.top_block = config.top_block
        self.strides = config.map_strides() or []
        self.channels = dict.fromkeys(self.strides, config.channels)

    def forward(self, trunk: Trunk, images: Tensor) -> tuple[Tensor, ...]:
        (features,) = trunk(images)
        maps = [self.get_submodule(name)(features) for name in self.branches]
        if self.top_block:
            maps.append(maps[-1][..., ::2, ::2])
        return tuple(maps)

    def canvas_multiple(self, trunk: Trunk) -> int:
        """The top block takes maps of any size, so its stride does not count."""
        return math.lcm(trunk.patch_size, *self.made_strides)

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing: the branches."""
        return [self.get_submodule(name) for name in self.branches]


class ConvNorm(nn.Conv2d):
    """A convolution without bias that keeps the size, then ``norm``; named as detectron2's."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Norm) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(super().forward(x))
        return result


def _resample(width: int, patch_size: int, stride: int, norm: Norm) -> list[nn.Module]:
    if patch_size == 4 * stride:
        return [
            nn.ConvTranspose2d(width, width // 2, 2, 2),
            make_norm(norm, width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
        ]
    if patch_size == 2 * stride:
        return [nn.ConvTranspose2d(width, width // 2, 2, 2)]
    if patch_size == stride:
        return []
    if stride in (2 * patch_size, 4 * patch_size):
        return [nn.MaxPool2d(stride // patch_size)]
    possible = [int(patch_size * factor) for factor in (0.25, 0.5, 1, 2, 4) if patch_size * factor >= 1]
    raise ConfigError(
        f"model.adapter.strides: stride {stride} cannot be made from patches of {patch_size} pixels; use {possible}"
    )


def _project(width: int, channels: int, norm: Norm) -> list[nn.Module]:
    return [ConvNorm(width, channels, 1, norm), ConvNorm(channels, channels, 3, norm)]
