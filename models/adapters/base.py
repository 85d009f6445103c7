"""What an adapter is to the rest of a model."""

from __future__ import annotations

from torch import Tensor, nn


class Adapter(nn.Module):
    """Turns the trunk's map into maps by stride.

    ``strides``: of the maps it makes, ascending. ``channels``: of each. A subclass's ``forward`` returns the maps in
    the order of ``strides``: a tuple, because the hooks of ZeRO-3 read a module's output only from tuples and from
    dicts with names as keys. Everyone else calls :meth:`maps`.
    """

    strides: list[int]
    channels: dict[int, int]

    def maps(self, features: Tensor) -> dict[int, Tensor]:
        """The trunk's map (B, C, h, w) → {stride: (B, channels, H / stride, W / stride)}."""
        return dict(zip(self.strides, self(features), strict=True))

    def recompute_units(self) -> list[nn.Module]:
        """Modules whose activations are worth recomputing."""
        return []
