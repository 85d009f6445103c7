"""BitFit (arXiv 2106.10199): of a frozen trunk, the biases are trained, and nothing is added.

Biases of Linear, convolution and norm layers alike, and those that stand alone (``q_bias``, ``v_bias``); no tables of
relative positions.
"""

from __future__ import annotations

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import BitFitConfig
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.grafting import trunk_modules
from vitgraft.models.registry import register


@register("graft", "bitfit")
def graft_bitfit(config: BitFitConfig, *, trunk: Trunk) -> None:
    """Train the biases of a frozen trunk.

    Raises ``ConfigError`` when the trunk is not frozen, or has no biases.
    """
    if not trunk.frozen:
        raise ConfigError("model.adapter: bitfit trains the biases of a frozen trunk; set model.backbone.frozen: true")
    biases = [
        parameter
        for module in trunk_modules(trunk)
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or name.endswith("_bias")
    ]
    if not biases:
        raise ConfigError("model.adapter: bitfit: this trunk has no biases; choose another adapter")
    for bias in biases:
        bias.requires_grad_(True)
