"""ViT-Adapter (arXiv 2205.08534): a convolutional branch that talks to a plain trunk between its blocks.

The spatial prior module makes maps of strides 4 to 32 of the images; those of 8, 16 and 32 form one stream ``c`` of
tokens. Before each group of the trunk's blocks an injector lets the trunk's tokens attend to ``c``; after it an
extractor lets ``c`` attend to the trunk's tokens (section 3.3). Both attend deformably. At the end ``c`` becomes maps
again, the trunk's own maps are added, and every stride gets a norm.

Names in the state dict are the official ones (``spm``, ``level_embed``, ``interactions``, ``up``, ``norm1`` …).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import Norm, ViTAdapterConfig
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.backbones.trunk import Grid, Trunk, to_map
from vitgraft.models.norms import make_norm
from vitgraft.models.ops.deformable import MSDeformAttn
from vitgraft.models.registry import register
from vitgraft.models.weights import Layout

STRIDE = 16
"""Stride of the grid shared by trunk and adapter."""


@register("adapter", "vit_adapter")
class ViTAdapter(Adapter):
    """Maps of strides 4, 8, 16 and 32, as wide as the trunk: (B, 3, H, W) → (B, C, H / stride, W / stride).

    The trunk's tokens and the maps of stride 16 lie on one grid. Where the trunk's patches are of another size p, the
    trunk is shown the images resized by p / 16 (a trunk of patch 14 sees 7/8 of their height and width), so that its
    grid is the same; the convolutional branch sees the images as they are. The trunk comes without its final norm.

    Raises ``ConfigError`` for a trunk that makes several maps or takes clips, and for groups of blocks or heads that do
    not fit the trunk.
    """

    reads_final_norm = False
    layout: ClassVar[Layout] = Layout()

    def __init__(self, config: ViTAdapterConfig, *, trunk: Trunk) -> None:
        super().__init__()
        if len(trunk.channels) > 1 or trunk.takes_clips:
            kind = "takes clips" if trunk.takes_clips else "makes several maps"
            raise ConfigError(f"model.adapter: vit_adapter works in a plain image trunk, this one {kind}; remove it")
        width = trunk.embed_dim
        self.strides = [4, 8, 16, 32]
        self.channels = dict.fromkeys(self.strides, width)
        self.add_vit_feature, self.fusion = config.add_vit_feature, config.fusion
        self.boundaries = _boundaries(config.interaction_indexes, trunk.depth)
        groups = len(self.boundaries) - 1
        if config.add_vit_feature and config.fusion == "stages" and groups != len(self.strides):
            raise ConfigError(
                f"model.adapter.fusion: stages adds one group's map to each stride, but there are {groups} groups; "
                "give four groups, or use fusion: last"
            )
        self.spm = SpatialPriorModule(config.conv_inplane, width, config.norm)
        self.level_embed = nn.Parameter(torch.empty(3, width))
        extras = [0] * (groups - 1) + [2 if config.use_extra_extractor else 0]
        self.interactions = nn.ModuleList([Interaction(config, width, extra) for extra in extras])
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norm1 = make_norm(config.norm, width)
        self.norm2 = make_norm(config.norm, width)
        self.norm3 = make_norm(config.norm, width)
        self.norm4 = make_norm(config.norm, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official start; injectors that start at gamma 0 leave the trunk's tokens as they are."""
        for module in self.modules():
            _initialise(module)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def canvas_multiple(self, trunk: Trunk) -> int:
        """32, whatever the trunk's patches: the trunk sees resized images."""
        return max(self.strides)

    def forward(self, trunk: Trunk, images: Tensor) -> tuple[Tensor, ...]:
        """images: (B, 3, H, W), sides multiples of 32 → the maps in the order of ``strides``."""
        height, width = images.shape[-2] // STRIDE, images.shape[-1] // STRIDE
        levels = [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]
        c_references = torch.cat([_centres(level, images.device) for level in levels], 1)
        x_references = _centres((height, width), images.device)
        c1, *coarser = self.spm(images)
        tokens = [level_map.flatten(2).transpose(1, 2) for level_map in coarser]
        c = torch.cat([part + embed for part, embed in zip(tokens, self.level_embed, strict=True)], 1)
        stages: list[Tensor] = []

        def extract(group: int, x: Tensor) -> Tensor:
            extracted = c
            for extractor in self._interaction(group).extractors():
                extracted = extractor(extracted, c_references, x, levels)
            return extracted

        def visit(index: int, x: Tensor, grid: Grid) -> Tensor:
            nonlocal c
            if index not in self.boundaries[:-1]:
                return x
            group = self.boundaries.index(index)
            if group > 0:
                stages.append(to_map(x, grid))
                c = extract(group - 1, x)
            injected: Tensor = self._interaction(group).injector(x, x_references, c, levels)
            return injected

        # The last group is extracted from what the trunk returns: under ZeRO-3, only the backward pass through a
        # module's output gathers the parameters that the module uses itself, as a trunk does its positions.
        (last,) = trunk(_resized(images, trunk.patch_size), visit)
        stages.append(last)
        c = extract(len(self.interactions) - 1, last.flatten(2).transpose(1, 2))
        sizes = [height * width for height, width in levels]
        c2, c3, c4 = (to_map(part, level) for part, level in zip(torch.split(c, sizes, 1), levels, strict=True))
        maps = [c1 + self.up(c2), c2, c3, c4]
        if self.add_vit_feature:
            added = stages if self.fusion == "stages" else stages[-1:] * len(maps)
            maps = [own + _interpolated(stage, own) for own, stage in zip(maps, added, strict=True)]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return tuple(norm(level_map) for norm, level_map in zip(norms, maps, strict=True))

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing: the spatial prior, injectors and extractors."""
        groups = [self._interaction(index) for index in range(len(self.interactions))]
        return [self.spm, *(unit for group in groups for unit in (group.injector, *group.extractors()))]

    def _interaction(self, index: int) -> Interaction:
        interaction = self.interactions[index]
        assert isinstance(interaction, Interaction)
        return interaction


class SpatialPriorModule(nn.Module):
    """Convolutions over the images: (B, 3, H, W) → four maps (B, width, H / s, W / s), s = 4, 8, 16, 32."""

    def __init__(self, inplane: int, width: int, norm: Norm) -> None:
        super().__init__()

        def conv(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
            return [convolution, make_norm(norm, channels_out), nn.ReLU(inplace=True)]

        self.stem = nn.Sequential(
            *conv(3, inplane, 2), *conv(inplane, inplane, 1), *conv(inplane, inplane, 1), nn.MaxPool2d(3, 2, 1)
        )
        self.conv2 = nn.Sequential(*conv(inplane, 2 * inplane, 2))
        self.conv3 = nn.Sequential(*conv(2 * inplane, 4 * inplane, 2))
        self.conv4 = nn.Sequential(*conv(4 * inplane, 4 * inplane, 2))
        self.fc1 = nn.Conv2d(inplane, width, 1)
        self.fc2 = nn.Conv2d(2 * inplane, width, 1)
        self.fc3 = nn.Conv2d(4 * inplane, width, 1)
        self.fc4 = nn.Conv2d(4 * inplane, width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


class Interaction(nn.Module):
    """Injector and extractors around one group of the trunk's blocks."""

    def __init__(self, config: ViTAdapterConfig, width: int, extra_extractors: int) -> None:
        super().__init__()
        self.injector = Injector(config, width)
        self.extractor = Extractor(config, width)
        self.extra_extractors: nn.ModuleList | None = None
        if extra_extractors:
            self.extra_extractors = nn.ModuleList([Extractor(config, width) for _ in range(extra_extractors)])

    def extractors(self) -> list[nn.Module]:
        """The extractors in the order in which they run, all on the same tokens of the trunk."""
        return [self.extractor, *(self.extra_extractors or ())]


class Injector(nn.Module):
    """Equation 1: x + gamma · attention(norm(x), norm(c)), the trunk's tokens asking all three levels."""

    def __init__(self, config: ViTAdapterConfig, width: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.feat_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.attn = _attention(config, width, levels=3)
        self.gamma = nn.Parameter(torch.full((width,), config.init_values))

    def forward(self, x: Tensor, references: Tensor, c: Tensor, levels: list[Grid]) -> Tensor:
        """x: (B, N, C), asked at references (1, N, 1, 2); c: (B, 21/4 · N, C) of the three ``levels`` → like x."""
        attended: Tensor = self.attn(self.query_norm(x), references, self.feat_norm(c), levels)
        return x + self.gamma * attended


class Extractor(nn.Module):
    """Equations 2 and 3: c + attention(norm(c), norm(x)), one level, then a convolutional FFN beside a residual."""

    def __init__(self, config: ViTAdapterConfig, width: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.feat_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.attn = _attention(config, width, levels=1)
        self.with_cffn = config.with_cffn
        if config.with_cffn:
            self.ffn = ConvFFN(width, int(width * config.cffn_ratio))
            self.ffn_norm = nn.LayerNorm(width, config.layer_norm_eps)
            self.drop_path = DropPath(config.drop_path) if config.drop_path > 0 else nn.Identity()

    def forward(self, c: Tensor, references: Tensor, x: Tensor, levels: list[Grid]) -> Tensor:
        """c: (B, 21/4 · N, C) of the three ``levels``, asking at references (1, 21/4 · N, 1, 2); x: (B, N, C)."""
        c = c + self.attn(self.query_norm(c), references, self.feat_norm(x), [levels[1]])
        if self.with_cffn:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), levels))
        return c


class ConvFFN(nn.Module):
    """An FFN with a depth-wise convolution over each level before its activation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DWConv(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, levels: list[Grid]) -> Tensor:
        """(B, Σ h · w, C) → the same shape."""
        added: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(tokens), levels)))
        return added


class DWConv(nn.Module):
    """One depth-wise 3 × 3 convolution for all levels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, tokens: Tensor, levels: list[Grid]) -> Tensor:
        """(B, Σ h · w, C) → the same shape."""
        parts = torch.split(tokens, [height * width for height, width in levels], 1)
        maps = [self.dwconv(to_map(part, level)) for part, level in zip(parts, levels, strict=True)]
        return torch.cat([level_map.flatten(2).transpose(1, 2) for level_map in maps], 1)


def _attention(config: ViTAdapterConfig, width: int, *, levels: int) -> MSDeformAttn:
    heads, points, ratio = config.deform_num_heads, config.n_points, config.deform_ratio
    return MSDeformAttn(width, levels=levels, heads=heads, points=points, ratio=ratio)


def _boundaries(indexes: list[list[int]] | None, depth: int) -> list[int]:
    """The blocks before which a group begins, and after the last: [[0, 2], [3, 5]] → [0, 3, 6]."""
    if indexes is None:
        if depth < 4:
            raise ConfigError(
                f"model.adapter.interaction_indexes: {depth} blocks cannot be cut into four groups; "
                f"give the groups, e.g. {[[0, depth - 1]]}"
            )
        return [depth * group // 4 for group in range(5)]
    boundaries = [0, *(last + 1 for _, last in indexes)]
    if boundaries[-1] != depth:
        raise ConfigError(
            f"model.adapter.interaction_indexes: {indexes} end with block {boundaries[-1] - 1}, the trunk's last is "
            f"{depth - 1}; let the last group end there"
        )
    return boundaries


def _centres(grid: Grid, device: torch.device) -> Tensor:
    """(x, y) of the centres of all places, row-major, in parts of the image: (1, h · w, 1, 2), float32."""
    y, x = ((torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side for side in grid)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, -1, 1, 2)


def _resized(images: Tensor, patch_size: int) -> Tensor:
    """The images at the size at which patches of this size lie on the grid of stride 16."""
    if patch_size == STRIDE:
        return images
    size = [side // STRIDE * patch_size for side in images.shape[-2:]]
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).to(images.dtype)


def _interpolated(stage: Tensor, like: Tensor) -> Tensor:
    if stage.shape[-2:] == like.shape[-2:]:
        return stage
    return F.interpolate(stage, like.shape[-2:], mode="bilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
