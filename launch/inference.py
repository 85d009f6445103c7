"""``vitgraft evaluate``, ``predict`` and ``export`` in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.load import load_recipe
from vitgraft.configs.outputs import keep_inputs, write_output
from vitgraft.configs.schema import Recipe
from vitgraft.launch.devices import count_gpus, limit_threads
from vitgraft.launch.ui import Screen
from vitgraft.trainer.checkpoint.read import Checkpoint, Weights, resolve_checkpoint

if TYPE_CHECKING:
    from vitgraft.trainer.evaluate import Evaluation
    from vitgraft.trainer.predict import Predictions

_OF_A_RUN = (
    *("config.yaml", "metrics.jsonl", "events.jsonl", "non_finite.jsonl", "checkpoints", "blobs", "results", "logs"),
    *("ledger", "tensorboard", "lock"),
)


def evaluate(
    target: Path,
    data: str | None,
    out: Path | None,
    device: str,
    screen: Screen,
    weights: Weights | None = None,
) -> Evaluation:
    """Evaluate, and write the metrics with their protocol to ``out``."""
    recipe, checkpoint = _open(target)
    source = data or (recipe.data.val.path if recipe.data.val is not None else None)
    if source is None:
        raise ConfigError(f"{target}: its recipe has no data.val; give --data DIR")
    if out is not None:
        keep_inputs([out], [*_files_of(checkpoint), Path(source)], f"--out {out}")
    import torch

    from vitgraft.trainer.checkpoint.read import choose_weights
    from vitgraft.trainer.evaluate import Evaluator, to_json
    from vitgraft.trainer.figures import lag_of

    weights = choose_weights(checkpoint, weights)
    evaluator = Evaluator(recipe, checkpoint.manifest.classes, source, torch.device(_device(device)))
    evaluation = evaluator.run(checkpoint, None, 0, screen.callback("evaluate"), weights)
    assert evaluation is not None
    if out is not None:
        write_output(out, to_json(evaluation.as_json()), f"--out {out}")
    if evaluation.unreadable:
        screen.note(
            f"{len(evaluation.unreadable)} unreadable samples counted as wrong; the first: {evaluation.unreadable[0]}"
        )
    if weights == "ema" and (lagging := lag_of(recipe, checkpoint)) is not None:
        screen.note(lagging)
    return evaluation


def predict(
    target: Path,
    inputs: list[Path],
    out: Path,
    device: str,
    screen: Screen,
    weights: Weights | None = None,
    threshold: float | None = None,
    value_range: str = "",
) -> Predictions:
    """Predict on files; says what was passed over, what is undrawn and what is broken."""
    recipe, checkpoint = _open(target)
    from vitgraft.data_shards.images import parse_range
    from vitgraft.trainer.inputs import check_outputs, find_inputs, summary

    values = parse_range(value_range)
    found = find_inputs(inputs, out, recipe.task)
    check_outputs(found.files, out)
    if found.passed_over:
        screen.note(summary(found.passed_over))
    for folder in found.without:
        screen.note(f"{folder}: nothing to predict on")
    import torch

    from vitgraft.trainer.checkpoint.read import choose_weights
    from vitgraft.trainer.figures import lag_of
    from vitgraft.trainer.predict import Predictor, predict_files

    weights = choose_weights(checkpoint, weights)
    if weights == "ema" and (lagging := lag_of(recipe, checkpoint)) is not None:
        screen.note(lagging)
    predictor = Predictor(recipe, checkpoint, torch.device(_device(device)), weights, threshold, values)
    predictions = predict_files(predictor, found.files, out, screen.callback("predict"))
    if predictions.undrawn:
        screen.note(
            f"nothing is drawn on {predictions.undrawn} of {predictions.done} pictures: no detection of score "
            f"{predictor.task.threshold:g} or more; a lower --threshold draws more"
        )
    for line in predictions.broken:
        screen.note(line)
    return predictions


def export(
    target: Path,
    format: Literal["safetensors", "torch-export"],
    out: Path,
    weights: Weights | None,
    part: Literal["model", "backbone"],
    overwrite: bool,
) -> str:
    """Write the model of a checkpoint to ``out``; returns what the file holds."""
    recipe, checkpoint = _open(target)
    keep_inputs([out], _files_of(checkpoint), f"--out {out}")
    from vitgraft.trainer.export import export as write

    return write(recipe, checkpoint, out, format, weights=weights, part=part, overwrite=overwrite)


def _files_of(checkpoint: Checkpoint) -> list[Path]:
    """Return the paths of a run's own files and folders, without those that its user added."""
    return [checkpoint.path, *(checkpoint.run / name for name in _OF_A_RUN)]


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
