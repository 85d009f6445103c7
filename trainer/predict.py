"""Predict on loose images and clips: JSON beside a picture for each input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.outputs import write_output
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.model import MaskRCNNConfig, ModelConfig
from vitgraft.data_shards.dataset import prepare_clip, prepare_image
from vitgraft.data_shards.images import Values, load_image
from vitgraft.models.build import build_model
from vitgraft.trainer.checkpoint.read import Checkpoint, Weights, choose_weights, read_weights
from vitgraft.trainer.checkpoint.save import load_model
from vitgraft.trainer.draw import png, remarked
from vitgraft.trainer.evaluate import autocast, denormalise, to_json
from vitgraft.trainer.inputs import Input, outputs_of
from vitgraft.trainer.tasks import make_task

Progress = Callable[[int, int], None]


class Predictor:
    """A checkpoint's model, ready for inputs of any size.

    Args:
        weights: the average (``ema``) or the weights themselves; ``None``: the average where there is one.
        threshold: list and draw what has this score or more; ``None``: list what the recipe's head gives, draw
            detections of 0.5 and more.
        values: what is black and what is white in grey images of more than 8 bits.

    Raises:
        ConfigError: no average, a threshold for label maps, or values for clips.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        device: torch.device,
        weights: Weights | None = None,
        threshold: float | None = None,
        values: Values | None = None,
    ) -> None:
        if values is not None and recipe.task == "video":
            raise ConfigError("--range: it is for grey images of more than 8 bits; leave it out for clips")
        self.recipe, self.device, self._values = recipe, device, values
        classes = checkpoint.manifest.classes
        self.task = make_task(recipe.task, classes)
        config = recipe.model.without_weights()
        if threshold is not None:
            if self.task.threshold is None:
                raise ConfigError("--threshold: label maps have no scores, every pixel has a class; leave it out")
            self.task.threshold = threshold
            config = _listing_from(config, threshold)
        size = recipe.data.image_size
        model = build_model(config, num_classes=len(classes), image_size=(size[0], size[1]))
        averaged = choose_weights(checkpoint, weights) == "ema"
        with checkpoint.reading():
            load_model(model, read_weights(checkpoint, ema=averaged), str(checkpoint.path))
        self.model = model.to(device).eval()

    def predict(self, given: Input, out: Path) -> dict[str, Any]:
        """Predict on one file; writes ``out``/NAME.json and ``out``/NAME.png (and NAME.labels.png for label maps).

        Raises:
            DataError: the file cannot be read or decoded.
            ConfigError: ``out`` cannot be written.
        """
        image, shown, valid, size, orientation = self._prepare(given.path)
        sizes = torch.tensor([valid])
        with torch.no_grad(), autocast(self.recipe, self.device):
            predictions = self.model(image[None].to(self.device), sizes.to(self.device))
        result = self.task.result(predictions, 0, valid, size)
        remark = self.task.remark(result)
        picture = remarked(self.task.draw(shown, result), remark)
        json_path, picture_path, labels_path = outputs_of(given.name, out)
        labels, option = result.pop("labels", None), f"--out {out}"
        if labels is not None:
            write_output(labels_path, png(labels[None].expand(3, -1, -1)), option)
            result["label_map"] = labels_path.name
        write_output(picture_path, png(picture), option)
        threshold = {} if self.task.threshold is None else {"threshold": self.task.threshold}
        frame = {"frame": "displayed", "height": size[0], "width": size[1], "orientation": orientation}
        result = {"input": str(given.path), "picture": picture_path.name, **frame, **threshold, **result}
        if remark is not None:
            result["remark"] = remark
        write_output(json_path, to_json(result), option)
        return result

    def _prepare(self, path: Path) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int], tuple[int, int], int]:
        """Return model input, uint8 image or frames to draw on, valid size on the canvas, original size as displayed,
        and the applied EXIF orientation (1: none)."""
        if self.recipe.task == "video":
            clip, valid, scale = prepare_clip(path, self.recipe.data)
            frames = denormalise(clip, self.recipe)[..., : valid[0], : valid[1]].transpose(0, 1)
            return clip, frames, valid, (round(valid[0] / scale[0]), round(valid[1] / scale[1])), 1
        image, orientation = load_image(path, self._values)
        prepared = prepare_image(image, self.recipe.data)
        return prepared.canvas, image, prepared.size, (image.shape[1], image.shape[2]), orientation


def _listing_from(config: ModelConfig, threshold: float) -> ModelConfig:
    """Return the same model with this score threshold."""
    if not isinstance(config.head, MaskRCNNConfig):
        return config
    head = config.head.model_copy(update={"score_threshold": threshold})
    return config.model_copy(update={"head": head})


@dataclass
class Predictions:
    """``done``: inputs predicted on. ``undrawn``: those of them with nothing to draw. ``broken``: a line for each
    that could not be read."""

    done: int = 0
    undrawn: int = 0
    broken: list[str] = field(default_factory=list)


def predict_files(predictor: Predictor, inputs: list[Input], out: Path, progress: Progress) -> Predictions:
    """Predict on all files; one that cannot be read does not keep the others from being done.

    Raises:
        ConfigError: ``out`` cannot be written.
    """
    found = Predictions()
    for number, given in enumerate(inputs):
        try:
            found.undrawn += "remark" in predictor.predict(given, out)
            found.done += 1
        except DataError as error:
            found.broken.append(str(error))
        progress(number + 1, len(inputs))
    return found
