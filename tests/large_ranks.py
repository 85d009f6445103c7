"""One rank of tests/runs/test_large.py: ViT-L with ViT-Adapter takes two real optimizer steps under DeepSpeed.

Arguments: a JSON list of cases {stage, frozen, recompute}. Rank 0 prints, for each case, a JSON line with the losses.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch

from vitgraft.configs.load import validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.models.build import build_model, parameter_counts
from vitgraft.trainer import comm
from vitgraft.trainer.deepspeed_state import avoid_compilation
from vitgraft.trainer.session import _group_parameters, _initialize

SIZES = [(224, 224), (216, 264)]  # the second is neither square nor made of whole strides of 32
CLASSES = 5


def recipe(case: dict[str, Any]) -> Recipe:
    tree = {
        "model": {
            "backbone": {
                "name": "vit",
                "embed_dim": 1024,
                "depth": 24,
                "num_heads": 16,
                "patch_size": 16,
                "frozen": case["frozen"],
            },
            "adapter": {"name": "vit_adapter", "deform_num_heads": 16, "deform_ratio": 0.5, "norm": "syncbn"},
            "head": {"name": "upernet", "channels": 32, "pool_scales": [1, 2], "dropout": 0.0},
        },
        "data": {"train": {"path": "none"}, "image_size": [224, 224]},
        "train": {
            "steps": 2,
            "global_batch": 2,
            "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.0},
            "zero_stage": case["stage"],
            "activation_checkpointing": case["recompute"],
        },
    }
    return validate_recipe(tree, "large")


def losses(case: dict[str, Any]) -> tuple[list[float], int]:
    """The loss of each step over both ranks, and how many parameters were trained."""
    chosen = recipe(case)
    torch.manual_seed(0)
    model = build_model(chosen.model, num_classes=CLASSES, image_size=(224, 224))
    trained, _ = parameter_counts(model)
    engine = _initialize(chosen, model, _group_parameters(chosen, model), torch.device("cpu"))
    found = []
    for height, width in SIZES:
        random = torch.Generator().manual_seed(height + comm.rank())
        images = torch.randn(1, 3, height, width, generator=random)
        targets = torch.randint(CLASSES, (1, height, width), generator=random)
        terms = engine(images, torch.tensor([[height, width]]), targets, torch.ones(1)).values()
        loss = sum(term.total / term.count for term in terms)
        engine.backward(loss)
        engine.step()
        found.append(float(comm.sum_tensor(loss.detach().clone())))
    engine.destroy()
    return found, trained


def main() -> None:
    import deepspeed

    torch.set_num_threads(1)
    avoid_compilation()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for case in json.loads(sys.argv[1]):
        values, trained = losses(case)
        if comm.rank() == 0:
            print(json.dumps({"case": case, "losses": values, "trained": trained}), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
