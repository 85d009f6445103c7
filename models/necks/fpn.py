"""Feature pyramid network (arXiv 1612.03144, section 3): maps of one width, the coarse ones added to the finer.

    m_n = lateral_n(x_n) + up(m_{n+1}),  p_n = output_n(m_n)

with lateral 1 × 1 and output 3 × 3 convolutions (a norm after each, or a bias), and nearest-neighbour upsampling. The
top block adds one map more, every other place of the last one.

Names in the state dict are detectron2's: ``fpn_lateral{n}`` and ``fpn_output{n}`` for the stride 2ⁿ, or, where strides
are no powers of two, for one between 2ⁿ and 2ⁿ⁺¹.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import FPNConfig, Norm
from vitgraft.models.adapters.base import Neck
from vitgraft.models.norms import make_norm
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout


@register("neck", "fpn")
class FPN(Neck):
    """Maps (B, C_n, h_n, w_n) of ascending strides → (B, channels, h_n, w_n), and with the top block one more.

    ``channels``: of the maps that come in, by stride. Raises ``ConfigError`` when one stride is less than about twice
    the one before.
    """

    # mmdet numbers its convolutions from 0, the map of stride 4.
    layout: ClassVar[Layout] = Layout(
        renames=(
            *((rf"^lateral_convs\.{level - 2}\.", f"fpn_lateral{level}.") for level in range(2, 6)),
            *((rf"^fpn_convs\.{level - 2}\.", f"fpn_output{level}.") for level in range(2, 6)),
            (r"^(fpn_(?:lateral|output)\d)\.conv\.", r"\1."),
            (r"^(fpn_(?:lateral|output)\d)\.(?:bn|gn|ln)\.", r"\1.norm."),
        )
    )

    def __init__(self, config: FPNConfig, *, channels: dict[int, int]) -> None:
        super().__init__()
        strides = sorted(channels)
        # A map at stride 4 is level 2, as everywhere in detection.
        self.levels = [stride.bit_length() - 1 for stride in strides]
        if len(set(self.levels)) < len(strides):
            raise ConfigError(
                f"model.adapter: fpn reads maps whose strides about double, these are {strides}; leave some of them out"
            )
        for level, stride in zip(self.levels, strides, strict=True):
            self.add_module(f"fpn_lateral{level}", ConvNorm(channels[stride], config.channels, 1, config.norm))
            self.add_module(f"fpn_output{level}", ConvNorm(config.channels, config.channels, 3, config.norm))
        self.top_block = config.top_block
        self.strides = config.strides_over(strides) or []
        self.channels = dict.fromkeys(self.strides, config.channels)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        laterals = [self.get_submodule(f"fpn_lateral{n}")(x) for n, x in zip(self.levels, maps, strict=True)]
        made: list[Tensor] = []
        merged: Tensor | None = None
        for level, lateral in zip(reversed(self.levels), reversed(laterals), strict=True):
            # Sizes, not factors: an odd map is larger than half of the one below it.
            merged = lateral if merged is None else lateral + F.interpolate(merged, lateral.shape[-2:], mode="nearest")
            made.insert(0, self.get_submodule(f"fpn_output{level}")(merged))
        if self.top_block:
            made.append(made[-1][..., ::2, ::2])
        return tuple(made)

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing: the convolutions, with their norms."""
        return list(self.children())


class ConvNorm(nn.Conv2d):
    """A convolution that keeps the size, then ``norm``, or a bias where there is none; named as detectron2's."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Norm | Literal["none"]) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")
        nn.init.kaiming_uniform_(self.weight, a=1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.norm = None if norm == "none" else make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)
