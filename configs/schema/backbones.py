"""model.backbone: which trunk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vitgraft.configs.schema.section import Fraction, Positive, PositiveFloat, Section


class BackboneSection(Section):
    """Base of the sections of ``model.backbone``."""

    def map_strides(self) -> list[int] | None:
        """The strides of the maps of a trunk that makes several; ``None`` for a plain one."""
        return None


class ViTConfig(BackboneSection):
    """A plain ViT: any timm VisionTransformer by name, or one given by its sizes."""

    name: Literal["vit"] = "vit"
    timm: str | None = None
    """timm model name, e.g. ``vit_large_patch16_224.augreg_in21k``; the sizes below are then not given."""
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    patch_size: Positive | None = None
    mlp_ratio: PositiveFloat | None = None
    weights: str | None = None
    """``null`` (random), ``timm`` (the pretrained weights of the timm name), or a .safetensors/.pth file."""
    drop_path: Fraction = 0.0
    frozen: bool = False
    """Freeze the trunk: only what is grafted on it and the head are trained and checkpointed."""

    @model_validator(mode="after")
    def _one_way_to_say_sizes(self) -> ViTConfig:
        sizes = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")
        given = [key for key in sizes if getattr(self, key) is not None]
        if self.timm is not None and given:
            raise ValueError(f"timm names the sizes already; remove {', '.join(given)}")
        if self.timm is None:
            missing = [key for key in sizes[:4] if getattr(self, key) is None]
            if missing:
                raise ValueError(f"give timm: NAME, or the sizes: {', '.join(missing)} missing")
            if self.weights == "timm":
                raise ValueError("weights: timm needs timm: NAME")
            if (self.embed_dim or 0) % 4:
                raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of 4 (sines and cosines of two axes)")
            if (self.embed_dim or 0) % (self.num_heads or 1):
                raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        return self


BackboneConfig = Annotated[ViTConfig, Field()]
