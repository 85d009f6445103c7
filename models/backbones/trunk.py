"""Interface of a trunk to the rest of a model, which every backbone implements.

A trunk embeds images into tokens, runs its blocks over them and returns maps. An adapter that works *between* the
blocks (ViT-Adapter) passes a ``visit``: the trunk calls it with the patch tokens before every block and after the last
one, and goes on with what it returns. Class and register tokens stay with the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.models.grafting import trunk_modules, trunk_parameters

Grid = tuple[int, int]
"""Height and width of a map of tokens."""

Visit = Callable[[int, Tensor, Grid], Tensor]
"""``visit(i, tokens, grid)``: called before block i, and with i = depth after the last; patch tokens (B, N, C) in
row-major order of ``grid`` in, tokens of the same shape out."""


class Trunk(nn.Module):
    """Base of backbones.

    A subclass sets ``embed_dim``, ``patch_size``, ``prefix_tokens`` and ``frozen``, gives its transformer blocks to
    :meth:`hold_blocks` (or overrides :attr:`blocks`), and defines :meth:`embed`, :meth:`finish` and, where its blocks
    want other than tokens and their grid, :meth:`run_block`. It calls :meth:`freeze` at the end of its constructor.
    """

    takes_clips: ClassVar[bool] = False
    """True if the input is a whole clip (B, 3, T, H, W); other trunks take one frame at a time."""

    embed_dim: int
    patch_size: int
    prefix_tokens: int = 0
    frozen: bool = False

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks, first to last."""
        held = self._modules["blocks"]
        assert isinstance(held, nn.ModuleList)
        return held

    def hold_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Keep the transformer blocks under the name ``blocks``."""
        # Past the property of that name, to where torch keeps its modules.
        self._modules["blocks"] = nn.ModuleList(blocks)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def channels(self) -> dict[int, int]:
        """Channels of the maps that :meth:`forward` returns, by stride, ascending."""
        return {self.patch_size: self.embed_dim}

    def embed(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), float, normalised RGB → tokens with positions (B, prefix + N, C)."""
        raise NotImplementedError

    def run_block(self, index: int, tokens: Tensor, grid: Grid) -> Tensor:
        """One block over all tokens, prefix included."""
        result: Tensor = self.blocks[index](tokens, grid)
        return result

    def finish(self, tokens: Tensor) -> Tensor:
        """The final norm, where the trunk has one."""
        return tokens

    def without_final_norm(self) -> None:
        """Drop the final norm: whoever reads the tokens between the blocks would leave it without a gradient."""

    def forward(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, ...]:
        """The maps in the order of :attr:`channels`; here one, (B, C, H / patch, W / patch), after the final norm.

        images: (B, 3, H, W), float, normalised RGB, H and W multiples of the patch. Keeps no activations when nothing
        inside wants a gradient. A tuple, because the hooks of ZeRO-3 want one.
        """
        if visit is None and torch.is_grad_enabled() and not any(p.requires_grad for p in self.parameters()):
            with torch.no_grad():
                return self._maps(images, None)
        return self._maps(images, visit)

    def forward_features(self, images: Tensor) -> Tensor:
        """The last (coarsest) map alone: (B, C, h, w)."""
        features: Tensor = self(images)[-1]
        return features

    def freeze(self) -> None:
        """Stop training everything that is not grafted, if the recipe says so."""
        if self.frozen:
            for parameter in trunk_parameters(self):
                parameter.requires_grad_(False)
            self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """Set training mode; a frozen trunk stays in evaluation mode (no drop path, no dropout), its grafts do not."""
        super().train(mode)
        if self.frozen:
            for module in trunk_modules(self):
                if module is not self:
                    module.training = False
        return self

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing: the blocks."""
        return list(self.blocks)

    def grid_of(self, images: Tensor) -> Grid:
        """The grid of patches of images (…, H, W).

        Raises ``ConfigError`` when height or width is no multiple of the patch size.
        """
        height, width = images.shape[-2:]
        check_canvas((height, width), self.patch_size)
        return height // self.patch_size, width // self.patch_size

    def tokens(self, images: Tensor, visit: Visit | None = None) -> Tensor:
        """All tokens after the last block and the final norm, prefix included: (B, prefix + N, C)."""
        grid = self.grid_of(images)
        tokens = self.embed(images)
        for index in range(self.depth):
            tokens = self.run_block(index, self._visited(visit, index, tokens, grid), grid)
        return self.finish(self._visited(visit, self.depth, tokens, grid))

    def _maps(self, images: Tensor, visit: Visit | None) -> tuple[Tensor, ...]:
        return (to_map(self.tokens(images, visit)[:, self.prefix_tokens :], self.grid_of(images)),)

    def _visited(self, visit: Visit | None, index: int, tokens: Tensor, grid: Grid) -> Tensor:
        if visit is None:
            return tokens
        if self.prefix_tokens == 0:
            return visit(index, tokens, grid)
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        return torch.cat([prefix, visit(index, patches, grid)], 1)


def with_positions(tokens: Tensor, table: Tensor | None, grid: Grid) -> Tensor:
    """Patch tokens (B, h · w, C) plus absolute positions.

    ``table``: (1, 1 + side², C) of a square grid, resized bicubically; its first row is that of a class token which a
    dense trunk does not use. ``None``: there are no positions.
    """
    if table is None:
        return tokens
    positions: Tensor = resample_abs_pos_embed(table[:, 1:], list(grid), num_prefix_tokens=0, antialias=False)
    return tokens + positions


def start_linear(module: nn.Module) -> None:
    """BEiT's start of every Linear: normal of 0.02, cut off; biases zero. For ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h·w, C) → (B, C, h, w).

    Not by transposing and reshaping: of a single image, that makes strides with which torch's BatchNorm on a CPU
    returns wrong gradients (2.15).
    """
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1]).permute(0, 3, 1, 2)


def check_canvas(image_size: tuple[int, int], patch_size: int) -> None:
    """Raises ``ConfigError`` unless both sides are multiples of the patch size."""
    if any(side % patch_size for side in image_size):
        raise ConfigError(
            f"data.image_size: {list(image_size)} are no multiples of the trunk's patch size {patch_size}; "
            f"use e.g. {[max(1, round(side / patch_size)) * patch_size for side in image_size]}"
        )


def whole_patches(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The smallest size in whole patches that holds an image of this size (height, width)."""
    height, width = (-(-side // patch_size) * patch_size for side in image_size)
    return height, width
