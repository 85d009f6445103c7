"""The base of every section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Strict and immutable: unknown keys and wrong types are errors, and nothing changes a recipe after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


# Bounds far above practical values, so that a typing error is refused before it fills a host's memory.
Positive = Annotated[int, Field(ge=1, le=1 << 20)]
NonNegative = Annotated[int, Field(ge=0, le=1 << 20)]
ImageSide = Annotated[int, Field(ge=1, le=1 << 14)]
"""Height or width of an image, pixels."""
Channels = Annotated[int, Field(ge=1, le=1 << 16)]
"""Channels of a layer."""
SmallCount = Annotated[int, Field(ge=1, le=1 << 10)]
"""Layers, attention heads, processes, threads and the like."""
LargeCount = Annotated[int, Field(ge=1, le=10**9)]
"""Steps, samples and the like."""
StoredSize = Annotated[int, Field(ge=0, le=1 << 62)]
"""Bytes or samples of files on a disk, in manifests: no memory of that size is taken."""
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=10**8, allow_inf_nan=False)]
