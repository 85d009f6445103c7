"""A checkpoint holds what is trained and little else: a frozen trunk does not make it large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_checkpoints import CLASSES
from support import tiny_recipe

from vitgraft.configs.load import validate_recipe
from vitgraft.models.build import build_model, parameter_counts
from vitgraft.trainer.checkpoint.image import lay_out
from vitgraft.trainer.checkpoint.layout import EMA, MASTER, Manifest, even_range, range_key
from vitgraft.trainer.param_groups import ParameterFacts, make_groups

VIT_L: dict[str, Any] = {
    "model__backbone": {
        "name": "vit",
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "patch_size": 16,
        "frozen": True,
    },
    "model__adapter": {"name": "adaptformer", "bottleneck": 64},
    "model__head": {"name": "classifier"},
    "data__image_size": [224, 224],
}


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_adaptformer_on_a_frozen_vit_l(world: int, ema: bool) -> None:
    """Within 5 % of 12 bytes for each trained parameter (weight and AdamW's two moments), 16 with the average; as laid
    out under ZeRO-0 and 3, where every rank has a range of every parameter, the most ranges there are."""
    recipe = validate_recipe(tiny_recipe("video", "data", **VIT_L), "recipe")
    with torch.device("meta"):
        model = build_model(recipe.model, num_classes=len(CLASSES), image_size=(224, 224))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    count, everything = parameter_counts(model)
    assert everything > 300e6
    assert count < 0.02 * everything
    kinds = [MASTER, "exp_avg", "exp_avg_sq", *([EMA] if ema else [])]
    size = 0
    for rank in range(world):
        ranges = {}
        for name, parameter in trained.items():
            start, stop = even_range(parameter.numel(), rank, world)
            if start < stop:
                ranges |= {range_key(kind, name, start): ("F32", [stop - start]) for kind in kinds}
        size += lay_out(ranges).size
    state = model.state_dict()
    size += lay_out(
        {n: ("F32", list(v.shape)) for n, v in state.items() if n not in dict(model.named_parameters())}
    ).size
    groups = make_groups(
        recipe.train, [ParameterFacts(n, p.dim()) for n, p in trained.items()], lambda name: 0, model.backbone.depth
    )
    manifest = Manifest.model_construct(
        parameters={name: list(p.shape) for name, p in trained.items()}, kinds=kinds, groups=[{"lr": 1.0}] * len(groups)
    )
    size += len(manifest.model_dump_json(indent=1)) + 4096  # the fields left out
    assert size == pytest.approx(count * 4 * len(kinds), rel=0.05)
