"""Evaluate committed checkpoints: the weights are read from the checkpoint's files, never from the trainer."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import MAX_SMALL_BYTES, read_json
from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.model import MaskRCNNConfig
from vitgraft.data_shards.batch import Batch
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import eval_batches
from vitgraft.data_shards.manifest import IGNORE
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.contract import LossTerm, Predictions
from vitgraft.trainer import comm
from vitgraft.trainer.checkpoint.files import replace_text
from vitgraft.trainer.checkpoint.layout import EMA, step_name
from vitgraft.trainer.checkpoint.read import Checkpoint, Weights, choose_weights, read_weights
from vitgraft.trainer.checkpoint.retention import result_path
from vitgraft.trainer.checkpoint.save import load_model
from vitgraft.trainer.draw import beside, remarked, save_png, titled
from vitgraft.trainer.tasks import Metric, make_task
from vitgraft.trainer.tasks.base import Figures
from vitgraft.trainer.tasks.video import average_views


@dataclass
class Evaluation:
    """One evaluation: the content of RUN/results/step-N.json."""

    step: int
    metrics: Figures
    """``None``: the data has no ground truth for it."""
    protocol: dict[str, Any]
    samples: int
    unreadable: list[str]
    seconds: float
    pictures: list[str] = field(default_factory=list)
    raw_metrics: Figures | None = None
    """Of the weights themselves, where ``metrics`` are of their average and both were evaluated."""
    losses: dict[str, float] = field(default_factory=dict)
    """Losses of the same weights as ``metrics``. For a curve only: a head's random sampling depends on the batches."""
    confusion: NDArray[np.int64] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: value for name, value in self.__dict__.items() if name not in ("losses", "confusion")}


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context of the recipe's precision."""
    if recipe.train.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


class Evaluator:
    """Holds the data set and one copy of the model; :meth:`run` takes one checkpoint after another.

    Args:
        losses: compute the losses too.

    Raises:
        DataError: the data set's classes are not the checkpoint's (from :meth:`run`), or it is damaged.
    """

    def __init__(
        self, recipe: Recipe, classes: list[str], data: str, device: torch.device, losses: bool = False
    ) -> None:
        self.recipe, self.classes, self.device = recipe, classes, device
        self.task = make_task(recipe.task, classes)
        views = recipe.evaluate.views
        self.views = 1 if views is None else views.count
        self.dataset = PackedDataset(
            data, recipe.data, recipe.task, seed=recipe.train.seed, train=False, views=views, targets=losses
        )
        if self.dataset.manifest.classes != classes:
            raise DataError(_class_mismatch(data, self.dataset.manifest.classes, classes))
        size = recipe.data.image_size
        model = build_model(recipe.model.without_weights(), num_classes=len(classes), image_size=(size[0], size[1]))
        self.model: GraftedModel = model.to(device).eval()

    def protocol(self, weights: Weights | None = None) -> dict[str, Any]:
        """Return the protocol of the metrics, which is written beside them.

        Args:
            weights: which are evaluated; ``None``: the average where the recipe has one.
        """
        data = self.recipe.data
        protocol = {
            **self.task.protocol,
            "data_fingerprint": self.dataset.manifest.fingerprint,
            "samples": self.dataset.manifest.samples,
            "input": f"resized to fit {data.image_size[0]}x{data.image_size[1]}, padded",
            "weights": weights or ("ema" if self.recipe.train.ema is not None else "raw"),
            "precision": self.recipe.train.precision,
        }
        head = self.recipe.model.head
        if isinstance(head, MaskRCNNConfig):
            protocol["detections"] = f"at most {head.detections_per_image} of score {head.score_threshold} and more"
        if self.recipe.task == "video":
            clip = data.clip
            step = f"stride {clip.stride}" if clip.sampling == "dense" else "uniform"
            views = self.recipe.evaluate.views
            shown = "1 clip x 1 crop" if views is None else f"{views.clips} clips x {views.crops} crops"
            protocol["clip"] = f"{clip.frames} frames, {step}, {shown}"
            if views is not None:
                protocol["metric"] = (
                    f"top-1 and top-5 accuracy, probabilities averaged over {views.count} views per video"
                )
                protocol["input"] = f"resized to cover {data.image_size[0]}x{data.image_size[1]}, cut to it"
        return protocol

    def run(
        self,
        checkpoint: Checkpoint,
        pictures: Path | None,
        count: int,
        progress: Callable[[int, int], None],
        weights: Weights | None = None,
    ) -> Evaluation | None:
        """Evaluate one checkpoint; collective over the ranks, each taking every world-th sample.

        Args:
            pictures: folder for ``count`` pictures of the first samples; ``None``: none are written.
            progress: called with samples done and all samples of this rank.
            weights: the average (``ema``) or the weights themselves; ``None``: the average where there is one.

        Returns:
            The evaluation on rank 0, ``None`` on the others.

        Raises:
            ConfigError: there is no average.
        """
        started = time.monotonic()
        weights = choose_weights(checkpoint, weights)
        with checkpoint.reading():
            load_model(self.model, read_weights(checkpoint, ema=weights == "ema"), str(checkpoint.path))
        metric = self.task.metric()
        losses: dict[str, list[float]] = {}
        unreadable: list[str] = []
        indices = list(range(comm.rank(), self.dataset.manifest.samples, comm.world()))
        wanted = {index for index in indices if index < count} if pictures is not None else set()
        if pictures is not None and comm.rank() == 0:
            shutil.rmtree(pictures, ignore_errors=True)
            pictures.mkdir(parents=True)
        comm.barrier()
        names = self._pass(metric, indices, unreadable, pictures, wanted, losses, progress)
        states = comm.gather_to_first([metric.state(), unreadable, names, losses])
        if states is None:
            return None
        metric.merge([state[0] for state in states])
        return Evaluation(
            step=checkpoint.step,
            metrics=metric.compute(),
            protocol=self.protocol(weights),
            samples=self.dataset.manifest.samples,
            unreadable=sorted(line for state in states for line in state[1]),
            seconds=time.monotonic() - started,
            pictures=sorted(name for state in states for name in state[2]),
            losses=_mean_losses([state[3] for state in states]),
            confusion=metric.confusion(),
        )

    def _pass(
        self,
        metric: Metric,
        indices: list[int],
        unreadable: list[str],
        pictures: Path | None,
        wanted: set[int],
        losses: dict[str, list[float]],
        progress: Callable[[int, int], None],
    ) -> list[str]:
        names: list[str] = []
        done = 0
        on_error = lambda _, message: unreadable.append(message)  # noqa: E731
        # The loader makes whole videos; a forward pass takes ``evaluate.batch`` of their views.
        videos = max(1, self.recipe.evaluate.batch // self.views)
        for batch in eval_batches(self.dataset, indices, videos, on_error=on_error):
            predictions = self._predict(batch, losses)
            metric.add(predictions, batch)
            for position in range(len(batch.truths)):
                index = indices[done + position]
                if pictures is not None and index in wanted and batch.weights[position] > 0:
                    name = f"{index:04d}.png"
                    save_png(self._picture(predictions, batch, position), pictures / name)
                    names.append(name)
            done += len(batch.truths)
            progress(done, len(indices))
        return names

    def _predict(self, batch: Batch, losses: dict[str, list[float]]) -> Predictions:
        """Return the predictions of a batch; add total and count of its losses where it has targets."""
        on_device = batch.to(self.device)
        with torch.no_grad(), autocast(self.recipe, self.device):
            if on_device.targets is None:
                return self._forward(on_device)
            if self.recipe.task == "detection":
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    torch.manual_seed(0)
                    predictions, terms = self.model.evaluate(
                        on_device.images, on_device.sizes, on_device.targets, on_device.weights
                    )
            else:
                predictions = self._forward(on_device)
                assert isinstance(predictions, torch.Tensor)
                terms = {self.recipe.task: cross_entropy(predictions, on_device.targets, on_device.weights)}
        for name, term in terms.items():
            sums = losses.setdefault(name, [0.0, 0.0])
            sums[0] += float(term.total)
            sums[1] += float(term.count)
        return predictions

    def _forward(self, batch: Batch) -> Predictions:
        if self.recipe.evaluate.views is None:
            whole: Predictions = self.model(batch.images, batch.sizes)
            return whole
        step = self.recipe.evaluate.batch
        parts = [
            self.model(batch.images[start : start + step], batch.sizes[start : start + step])
            for start in range(0, len(batch.images), step)
        ]
        return average_views(torch.cat(parts), self.views)

    def _picture(self, predictions: Any, batch: Batch, position: int) -> torch.Tensor:
        # Of several views the middle one.
        row = position * self.views + self.views // 2
        height, width = (int(v) for v in batch.sizes[row])
        image = denormalise(batch.images[row], self.recipe)[..., :height, :width]
        if image.dim() == 4:
            image = image.transpose(0, 1)
        truth = batch.truths[position]
        result = self.task.result(predictions, position, (height, width), truth.size)
        if self.recipe.task != "video":
            image = torch.nn.functional.interpolate(image[None].float(), size=truth.size, mode="bilinear")[0].to(
                torch.uint8
            )
        left = titled(self.task.draw_truth(image, truth), "ground truth")
        return beside(left, titled(remarked(self.task.draw(image, result), self.task.remark(result)), "prediction"))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> LossTerm:
    """Return the cross-entropy of all labelled pixels, images or clips: no label smoothing, no auxiliary head.

    Args:
        logits: (B, K) or (B, K, H, W). targets: (B,) class ids, or (B, H, W) with 255 ignored. weights: (B,).
    """
    ignored = IGNORE if targets.dim() == 3 else -1  # an image may be of class 255
    wrong = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=ignored)
    shaped = weights.view(-1, *([1] * (targets.dim() - 1))) * (targets != ignored)
    return LossTerm((wrong * shaped).sum(), shaped.sum())


def _mean_losses(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    """Return the losses' sums over ranks and batches, divided by their normalisers."""
    names = sorted({name for part in parts for name in part})
    sums = {name: [math.fsum(part[name][i] for part in parts if name in part) for i in (0, 1)] for name in names}
    return {name: total / max(count, 1.0) for name, (total, count) in sums.items()}


def denormalise(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Convert normalised (3, …) float to uint8."""
    shape = (3, *([1] * (images.dim() - 1)))
    mean = torch.tensor(recipe.data.mean).view(shape)
    std = torch.tensor(recipe.data.std).view(shape)
    return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def evaluate_into_run(
    evaluator: Evaluator, run: Path, checkpoint: Checkpoint, progress: Callable[[int, int], None]
) -> Evaluation | None:
    """Evaluate and write RUN/results/step-N.json and its pictures; collective."""
    folder = run / "results" / step_name(checkpoint.step)
    folder.parent.mkdir(exist_ok=True)  # it may have been moved
    both = EMA in checkpoint.manifest.kinds and evaluator.recipe.evaluate.raw
    evaluation = evaluator.run(checkpoint, folder, evaluator.recipe.evaluate.pictures, _part(progress, 0, both))
    if both:
        raw = evaluator.run(checkpoint, None, 0, _part(progress, 1, both), "raw")
        if evaluation is not None and raw is not None:
            evaluation = replace(evaluation, raw_metrics=raw.metrics, seconds=evaluation.seconds + raw.seconds)
    if evaluation is not None:
        replace_text(
            result_path(run, checkpoint.step),
            to_json({**evaluation.as_json(), "id": evaluation_id(evaluator, checkpoint)}),
        )
    return evaluation


def _part(progress: Callable[[int, int], None], number: int, both: bool) -> Callable[[int, int], None]:
    """Return a progress callback for one of the two passes."""
    return (lambda done, total: progress(number * total + done, 2 * total)) if both else progress


def evaluated_already(evaluator: Evaluator, run: Path, checkpoint: Checkpoint) -> bool:
    """Tell whether RUN/results holds this checkpoint's evaluation under the same protocol."""
    try:
        stored = read_json(result_path(run, checkpoint.step), MAX_SMALL_BYTES, finite=False)
    except DataError:
        return False
    return bool(isinstance(stored, dict) and stored.get("id") == evaluation_id(evaluator, checkpoint))


def evaluation_id(evaluator: Evaluator, checkpoint: Checkpoint) -> str:
    """Return the id of (checkpoint, protocol): an evaluation with the same id need not be repeated."""
    files = [record.sha256 for record in checkpoint.manifest.files]
    return sha256_of({"files": files, "protocol": evaluator.protocol()})


def to_json(value: Any) -> str:
    """Return indented JSON text."""
    return json.dumps(value, indent=1) + "\n"


def _class_mismatch(where: str, found: list[str], expected: list[str]) -> str:
    remedy = "pack it again with --classes and the set that was trained on"
    for index, (theirs, ours) in enumerate(zip(found, expected, strict=False)):
        if theirs != ours:
            return f"{where}: class {index} is {theirs!r}, the model knows {ours!r}; {remedy}"
    return f"{where}: {len(found)} classes, the model was trained with {len(expected)}; {remedy}"
