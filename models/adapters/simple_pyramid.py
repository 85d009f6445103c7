"""ViTDet's simple feature pyramid (arXiv 2203.16527, section 3): every scale from the trunk's last map alone.

For a map of patch size p, the branch of stride s first changes the resolution by p / s (two transposed convolutions
for 4, one for 2, nothing for 1, max-pooling for 1/2 and 1/4) and then brings it to the pyramid's channels by a 1 × 1
and a 3 × 3 convolution, each without bias and followed by a norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import Norm, SimplePyramidConfig
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.norms import make_norm
from vitgraft.models.registry import register


@register("adapter", "simple_pyramid")
class SimplePyramid(Adapter):
    """Maps of several strides: (B, 3, H, W) → {stride: (B, channels, H / stride, W / stride)}.

    Raises ``ConfigError`` for a stride that is not the patch size times 4, 2, 1, 1/2 or 1/4.
    """

    def __init__(self, config: SimplePyramidConfig, *, trunk: Trunk) -> None:
        super().__init__()
        if len(trunk.channels) > 1:
            raise ConfigError("model.adapter: simple_pyramid reads a plain trunk's one map, this trunk makes several")
        embed_dim, patch_size = trunk.embed_dim, trunk.patch_size
        self.strides = list(config.strides)
        self.channels = dict.fromkeys(self.strides, config.channels)
        self.branches = nn.ModuleDict(
            {
                str(stride): nn.Sequential(
                    *_resample(embed_dim, patch_size, stride, config.norm),
                    *_project(_resampled_width(embed_dim, patch_size, stride), config.channels, config.norm),
                )
                for stride in self.strides
            }
        )

    def forward(self, trunk: Trunk, images: Tensor) -> tuple[Tensor, ...]:
        (features,) = trunk(images)
        return tuple(self.branches[str(stride)](features) for stride in self.strides)

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing: the branches."""
        return list(self.branches.values())


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


def _resampled_width(width: int, patch_size: int, stride: int) -> int:
    return width // max(1, patch_size // stride)


def _project(width: int, channels: int, norm: Norm) -> list[nn.Module]:
    return [
        nn.Conv2d(width, channels, 1, bias=False),
        make_norm(norm, channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        make_norm(norm, channels),
    ]
