"""Exponential moving average of the weights, on each rank's own fp32 masters."""

from __future__ import annotations

import torch
from torch import Tensor


class Ema:
    """One average for each flat master tensor: sharded exactly like the optimizer, at no communication."""

    def __init__(self, flats: list[Tensor], decay: float) -> None:
        self.decay = decay
        self._flats = flats
        self._averages = [flat.detach().clone() for flat in flats]
        # By identity: tensors compare by value. Asked for each of thousands at every save.
        self._of = {id(flat): average for flat, average in zip(flats, self._averages, strict=True)}

    @torch.no_grad()
    def update(self) -> None:
        """average ← decay × average + (1 - decay) × weights; call once after each optimizer step."""
        for average, flat in zip(self._averages, self._flats, strict=True):
            average.lerp_(flat, 1 - self.decay)

    def of(self, flat: Tensor) -> Tensor:
        """The average laid out like ``flat``."""
        return self._of[id(flat)]
