"""Predict on loose images and clips: JSON beside a picture for each input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema import Recipe
from vitgraft.data_shards.dataset import prepare_clip, prepare_image
from vitgraft.data_shards.images import load_image
from vitgraft.models.build import build_model
from vitgraft.trainer.checkpoint.files import replace_text
from vitgraft.trainer.checkpoint.read import Checkpoint, read_weights
from vitgraft.trainer.checkpoint.save import load_model
from vitgraft.trainer.draw import save_png
from vitgraft.trainer.evaluate import autocast, denormalise, to_json
from vitgraft.trainer.tasks import make_task

Progress = Callable[[int, int], None]


class Predictor:
    """A checkpoint's model, ready for inputs of any size."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        classes = checkpoint.manifest.classes
        self.task = make_task(recipe.task, classes)
        size = recipe.data.image_size
        model = build_model(recipe.model.without_weights(), num_classes=len(classes), image_size=(size[0], size[1]))
        with checkpoint.reading():
            load_model(model, read_weights(checkpoint, ema=recipe.train.ema is not None), str(checkpoint.path))
        self.model = model.to(device).eval()

    def predict(self, path: Path, out: Path) -> dict[str, Any]:
        """Predict on one file; writes ``out``/STEM.json and ``out``/STEM.png (and STEM.labels.png for label maps).

        Raises:
            DataError: the file cannot be read or decoded.
        """
        image, shown, valid, size, orientation = self._prepare(path)
        sizes = torch.tensor([valid])
        with torch.no_grad(), autocast(self.recipe, self.device):
            predictions = self.model(image[None].to(self.device), sizes.to(self.device))
        result = self.task.result(predictions, 0, valid, size)
        picture = self.task.draw(shown, result)
        labels = result.pop("labels", None)
        if labels is not None:
            name = f"{path.stem}.labels.png"
            save_png(labels[None].expand(3, -1, -1), out / name)
            result["label_map"] = name
        save_png(picture, out / f"{path.stem}.png")
        frame = {"frame": "displayed", "height": size[0], "width": size[1], "orientation": orientation}
        result = {"input": str(path), "picture": f"{path.stem}.png", **frame, **result}
        replace_text(out / f"{path.stem}.json", to_json(result))
        return result

    def _prepare(self, path: Path) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int], tuple[int, int], int]:
        """Model input, uint8 image or frames to draw on, valid size on the canvas, own size as displayed, and the EXIF
        orientation that was applied (1: none)."""
        if self.recipe.task == "video":
            clip, valid, scale = prepare_clip(path, self.recipe.data)
            frames = denormalise(clip, self.recipe)[..., : valid[0], : valid[1]].transpose(0, 1)
            return clip, frames, valid, (round(valid[0] / scale[0]), round(valid[1] / scale[1])), 1
        image, orientation = load_image(path)
        prepared = prepare_image(image, self.recipe.data)
        return prepared.canvas, image, prepared.size, (image.shape[1], image.shape[2]), orientation


def predict_files(predictor: Predictor, inputs: list[Path], out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Predict on files and on all files of folders.

    Raises:
        DataError: an input is missing or unreadable, or two inputs would write the same file.
    """
    files = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise DataError(f"{missing or inputs[0]}: no such file; give images, clips or folders of them")
    stems = [file.stem for file in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise DataError(f"two inputs are called {twice}; predict them into different --out folders")
    results = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(files):
            results.append(predictor.predict(file, out))
            progress(number + 1, len(files))
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written: {error.strerror}; choose another folder") from None
    return results
