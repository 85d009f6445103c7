"""Trained parameters of a model, by part."""

from __future__ import annotations

from torch import nn

from vitgraft.models.build import parameter_counts
from vitgraft.models.grafting import Graft


def tuning_report(model: nn.Module) -> str:
    """Trained and total parameters of a model and of its parts, in one line.

    Parts are the model's children (the backbone as ``trunk``) and, apart from them, each kind of graft.
    """
    grafts = [module for module in model.modules() if isinstance(module, Graft)]
    grafted = {parameter: graft.tuning for graft in grafts for parameter in graft.parameters()}
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        top = name.partition(".")[0]
        count = parts.setdefault(grafted.get(parameter, "trunk" if top == "backbone" else top), [0, 0])
        count[0] += parameter.numel() if parameter.requires_grad else 0
        count[1] += parameter.numel()
    trained, total = parameter_counts(model)
    each = ", ".join(f"{part} {count[0]:,} of {count[1]:,}" for part, count in parts.items())
    return f"{trained:,} of {total:,} parameters are trained ({trained / max(total, 1):.2%}): {each}"
