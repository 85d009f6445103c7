"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1): the operation and its module.

Every query looks at a few points of every level of a pyramid: bilinear samples of the values around a reference point,
at learned offsets, summed with learned weights. :func:`deformable_attention` is the only way to the operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError

Shapes = Sequence[tuple[int, int]]
"""Height and width of every level, in the order in which their places follow each other in the values."""


def deformable_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum of bilinear samples: (B, S, M, D), (B, Q, M, L, P, 2), (B, Q, M, L, P) → (B, Q, M · D).

    value: the places of all levels, row-major and one level after the other, S = Σ h · w, for M heads of any width D;
    any floating-point type, which is also the result's. shapes: (h, w) of the L levels. locations: (x, y) of P points
    in each level, float32 (or float64), 0 and 1 being the outer edges of a level; what lies outside is zero. weights:
    of the points, not normalised here. Computes in float32 (float64 for values in it), also under autocast.

    Raises ``ValueError`` for tensors that do not fit each other, and for locations of less than float32.
    """
    _check(value, shapes, locations, weights)
    return _by_grid_sample(value, shapes, locations, weights)


def _by_grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The reference: one ``grid_sample`` for each level, its convention (align_corners=False, zeros) being the op's."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    precise = torch.promote_types(value.dtype, torch.float32)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).to(precise)  # (B · M, D, S)
    grids = (2 * locations.to(precise) - 1).transpose(1, 2).flatten(0, 1)  # (B · M, Q, L, P, 2)
    scales = weights.to(precise).transpose(1, 2).flatten(0, 1)  # (B · M, Q, L, P)
    total = maps.new_zeros(batch * heads, width, queries)
    start = 0
    for level, (height, breadth) in enumerate(shapes):
        level_map = maps[:, :, start : start + height * breadth].view(-1, width, height, breadth)
        sampled = F.grid_sample(level_map, grids[:, :, level], "bilinear", "zeros", align_corners=False)
        total = total + (sampled * scales[:, None, :, level]).sum(-1)  # sampled: (B · M, D, Q, P)
        start += height * breadth
    return total.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or value.shape[1] != sum(height * width for height, width in shapes):
        raise ValueError(
            f"deformable_attention: value has shape {tuple(value.shape)}; expected (B, S, M, D) with S = "
            f"{sum(height * width for height, width in shapes)}, the places of levels {list(shapes)}"
        )
    expected = (value.shape[0], value.shape[2], len(shapes), 2)
    if locations.ndim != 6 or tuple(locations.shape[i] for i in (0, 2, 3, 5)) != expected:
        raise ValueError(
            f"deformable_attention: locations have shape {tuple(locations.shape)}; expected (B, Q, M, L, P, 2) with "
            f"B, M, L = {expected[:3]}"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"deformable_attention: weights have shape {tuple(weights.shape)}; expected {tuple(locations.shape[:-1])}, "
            "one for each location"
        )
    if locations.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"deformable_attention: locations are {locations.dtype}; expected torch.float32")


class MSDeformAttn(nn.Module):
    """The attention module, with the official parameter names.

    ``dim``: width of queries, features and output. ``ratio``: the values are ``int(dim · ratio)`` wide (ViT-Adapter's
    addition). Raises ``ConfigError`` when the heads do not divide that width.
    """

    def __init__(self, dim: int, *, levels: int, heads: int, points: int, ratio: float = 1.0) -> None:
        super().__init__()
        width = int(dim * ratio)
        if width < 1 or width % heads:
            raise ConfigError(
                f"deformable attention: {heads} heads do not divide the values' width {width} (= {dim} · {ratio}); "
                "choose another number of heads (deform_num_heads) or another ratio (deform_ratio)"
            )
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every head looks in its own direction, point p at distance p, with equal weights (section A.4)."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = (ring[:, None, None] * distances[:, None]).expand(-1, self.levels, -1, -1)  # (M, L, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        for part in (self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(part)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, references: Tensor, features: Tensor, shapes: Shapes, padding: Tensor | None = None
    ) -> Tensor:
        """(B, Q, dim), (B or 1, Q, L or 1, 2 or 4), (B, S, dim) → (B, Q, dim).

        references: float32, (x, y) of points, around which an offset is in places of its level, or (x, y, w, h) of
        boxes, in which P offsets span half the box; all in parts of the image. shapes: (h, w) of the levels.
        padding: (B, S), bool, true where the features are padding: their values become zero.
        """
        precise = torch.promote_types(query.dtype, torch.float32)
        value = self.value_proj(features)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).to(precise).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(query).to(precise).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        centres = references.to(precise)[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if references.shape[-1] == 2:
            sizes = torch.tensor([(w, h) for h, w in shapes], dtype=precise, device=query.device)
            locations = centres + offsets / sizes[:, None]
        else:
            locations = centres[..., :2] + offsets / self.points * centres[..., 2:] * 0.5
        attended: Tensor = self.output_proj(deformable_attention(value, shapes, locations, weights))
        return attended
