"""Exponential moving average of the weights, on each rank's own fp32 masters."""

from __future__ import annotations

import torch
from torch import Tensor

NOTED_SHARE = 0.05


class Ema:
    """One average for each flat master tensor: sharded exactly like the optimizer, at no communication.

    ``ramped``: the decay grows with the steps (:func:`decay_at`), so that the average of a short run is not that of its
    first weights. Runs that began before there was a ramp go on without, to the bit: their checkpoints say so.
    """

    def __init__(self, flats: list[Tensor], decay: float, ramped: bool = True) -> None:
        self.decay, self.ramped = decay, ramped
        self._flats = flats
        self._averages = [flat.detach().clone() for flat in flats]
        # By identity: tensors compare by value. Asked for each of thousands at every save.
        self._of = {id(flat): average for flat, average in zip(flats, self._averages, strict=True)}

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Update: average ← decay × average + (1 - decay) × weights; call once after each optimizer step.

        Args:
            step: steps of the run before this one, for the ramp; ``None``: long past it.
        """
        decay = self.decay if step is None else decay_at(step, self.decay, self.ramped)
        for average, flat in zip(self._averages, self._flats, strict=True):
            average.lerp_(flat, 1 - decay)

    def of(self, flat: Tensor) -> Tensor:
        """Return the average with the layout of ``flat``."""
        return self._of[id(flat)]


def decay_at(step: int, decay: float, ramped: bool) -> float:
    """Return min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage with ``num_updates``."""
    return min(decay, (1 + step) / (10 + step)) if ramped else decay


def share_of_the_start(steps: int, decay: float, ramped: bool) -> float:
    """Return the weight that the weights before the first step have in the average after ``steps`` steps."""
    share, step = 1.0, 0
    while ramped and step < steps and share > 1e-9 and decay_at(step, decay, ramped) < decay:
        share *= decay_at(step, decay, ramped)
        step += 1
    return float(share * decay ** (steps - step))


def lag(steps: int, decay: float, ramped: bool) -> str | None:
    """Return what to say of an average that mostly holds what the run began with; ``None``: it does not."""
    share = share_of_the_start(steps, decay, ramped)
    if share < NOTED_SHARE:
        return None
    return (
        f"{100 * share:.0f} % of the average (train.ema {decay:g}) is still what the run began with; the weights "
        "themselves: --weights raw"
    )
