"""One rank of the tests that compare models under several ZeRO stages: real optimizer steps under DeepSpeed.

Argument: a JSON list of cases {model, stage, recompute, shapes}. A shape is that of a rank's one image (H, W) or clip
(T, H, W); each gives one step. Rank 0 prints, for each case, a JSON line with the losses.
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

CLASSES = 5


def recipe(case: dict[str, Any]) -> Recipe:
    tree = {
        "model": case["model"],
        "data": {"train": {"path": "none"}, "image_size": case["shapes"][0][-2:]},
        "train": {
            "steps": len(case["shapes"]),
            "global_batch": 2,
            "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.0},
            "zero_stage": case["stage"],
            "activation_checkpointing": case["recompute"],
            # Small parameters would otherwise stay whole on every rank, and nothing would be partitioned.
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        },
    }
    return validate_recipe(tree, "case")


def batch(task: str, shape: list[int]) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor]:
    """One random sample of this rank, the same for every case."""
    random = torch.Generator().manual_seed(sum(shape) + comm.rank())
    images = torch.randn(1, 3, *shape, generator=random)
    height, width = shape[-2:]
    targets: Any = torch.randint(CLASSES, (1,) if task == "video" else (1, height, width), generator=random)
    if task == "detection":
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, 8:40, 8:48] = 1
        targets = [{"boxes": torch.tensor([[8.0, 8, 48, 40]]), "labels": torch.tensor([1]), "masks": mask}]
    return images, torch.tensor([[height, width]]), targets, torch.ones(1)


def losses(case: dict[str, Any]) -> tuple[list[float], int]:
    """The loss of each step over both ranks, and how many parameters were trained."""
    chosen = recipe(case)
    torch.manual_seed(0)
    height, width = case["shapes"][0][-2:]
    model = build_model(chosen.model, num_classes=CLASSES, image_size=(height, width))
    trained, _ = parameter_counts(model)
    engine = _initialize(chosen, model, _group_parameters(chosen, model), torch.device("cpu"))
    found = []
    for step, shape in enumerate(case["shapes"]):
        torch.manual_seed(step)
        terms = engine(*batch(chosen.task, shape)).values()
        loss = sum(term.total / term.count.clamp(min=1) for term in terms)
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
            print(json.dumps({"name": case["name"], "losses": values, "trained": trained}), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
