"""MIMDet (arXiv 2204.02964): a detector's pyramid from a masked autoencoder, encoder and decoder both.

    c2, c3, f = stem(x)                     strides 4, 8 and 16: convolutions take the place of the patch embedding
    z = encoder(a sample of f + positions)  half of the tokens in training, all of them in evaluation
    y = decoder(embed(z) at their places, proj(f) at the others)
    c4, c5 = y, max-pooled y                strides 16 and 32

A place without an encoded token gets its token of the stem, projected, where the autoencoder (arXiv 2111.06377) had a
mask token. Encoder and decoder start from the autoencoder's, so its full file is needed, not the encoder alone. Names
in the state dict are the official ones.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.backbones import MIMDetConfig
from vitgraft.models.backbones.trunk import Grid, Trunk, Visit, to_map
from vitgraft.models.norms import GroupNorm
from vitgraft.models.registry import register
from vitgraft.models.resizing import resize_positions
from vitgraft.models.weights import Layout, load_trunk

PADDING_NOISE = 100.0
"""Sampling key of a padding patch, above the random keys in [0, 1): it is sampled last."""


class Encoded(NamedTuple):
    """Result of :meth:`MIMDet.encode`: the encoded tokens, and the further inputs of the pyramid.

    ``latent``: (B, K, C), encoded. ``dropped``: (B, N - K, C), the others, as the stem gave them. ``order``: (B, N)
    int64, the places of both, one after the other. ``c2``, ``c3``: (B, C / 4, H / 4, W / 4), (B, C / 2, H / 8, W / 8).
    """

    latent: Tensor
    dropped: Tensor
    order: Tensor
    c2: Tensor
    c3: Tensor


@register("backbone", "mimdet")
class MIMDet(Trunk):
    """(B, 3, H, W) → maps of strides 4, 8, 16, 32; channels C / 4, C / 2 and twice the decoder's.

    Takes any size in whole patches, whatever ``image_size`` says. In training, the places to encode are drawn from
    torch's global generator for each image; a frozen trunk encodes all of them. ``frozen`` is about everything but
    grafts, the stem and the decoder too. Grafts go on the encoder's blocks.

    Raises ``CheckpointError`` for weights that do not fit.
    """

    layout: ClassVar[Layout] = Layout(
        renames=(
            (r"^(?=blocks\.|norm\.|pos_embed$|patch_embed\.proj\.\d)", "encoder."),
            (r"^(?=decoder_(?:embed|pos_embed|blocks|norm)\b)", "decoder."),
        ),
        ignored=(
            (r"(^|\.)patch_embed\.proj\.(weight|bias)$", "a convolutional stem takes the place of the patch embedding"),
            (r"cls_token$", "the encoder sees patches only"),
            (r"mask_token$", "the stem's tokens fill the places that are not encoded"),
            (r"decoder_pred\.", "only the pre-training predicts pixels"),
            (r"decoder\.decoder_blocks\.\d+\.", "the autoencoder's decoder is deeper; its first blocks are taken"),
        ),
        fresh=(
            (r"encoder\.patch_embed\.", "the autoencoder has no convolutional stem; it starts at random"),
            (r"decoder\.conv_feat_proj\.", "the autoencoder has a mask token instead; it starts at random"),
            (r"(encoder\.pos_embed|decoder\.decoder_pos_embed)$", "fixed sines and cosines"),
        ),
    )

    def __init__(self, config: MIMDetConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.frozen = config.embed_dim, ConvStem.stride, config.frozen
        self.sample_ratio = config.sample_ratio
        self.encoder = MIMDetEncoder(config)
        self.decoder = MIMDetDecoder(config)
        self.apply(_initialise)
        if config.weights is not None:
            load_trunk(self, config.weights)
        self.freeze()

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks, first to last."""
        return self.encoder.blocks

    @property
    def prefix_tokens(self) -> int:
        """None: only patches are encoded."""
        return 0

    @prefix_tokens.setter
    def prefix_tokens(self, count: int) -> None:
        raise ConfigError(
            f"model.adapter: mimdet encodes a sample of the patches and has no place for {count} more tokens; "
            "use vpt with depth: deep, or another adapter"
        )

    @property
    def channels(self) -> dict[int, int]:
        """Channels by stride: the stem's two maps, the decoder's, and that max-pooled."""
        width = self.decoder.decoder_embed.out_features
        return {4: self.embed_dim // 4, 8: self.embed_dim // 2, 16: width, 32: width}

    def forward(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, ...]:
        """Return the four maps of images: (B, 3, H, W), float, normalised RGB, padded with zeros.

        Raises ``ConfigError`` for a ``visit``: the tokens between the blocks are no map.
        """
        if visit is not None:
            raise ConfigError(
                "model.adapter: nothing can work between the blocks of mimdet, whose tokens are a sample; "
                "its own maps are a pyramid, so use fpn or none"
            )
        return super().forward(images)

    def encode(self, images: Tensor, noise: Tensor | None = None, sizes: Tensor | None = None) -> Encoded:
        """Encode the ``sample_ratio`` of the places with the smallest ``noise`` (B, N), or all without noise.

        ``sizes``: (B, 2) the valid height and width of each image; patches entirely beyond them come last.
        """
        grid = self.grid_of(images)
        places = grid[0] * grid[1]
        if noise is None:
            kept, order = places, torch.arange(places, device=images.device).expand(images.shape[0], -1)
        else:
            if sizes is not None:
                noise = noise.masked_fill(_padding(sizes, grid), PADDING_NOISE)
            kept, order = max(1, int(places * self.sample_ratio)), noise.argsort(dim=1, stable=True)
        latent, dropped, c2, c3 = self.encoder(images, order, kept)
        return Encoded(latent, dropped, order, c2, c3)

    def decode(self, encoded: Encoded, grid: Grid) -> tuple[Tensor, ...]:
        """Return the four maps of a grid of patches."""
        c4 = self.decoder(encoded.latent, encoded.dropped, encoded.order, grid)
        # Canvases are multiples of 32 except where the trunk is called alone.
        return encoded.c2, encoded.c3, c4, F.max_pool2d(c4, 2, ceil_mode=True)

    def recompute_units(self) -> list[nn.Module]:
        """Return the units of activation checkpointing: the blocks of encoder and decoder."""
        return [*self.encoder.blocks, *self.decoder.decoder_blocks]

    def _maps(self, images: Tensor, visit: Visit | None) -> tuple[Tensor, ...]:
        grid = self.grid_of(images)
        if not self.encoder.training or self.sample_ratio == 1:
            return self.decode(self.encode(images), grid)
        noise = torch.rand(images.shape[0], grid[0] * grid[1], device=images.device)
        return self.decode(self.encode(images, noise, valid_sizes(images)), grid)


class ConvStem(nn.Module):
    """(B, 3, H, W) → maps of strides 4, 8, 16 and channels C / 4, C / 2, C.

    Four convolutions of stride 2, each with a GroupNorm of one group and GELU, and a last one of 1 × 1.
    """

    stride: ClassVar[int] = 16

    def __init__(self, width: int) -> None:
        super().__init__()
        stages, inputs = [], 3
        for outputs in (width // 8, width // 4, width // 2, width):
            conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
            stages.append(nn.Sequential(conv, GroupNorm(1, outputs, eps=1e-6), nn.GELU()))
            inputs = outputs
        stages[-1].append(nn.Conv2d(width, width, 1))
        self.proj = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = []
        for stage in self.proj:
            images = stage(images)
            maps.append(images)
        return maps[1], maps[2], maps[3]


class MIMDetEncoder(nn.Module):
    """Images (B, 3, H, W), ``order`` (B, N) int64 and how many of it to keep → latent, dropped, c2, c3 (`Encoded`)."""

    pos_embed: Tensor

    def __init__(self, config: MIMDetConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.patch_embed = ConvStem(width)
        self.register_buffer("pos_embed", sincos_table(config.table_size // ConvStem.stride, width))
        ramp = [config.drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        # `blocks` is what grafts and layer-wise decay look for.
        self._modules["blocks"] = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm)
            for rate in ramp
        )
        self.norm = norm(width)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return cast(nn.ModuleList, self._modules["blocks"])

    def forward(self, images: Tensor, order: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c2, c3, features = self.patch_embed(images)
        stem = features.flatten(2).transpose(1, 2)
        positions = _resized(self.pos_embed, (features.shape[-2], features.shape[-1]))
        tokens = _taken(stem + positions, order[:, :kept])
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens), _taken(stem, order[:, kept:]), c2, c3


class MIMDetDecoder(nn.Module):
    """``latent``, ``dropped``, ``order`` (`Encoded`) and the grid (h, w) → the map (B, decoder's width, h, w)."""

    decoder_pos_embed: Tensor

    def __init__(self, config: MIMDetConfig) -> None:
        super().__init__()
        width = config.decoder_dim
        self.decoder_embed = nn.Linear(config.embed_dim, width)
        self.conv_feat_proj = nn.Linear(config.embed_dim, width)
        self.register_buffer("decoder_pos_embed", sincos_table(config.table_size // ConvStem.stride, width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, config.decoder_heads, config.decoder_mlp_ratio, qkv_bias=True, norm_layer=nn.LayerNorm)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width)

    def forward(self, latent: Tensor, dropped: Tensor, order: Tensor, grid: Grid) -> Tensor:
        # With nothing dropped, the projection still takes part, so that every rank's gradients are of one set.
        tokens = torch.cat([self.decoder_embed(latent), self.conv_feat_proj(dropped)], 1)
        tokens = _taken(tokens, order.argsort(1)) + _resized(self.decoder_pos_embed, grid)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return to_map(self.decoder_norm(tokens), grid)


def sincos_table(side: int, width: int) -> Tensor:
    """Return sines and cosines of a square grid (MAE, arXiv 2111.06377): (1, 1 + side², width) float32.

    Zeros for a class token first; of the others, half of the channels tell the column and half the row, each
    sin(p · ω) and cos(p · ω) with ω from 1 down to 1 / 10000.
    """
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    table = torch.cat([columns, rows], 1).float()
    return torch.cat([torch.zeros(1, width), table])[None]


def valid_sizes(images: Tensor) -> Tensor:
    """Return the valid height and width of images (B, 3, H, W) padded with zeros: (B, 2) int64.

    Padding is made after the normalisation, so its zeros are exact; a picture's own border of exactly the mean colour
    counts as padding too, which costs nothing but its turn in the sampling.
    """
    seen = (images != 0).any(1)
    ends = [seen.any(axis) * torch.arange(1, seen.shape[3 - axis] + 1, device=seen.device) for axis in (2, 1)]
    return torch.stack([end.amax(1) for end in ends], 1)


def _padding(sizes: Tensor, grid: Grid) -> Tensor:
    """Return a mask of the patches entirely outside an image's valid size: (B, N) bool."""
    sizes = sizes[:, :, None] / ConvStem.stride
    rows, columns = (torch.arange(side, device=sizes.device) for side in grid)
    return ((rows >= sizes[:, 0])[:, :, None] | (columns >= sizes[:, 1])[:, None]).flatten(1)


def _taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Gather tokens (B, N, C) at indices (B, K): (B, K, C)."""
    # Not take_along_dim, which torch.export captures for one size of batch only.
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def _resized(table: Tensor, grid: Grid) -> Tensor:
    """Resize a square table (1, 1 + side², C), without the class token's row, bicubically to the grid."""
    positions = resize_positions(table, table, 0, grid)
    assert positions is not None
    return positions


def _initialise(module: nn.Module) -> None:
    """Initialise linear layers as MAE does; the stem keeps torch's initial values."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
