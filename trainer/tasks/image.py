"""Image classification: top-1 and top-5 accuracy."""

from __future__ import annotations

from torch import Tensor

from vitgraft.data_shards.batch import Truth
from vitgraft.data_shards.draw import draw_clip
from vitgraft.trainer.draw import enlarge
from vitgraft.trainer.tasks.base import Result
from vitgraft.trainer.tasks.video import VideoTask


class ImageTask(VideoTask):
    """One class for an image: metric and results are those of clips, pictures show the one image."""

    protocol = {"metric": "top-1 and top-5 accuracy, one view per image"}

    def draw(self, image: Tensor, result: Result) -> Tensor:
        """Draw the three best classes below the image."""
        return _captioned(image, self.caption(result))

    def draw_truth(self, image: Tensor, truth: Truth) -> Tensor:
        """Draw the true class below the image."""
        return _captioned(image, self.classes[truth.value])


def _captioned(image: Tensor, caption: str) -> Tensor:
    return draw_clip(enlarge(image)[0][None], caption)
