"""Masters, optimizer states and average move between worlds, ZeRO stages and optimizers' variants: what two ranks under
DeepSpeed make of them is what torch alone makes, step by step. Whole runs that move are in tests/runs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from deepspeed_ranks import DECAY, FIRST, OPTIMIZERS, STAGES, Trainer, loss_of, make_model, make_optimizer, rank_main
from support_writers import Told, make_run
from torch import nn

from vitgraft.trainer.checkpoint.layout import EMA, MASTER, DataState, Normalisation, seal, step_name
from vitgraft.trainer.checkpoint.read import Checkpoint, VectorReader, open_checkpoint
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState
from vitgraft.trainer.checkpoint.savers import InlineSaver

WORLD, LAST = 2, max(STAGES) + 1
STATES = {"sgd": ["momentum_buffer"], "fused_adamw": ["exp_avg", "exp_avg_sq"]}


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps in this process, which two ranks have gone on with."""
    folder = tmp_path_factory.mktemp("moved")
    for name in OPTIMIZERS:
        trainer = Trainer(folder / name, name, None, None)
        for step in range(1, FIRST + 1):
            trainer.train(step)
        trainer.save(FIRST)
    mp.spawn(rank_main, args=(str(folder), WORLD), nprocs=WORLD)
    return folder


def unbroken(name: str) -> dict[int, dict[str, dict[str, np.ndarray[Any, Any]]]]:
    """By step, kind and parameter: what torch alone makes, without anything of ours."""
    model = make_model()
    optimizer, average, found = make_optimizer(name, model), copy.deepcopy(model), {}
    for step in range(1, LAST + 1):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        kinds: dict[str, dict[str, np.ndarray[Any, Any]]] = {MASTER: {}, EMA: {}, **{kind: {} for kind in STATES[name]}}
        for (key, parameter), mean in zip(model.named_parameters(), average.parameters(), strict=True):
            mean.data = DECAY * mean.data + (1 - DECAY) * parameter.data
            values = {MASTER: parameter.data, EMA: mean.data, **optimizer.state[parameter]}
            for kind in kinds:
                kinds[kind][key] = values[kind].numpy().copy()
        found[step] = kinds
    return found


def assert_holds(checkpoint: Checkpoint, expected: dict[str, dict[str, np.ndarray[Any, Any]]]) -> None:
    reader, manifest = VectorReader(checkpoint), checkpoint.manifest
    assert sorted(manifest.kinds) == sorted(expected)
    for kind, vectors in expected.items():
        for name, value in vectors.items():
            found = reader.read(kind, name, 0, math.prod(manifest.parameters[name])).reshape(value.shape)
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6, err_msg=f"{kind} of {name}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_torchs_own_in_every_world_and_stage(moved: Path, name: str) -> None:
    reference = unbroken(name)
    folder = moved / name / "checkpoints"
    for step in (FIRST, *STAGES):
        checkpoint = open_checkpoint(folder / step_name(step))
        manifest = checkpoint.manifest
        assert (manifest.world, manifest.zero_stage) == ((WORLD, STAGES[step][0]) if step in STAGES else (1, 0))
        assert manifest.scalars == ({} if name == "sgd" else {"step": float(step)})
        assert {(group["lr"], group["weight_decay"]) for group in manifest.groups} == {
            (0.1, 0.01),
            (0.05, 0.0),
            (0.2, 0.1),
        }
        assert_holds(checkpoint, reference[step])
    # Back to one process without DeepSpeed.
    trainer = Trainer(moved / name, name, checkpoint, None)
    trainer.train(LAST)
    assert_holds(trainer.save(LAST), reference[LAST])


class Small(nn.Module):
    """A vector and a parameter of one element."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 6.0))
        self.scale = nn.Parameter(torch.full(shape, 0.5))

    def forward(self, step: int) -> torch.Tensor:
        return (self.weight * self.scale - step).square().sum()


def small(shape: list[int], name: str, steps: range, weights: dict[str, Any] | None = None) -> TrainerState:
    """As under ZeRO-0: the flat tensors are the parameters themselves."""
    model = Small(shape)
    model.load_state_dict(weights or model.state_dict())
    sgd, parameters = name == "sgd", list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9) if sgd else torch.optim.AdamW(parameters, 0.01)
    state = TrainerState(
        SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0), ema_decay=None
    )
    go_on(state, steps)
    return state


def go_on(state: TrainerState, steps: range) -> None:
    for step in steps:
        state.engine.optimizer.zero_grad()
        state.engine.module(step).backward()
        state.engine.optimizer.step()


@pytest.mark.parametrize("shape", [[1], []], ids=["of one dimension", "of none"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_state_of_a_single_element_is_no_scalar(tmp_path: Path, name: str, shape: list[int]) -> None:
    """Saved and restored as a vector; where an earlier version wrote it among the scalars too, it is left there."""
    run, recipe = make_run(tmp_path)
    unbroken = small(shape, name, range(1, 3))
    facts = RunFacts(run, 1, "h", ["a"], Normalisation(mean=[0], std=[1], image_size=[8, 8]), None)
    saver = InlineSaver(recipe, unbroken, facts, 100, Told())
    saver.begin(2, 2, DataState(fingerprint="f", seed=0, epoch=0, cursor=2))
    checkpoint = saver.finish()
    assert checkpoint.manifest.scalars == ({} if name == "sgd" else {"step": 2.0})
    weights = {key: value.clone() for key, value in unbroken.engine.module.state_dict().items()}
    go_on(unbroken, range(3, 5))
    wrong = {**checkpoint.manifest.scalars, **dict.fromkeys(unbroken.states, 7.0)}
    for scalars in (checkpoint.manifest.scalars, wrong):
        manifest = seal(checkpoint.manifest.model_copy(update={"scalars": scalars}))
        resumed = small(shape, name, range(0), weights)
        resumed.restore(Checkpoint(checkpoint.path, manifest))
        go_on(resumed, range(3, 5))
        assert len(resumed.tensors()) == 2 * len(resumed.kinds())
        for key, value in unbroken.tensors().items():
            assert torch.equal(resumed.tensors()[key], value), key
