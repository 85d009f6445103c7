"""``vitgraft evaluate``, ``predict`` and ``export`` in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vitgraft.configs.errors import CheckpointError, ConfigError, DataError
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.devices import count_gpus, limit_threads
from vitgraft.launch.ui import Screen
from vitgraft.trainer.checkpoint.read import Checkpoint, resolve_checkpoint


def evaluate(target: Path, data: str | None, out: Path | None, device: str, screen: Screen) -> dict[str, float]:
    """Evaluate; returns the figures by name, and writes them with their protocol to ``out``."""
    recipe, checkpoint = _open(target)
    source = data or (recipe.data.val.path if recipe.data.val is not None else None)
    if source is None:
        raise ConfigError(f"{target}: its recipe has no data.val; give --data DIR")
    import torch

    from vitgraft.trainer.checkpoint.files import replace_text
    from vitgraft.trainer.evaluate import Evaluator, to_json

    evaluator = Evaluator(recipe, checkpoint.manifest.classes, source, torch.device(_device(device)))
    evaluation = evaluator.run(checkpoint, None, 0, screen.callback("evaluate"))
    assert evaluation is not None
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(out, to_json(evaluation.as_json()))
        except OSError as error:
            raise DataError(f"--out {out}: cannot be written: {error.strerror}; choose another file") from None
    if evaluation.unreadable:
        screen.note(
            f"{len(evaluation.unreadable)} unreadable samples counted as wrong; the first: {evaluation.unreadable[0]}"
        )
    return evaluation.metrics


def predict(target: Path, inputs: list[Path], out: Path, device: str, screen: Screen) -> int:
    """Predict on files; returns how many."""
    recipe, checkpoint = _open(target)
    import torch

    from vitgraft.trainer.predict import Predictor, predict_files

    predictor = Predictor(recipe, checkpoint, torch.device(_device(device)))
    return len(predict_files(predictor, inputs, out, screen.callback("predict")))


def export(
    target: Path,
    format: Literal["safetensors", "torch-export"],
    out: Path,
    weights: Literal["ema", "raw"] | None,
    part: Literal["model", "backbone"],
    overwrite: bool,
) -> str:
    """Write the model of a checkpoint to ``out``; returns what the file holds."""
    recipe, checkpoint = _open(target)
    from vitgraft.trainer.export import export as write

    return write(recipe, checkpoint, out, format, weights=weights, part=part, overwrite=overwrite)


def _open(target: Path) -> tuple[Recipe, Checkpoint]:
    limit_threads()
    checkpoint = resolve_checkpoint(target)
    config = checkpoint.run / "config.yaml"
    if not config.is_file():
        raise CheckpointError(f"{config}: missing; it says which model {checkpoint.path.name} holds")
    return load_recipe(str(config)), checkpoint


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if count_gpus() else "cpu"
    if name == "cuda" and not count_gpus():
        raise ConfigError("--device cuda: no GPU is visible on this host; use auto or cpu")
    return name
