"""model.backbone: the trunk."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vitgraft.configs.schema.section import (
    Channels,
    Fraction,
    ImageSide,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    SmallCount,
)


class BackboneSection(Section):
    """Base of the sections of ``model.backbone``."""

    takes_clips: ClassVar[bool] = False
    """True if the trunk takes clips as a whole."""

    def map_strides(self) -> list[int] | None:
        """Return the strides of a hierarchical trunk's feature maps; ``None`` for a plain one."""
        return None


class ViTConfig(BackboneSection):
    """A plain ViT: any timm VisionTransformer by name, or one given by its sizes."""

    name: Literal["vit"] = "vit"
    timm: str | None = None
    """timm model name, e.g. ``vit_large_patch16_224.augreg_in21k``; the sizes below are then not given."""
    embed_dim: Channels | None = None
    depth: SmallCount | None = None
    num_heads: SmallCount | None = None
    patch_size: ImageSide | None = None
    mlp_ratio: PositiveFloat | None = None
    layer_scale: PositiveFloat | None = None
    """Initial value of the layer scales of every block; ``null``: there are none."""
    qkv_bias: bool | None = None
    """Queries, keys and values have a bias; ``null``: they do where sizes are given."""
    class_token: bool | None = None
    """There is a class token; ``null``: as timm's model has it, none where sizes are given. ``false`` with a
    timm name leaves its class and register tokens out, as ViT-Adapter does."""
    window_size: Positive | list[Positive] | None = None
    """Side, in patches, of the windows within which blocks attend, one for all or one for each block; ``null``: all
    attend globally."""
    global_blocks: list[NonNegative] = []
    """With ``window_size``: the blocks (from 0) that attend globally all the same."""
    weights: str | None = None
    """``null`` (random), ``timm`` (the pretrained weights of the timm name), a .safetensors or .pth file, or
    ``hf:OWNER/REPO/FILE`` on the Hugging Face hub."""
    drop_path: Fraction = 0.0
    frozen: bool = False
    """Freeze the trunk: only the grafts, adapter and head are trained and checkpointed."""

    @model_validator(mode="after")
    def _one_way_to_say_sizes(self) -> ViTConfig:
        sizes = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "layer_scale", "qkv_bias")
        given = [key for key in sizes if getattr(self, key) is not None]
        if self.timm is not None and given:
            raise ValueError(f"timm names the sizes already; remove {', '.join(given)}")
        if self.timm is None:
            missing = [key for key in sizes[:4] if getattr(self, key) is None]
            if missing:
                raise ValueError(f"give timm: NAME, or the sizes: {', '.join(missing)} missing")
            if self.weights == "timm":
                raise ValueError("weights: timm needs timm: NAME")
            if (self.embed_dim or 0) % (self.num_heads or 1):
                raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        self._check_windows()
        return self

    def _check_windows(self) -> None:
        if self.timm is not None and self.class_token:
            raise ValueError("timm names the tokens already; remove class_token, or set it to false to leave them out")
        if self.window_size is None and self.global_blocks:
            raise ValueError("global_blocks are those without windows; give window_size too")
        if self.window_size is not None and self.class_token:
            raise ValueError("windows cut a map of patches, a class token has no place in it; set class_token: false")
        if self.depth is not None:
            if isinstance(self.window_size, list) and len(self.window_size) != self.depth:
                raise ValueError(f"window_size has {len(self.window_size)} sizes, there are {self.depth} blocks")
            _within_depth("global_blocks", self.global_blocks, self.depth)


def _filled(values: Any, sizes: dict[str, dict[str, Any]]) -> Any:
    """Return the values with those of the named size filled in where the recipe does not set them."""
    size = values.get("size") if isinstance(values, dict) else None
    return {**sizes[size], **values} if isinstance(size, str) and size in sizes else values


class WindowedSection(BackboneSection):
    """Base of the trunks of ViTDet's kind: most blocks attend within windows, a few globally."""

    embed_dim: Channels
    depth: SmallCount
    num_heads: SmallCount
    patch_size: ImageSide = 16
    mlp_ratio: PositiveFloat
    window_size: NonNegative
    """Side of the windows in tokens; 0 makes every block global."""
    global_blocks: list[NonNegative]
    """The blocks (from 0) that attend globally."""
    pretrain_size: ImageSide = 224
    """Side in pixels of the images for which the absolute positions are laid out; resized to the actual grid."""
    absolute_positions: bool = True
    residual_blocks: list[NonNegative] = []
    """The blocks that a residual bottleneck of convolutions follows."""
    weights: str | None = None
    drop_path: Fraction = 0.0
    frozen: bool = False

    @model_validator(mode="after")
    def _windowed_sizes(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        if self.pretrain_size % self.patch_size:
            raise ValueError(f"pretrain_size {self.pretrain_size} must be a multiple of patch_size {self.patch_size}")
        _within_depth("global_blocks", self.global_blocks, self.depth)
        _within_depth("residual_blocks", self.residual_blocks, self.depth)
        if self.residual_blocks and self.embed_dim % 2:
            raise ValueError(f"residual_blocks halve the width: embed_dim {self.embed_dim} must be even")
        return self


def _within_depth(key: str, blocks: list[int], depth: int) -> None:
    beyond = [index for index in blocks if index >= depth]
    if beyond:
        raise ValueError(f"{key} {beyond} are beyond the last of {depth} blocks; count from 0 to {depth - 1}")


_VITDET = {"qkv_bias": "full", "norm_eps": 1e-6, "mlp_ratio": 4.0, "window_size": 14}
_EVA01_SIZES: dict[str, dict[str, Any]] = {
    "giant": {
        "embed_dim": 1408,
        "depth": 40,
        "num_heads": 16,
        "mlp_ratio": 6144 / 1408,
        "window_size": 16,
        "global_blocks": list(range(3, 40, 4)),
    },
    "vitdet_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_blocks": [2, 5, 8, 11], **_VITDET},
    "vitdet_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_blocks": [5, 11, 17, 23], **_VITDET},
    "vitdet_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_blocks": [7, 15, 23, 31], **_VITDET},
}


class EVA01Config(WindowedSection):
    """EVA-01's trunk for detection (arXiv 2211.07636), and ViTDet's plain one (arXiv 2203.16527)."""

    name: Literal["eva01"] = "eva01"
    size: Literal["giant", "vitdet_base", "vitdet_large", "vitdet_huge"] | None = None
    """The sizes and options of a published trunk; whatever else is given replaces its part of them."""
    mlp_ratio: PositiveFloat = 4.0
    window_size: NonNegative = 14
    qkv_bias: Literal["beit", "full", "none"] = "beit"
    """beit: on queries and values, not on keys."""
    layer_scale: PositiveFloat | None = None
    """Where gamma_1 and gamma_2 start; ``null``: there are none."""
    rel_pos: Literal["linear", "geometric", "none"] = "linear"
    """Decomposed relative positions, and how their tables are resized: linear as in ViTDet, or by BEiT's rule."""
    norm_eps: PositiveFloat = 1e-5

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        return _filled(values, _EVA01_SIZES)


_EVA02_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "sub_ln": False, "global_blocks": [2, 5, 8, 11]},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "sub_ln": False, "global_blocks": [2, 5, 8, 11]},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_blocks": [2, 5, 8, 11]},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_blocks": list(range(2, 24, 3))},
}


class EVA02Config(WindowedSection):
    """EVA-02's trunk for detection (arXiv 2303.11331): rotary positions and SwiGLU."""

    name: Literal["eva02"] = "eva02"
    size: Literal["tiny", "small", "base", "large"] | None = None
    """The sizes of a published trunk; whatever else is given replaces its part of them."""
    mlp_ratio: PositiveFloat = 8 / 3
    window_size: NonNegative = 16
    sub_ln: bool = True
    """LayerNorm inside the FFN."""
    rope_grid: Positive = 16
    """Side in tokens of the grid that the rotary frequencies were trained on; other grids are scaled to it."""

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        return _filled(values, _EVA02_SIZES)

    @model_validator(mode="after")
    def _rotary_sizes(self) -> EVA02Config:
        if self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} gives {self.num_heads} heads of {self.embed_dim // self.num_heads}, "
                "expected a multiple of 4 (pairs on two axes are rotated)"
            )
        return self


class VideoMAEConfig(BackboneSection):
    """VideoMAE's video ViT (arXiv 2203.12602), by default of size B."""

    takes_clips: ClassVar[bool] = True
    name: Literal["videomae"] = "videomae"
    embed_dim: Channels = 768
    depth: SmallCount = 12
    num_heads: SmallCount = 12
    patch_size: ImageSide = 16
    tubelet_size: SmallCount = 2
    """Number of frames of one token (tubelet); clips have a multiple of it."""
    mlp_ratio: PositiveFloat = 4.0
    qkv_bias: bool = True
    """Whether queries and values (never keys) have a bias."""
    weights: str | None = None
    drop_path: Fraction = 0.0
    frozen: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> VideoMAEConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        return self


_MIMDET_SIZES: dict[str, dict[str, Any]] = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


class MIMDetConfig(BackboneSection):
    """MIMDet's convolutional stem, sampled-token encoder and decoder: a pyramid of four maps (arXiv 2204.02964)."""

    name: Literal["mimdet"] = "mimdet"
    size: Literal["base", "large"] | None = None
    """The sizes of a published trunk; whatever else is given replaces its part of them."""
    embed_dim: Channels
    depth: SmallCount
    num_heads: SmallCount
    mlp_ratio: PositiveFloat = 4.0
    norm_eps: PositiveFloat = 1e-5
    decoder_dim: Channels = 512
    decoder_depth: SmallCount = 4
    decoder_heads: SmallCount = 16
    decoder_mlp_ratio: PositiveFloat = 4.0
    sample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the tokens that the encoder sees in training; published: 0.25 to 1. In evaluation it sees all."""
    table_size: Positive = 800
    """Side in pixels of the images for which the fixed positions are laid out; resized to the actual grid."""
    weights: str | None = None
    """A full MAE checkpoint (encoder and decoder), or a MIMDet detector's."""
    drop_path: Fraction = 0.0
    frozen: bool = False

    def map_strides(self) -> list[int] | None:
        return [4, 8, 16, 32]

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        return _filled(values, _MIMDET_SIZES)

    @model_validator(mode="after")
    def _mimdet_sizes(self) -> MIMDetConfig:
        if self.embed_dim % 8:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of 8 (the stem begins with 1/8)")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        if self.decoder_dim % 4:
            raise ValueError(f"decoder_dim {self.decoder_dim} must be a multiple of 4 (sines and cosines of two axes)")
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_dim {self.decoder_dim} must be a multiple of decoder_heads {self.decoder_heads}")
        if self.table_size % 16:
            raise ValueError(f"table_size {self.table_size} must be a multiple of 16, the stem's stride")
        return self


class PerBlockWindowsSection(BackboneSection):
    """Base of the trunks of BEiT's kind: each block attends within windows of its own size, or globally."""

    embed_dim: Channels
    depth: SmallCount
    num_heads: SmallCount
    patch_size: ImageSide = 16
    mlp_ratio: PositiveFloat = 4.0
    window_size: NonNegative | list[NonNegative] = 0
    """Side of the windows in tokens, of all blocks or of each; 0: global attention."""
    layer_scale: NonNegativeFloat | None
    """Where gamma_1 and gamma_2 start; ``null``: there are none."""
    pretrain_size: ImageSide = 224
    """Side in pixels of the images for which the absolute positions are laid out; resized to the actual grid."""
    weights: str | None = None
    drop_path: Fraction = 0.0
    frozen: bool = False

    def window_sizes(self) -> list[int]:
        """Return the size of each block's windows, 0 for a global one."""
        return [self.window_size] * self.depth if isinstance(self.window_size, int) else self.window_size

    @model_validator(mode="after")
    def _per_block_sizes(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        if self.pretrain_size % self.patch_size:
            raise ValueError(f"pretrain_size {self.pretrain_size} must be a multiple of patch_size {self.patch_size}")
        if len(self.window_sizes()) != self.depth:
            raise ValueError(f"window_size has {len(self.window_sizes())} sizes for {self.depth} blocks; give each one")
        return self


_BASE_AND_LARGE: dict[str, dict[str, Any]] = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_BEIT_SIZES = {
    **_BASE_AND_LARGE,
    "eva_giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408},
}


class BEiTConfig(PerBlockWindowsSection):
    """The trunk of BEiT and BEiTv2 (arXiv 2106.08254, 2208.06366), and of EVA-01 in segmentation (arXiv 2211.07636)."""

    name: Literal["beit"] = "beit"
    size: Literal["base", "large", "eva_giant"] | None = None
    """The sizes of a published trunk; whatever else is given replaces its part of them."""
    class_token: bool = False
    """There is a class token; all blocks are then global."""
    relative_bias: bool = True
    """The attention has a learned bias for each offset between two tokens (relative positions)."""
    absolute_positions: bool = False
    qkv_bias: bool = True
    """Whether queries and values (never keys) have a bias."""
    layer_scale: NonNegativeFloat | None = 1e-6

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        return _filled(values, _BEIT_SIZES)

    @model_validator(mode="after")
    def _class_token_is_global(self) -> BEiTConfig:
        if self.class_token and any(self.window_sizes()):
            raise ValueError("class_token: true needs window_size: 0, because a class token is in no window")
        return self


class UniPerceiverConfig(PerBlockWindowsSection):
    """The trunk of Uni-Perceiver (arXiv 2112.01522)."""

    name: Literal["uniperceiver"] = "uniperceiver"
    size: Literal["base", "large"] | None = None
    """The sizes of a published trunk; whatever else is given replaces its part of them."""
    layer_scale: NonNegativeFloat | None = 0.0

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        return _filled(values, _BASE_AND_LARGE)


BackboneConfig = Annotated[
    ViTConfig | EVA01Config | EVA02Config | VideoMAEConfig | MIMDetConfig | BEiTConfig | UniPerceiverConfig,
    Field(discriminator="name"),
]
