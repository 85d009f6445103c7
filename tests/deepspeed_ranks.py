"""What each process of the test of DeepSpeed's states runs, and what it is compared with: importable by name, as a
spawned process needs it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from support_writers import Told, make_run
from torch import nn

from vitgraft.trainer.checkpoint import layout
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState, load_checkpoint
from vitgraft.trainer.checkpoint.savers import InlineSaver

STAGES = {3: (2, False), 4: (3, False), 5: (0, False), 6: (1, True)}
"""ZeRO stage, and whether the states are offloaded, of the engine that makes each step; the steps before are made
without DeepSpeed."""
EXACT = (0, 3)
"""ZeRO stages at which each run is resumed at the same one, too."""
FIRST = 2
DECAY = 0.9
OPTIMIZERS = ("sgd", "fused_adamw")


class Scale(nn.Module):
    """A parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.scale


def make_model() -> nn.Sequential:
    """Sizes that two ranks cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), Scale())


def make_optimizer(name: str, model: nn.Sequential) -> torch.optim.Optimizer:
    """Three groups of different rates and decays."""
    first, last, scale = model[0], model[2], model[3].scale
    groups: list[dict[str, Any]] = [
        {"params": [first.weight], "lr": 0.1, "weight_decay": 0.01},
        {"params": [first.bias, last.bias, scale], "lr": 0.05, "weight_decay": 0.0},
        {"params": [last.weight], "lr": 0.2, "weight_decay": 0.1},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups, eps=1e-4, fused=True)


def loss_of(model: Any, step: int) -> torch.Tensor:
    """The same on every rank."""
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    loss: torch.Tensor = (model(inputs) - 1).square().mean()
    return loss


class Trainer:
    """A model that is trained, and saved, with or without DeepSpeed."""

    def __init__(self, run: Path, name: str, checkpoint: Checkpoint | None, zero: tuple[int, bool] | None) -> None:
        model = make_model()
        if checkpoint is not None:
            load_checkpoint(model, checkpoint)
        optimizer = make_optimizer(name, model)
        self.engine: Any = SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0)
        if zero is not None:
            self.engine = deepspeed_engine(model, optimizer, *zero)
        self.model, self.optimizer, self.sharded = model, optimizer, zero is not None
        self.state = TrainerState(self.engine, DECAY)
        if checkpoint is not None:
            self.state.restore(checkpoint)
        _, recipe = make_run(run)
        normalisation = layout.Normalisation(mean=[0, 0, 0], std=[1, 1, 1], image_size=[8, 8])
        facts = RunFacts(run, 1, "h", ["a"], normalisation, None)
        self.saver = InlineSaver(recipe, self.state, facts, 100, Told())

    def train(self, step: int) -> None:
        loss = loss_of(self.engine if self.sharded else self.model, step)
        if self.sharded:
            self.engine.backward(loss)
            self.engine.step()
        else:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        assert self.state.ema is not None
        self.state.ema.update()

    def save(self, step: int) -> Checkpoint:
        data = layout.DataState(fingerprint="f", seed=0, epoch=0, cursor=step)
        self.saver.begin(step, step, data)
        return self.saver.finish()


def deepspeed_engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, offload: bool) -> Any:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is none of torch's
        "steps_per_print": 1_000_000_000,
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def assert_goes_on_exactly(unbroken: Trainer, resumed: Trainer, step: int) -> None:
    """At the same world and stage a step after a restore is, bit for bit, the one of the trainer that saved."""
    found = []
    for trainer in (unbroken, resumed):
        trainer.train(step)
        found.append({key: values.clone() for key, values in trainer.state.tensors().items()})
    assert found[0].keys() == found[1].keys()
    for key, values in found[0].items():
        assert torch.equal(values, found[1][key]), key


def rank_main(rank: int, folder: str, world: int) -> None:
    """Go on from each run's checkpoint of its first steps: each step under another stage, from the last one's save."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    import deepspeed

    from vitgraft.trainer.deepspeed_state import avoid_compilation

    avoid_compilation()
    meeting = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": world}
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False, **meeting)
    for name in OPTIMIZERS:
        run = Path(folder) / name
        checkpoint = open_checkpoint(run / "checkpoints" / layout.step_name(FIRST))
        for step, zero in STAGES.items():
            trainer = Trainer(run, name, checkpoint, zero)
            trainer.train(step)
            checkpoint = trainer.save(step)
            if zero[0] in EXACT:
                assert_goes_on_exactly(trainer, Trainer(run, name, checkpoint, zero), step + 1)
    torch.distributed.destroy_process_group()
