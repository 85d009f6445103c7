"""What each process of the test of ranks that disagree runs: importable by name, as a spawned process needs it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from vitgraft.configs.errors import TrainingError
from vitgraft.trainer.checkpoint import layout
from vitgraft.trainer.checkpoint.handover import HandoverBuffer
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState
from vitgraft.trainer.checkpoint.savers import HandoverSaver
from vitgraft.trainer.rank import as_known

CASES = ("step", "recipe", "data fingerprint", "run directory")
STEP = 3
"""Of a save that all agree on."""


class SGD:
    """Without momentum it keeps nothing; torch's own takes seconds to import what it does not need."""

    param_groups: ClassVar[list[dict[str, Any]]] = [{"lr": 0.1, "momentum": 0.0}]
    state: ClassVar[dict[Any, Any]] = {}


def rank_main(rank: int, folder: str, paths: list[str]) -> None:
    """Save once for each case, in which rank 1 has something of its own, and once more alike."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(paths))
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3)
    optimizer = SimpleNamespace(optimizer=SGD(), param_groups=SGD.param_groups)
    engine = SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    state, run = TrainerState(engine, None), Path(folder) / "run"
    normalisation = layout.Normalisation(mean=[0, 0, 0], std=[1, 1, 1], image_size=[8, 8])
    facts = RunFacts(run, 1, "h", ["a"], normalisation, None)
    data = layout.DataState(fingerprint="f", seed=0, epoch=0, cursor=3)
    alike, found = HandoverSaver(state, facts, 100, paths[rank]), []
    buffer = HandoverBuffer.attach(paths[rank])
    assert buffer is not None
    for case in CASES:
        mine, its, step = facts, data, STEP
        if rank == 1:
            mine = replace(facts, recipe_hash="other") if case == "recipe" else mine
            mine = replace(facts, run=run / "other") if case == "run directory" else mine
            its = data.model_copy(update={"fingerprint": "other"}) if case == "data fingerprint" else its
            step = STEP + 1 if case == "step" else step
        saver = HandoverSaver(state, mine, 100, paths[rank])
        started = time.monotonic()
        try:
            saver.begin(step, 12, its)
            row = {"code": 0, "text": ""}
        except TrainingError as error:
            row = {"code": as_known(error).exit_code, "text": str(error)}
        found.append({**row, "seconds": time.monotonic() - started, "handed_over": buffer.control(0) is not None})
    alike.begin(STEP, 12, data)
    control = buffer.control(0)
    assert control is not None
    Path(folder, f"{rank}.json").write_text(json.dumps({"cases": found, "alike": control.step}))
    dist.destroy_process_group()
