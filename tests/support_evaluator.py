"""Runs with small real checkpoints and data to evaluate them on, made without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.numpy import load_file, save_file

from vitgraft.configs.hashing import sha256_file
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.trainer.checkpoint.layout import EMA, MANIFEST, Manifest, seal, step_name
from vitgraft.trainer.checkpoint.read import open_checkpoint
from vitgraft.trainer.evaluate import Evaluator, evaluate_into_run

GOLDEN = Path(__file__).resolve().parent / "golden" / "checkpoint-1"
STEP = 3


def make_evaluated_run(folder: Path, data: Path, steps: list[int], **settings: Any) -> tuple[Path, Recipe]:
    """A run whose every step is due, with checkpoints of these steps. ``settings``: keys as in ``tiny_recipe``."""
    tree = yaml.safe_load((GOLDEN / "config.yaml").read_text())
    defaults = {"train__steps": 100, "train__checkpoint__every_steps": 1, "evaluate__every_checkpoints": 1}
    tree["data"]["train"] = {"path": str(data)}
    tree["data"]["val"] = {"path": str(data)}
    for key, value in {**defaults, **settings}.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    for name in ("checkpoints", "results", "logs"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(GOLDEN / "blobs", folder / "blobs")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    for step in steps:
        add_checkpoint(folder, step)
    return folder, load_recipe(str(folder / "config.yaml"))


def add_checkpoint(run: Path, step: int) -> Path:
    """Commit a checkpoint of this step, whose weights are its own."""
    temporary, final = run / "checkpoints" / f"{step_name(step)}.9.tmp", run / "checkpoints" / step_name(step)
    shutil.copytree(GOLDEN / "checkpoints" / step_name(STEP), temporary)
    manifest = Manifest.model_validate_json((temporary / MANIFEST).read_bytes())
    records = []
    for record in manifest.files:
        file = temporary / record.path
        if record.path.startswith("rank"):
            scale = 1 + step / 10
            save_file({k: v * scale if k.startswith(EMA) else v for k, v in load_file(file).items()}, file)
        records.append(record.model_copy(update={"bytes": file.stat().st_size, "sha256": sha256_file(file)}))
    sealed = seal(manifest.model_copy(update={"step": step, "samples": 4 * step, "files": records}))
    (temporary / MANIFEST).write_text(sealed.model_dump_json(indent=1))
    temporary.rename(final)
    return final


def result_of(run: Path, step: int) -> dict[str, Any]:
    """RUN/results/step-N.json without what differs from one time to the next."""
    found: dict[str, Any] = json.loads((run / "results" / f"{step_name(step)}.json").read_text())
    assert found.pop("seconds") > 0
    return found


def inline_result(run: Path, recipe: Recipe, step: int) -> dict[str, Any]:
    """What a trainer that evaluates by itself writes."""
    checkpoint = open_checkpoint(run / "checkpoints" / step_name(step))
    assert recipe.data.val is not None
    evaluator = Evaluator(recipe, checkpoint.manifest.classes, recipe.data.val.path, torch.device("cpu"))
    evaluate_into_run(evaluator, run, checkpoint, lambda *_: None)
    return result_of(run, step)
