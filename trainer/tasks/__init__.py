"""Tasks: predictions → metrics and pictures, which is all in which they differ."""

from __future__ import annotations

from vitgraft.configs.schema.model import Task as TaskName
from vitgraft.trainer.tasks.base import Metric, Task


def make_task(name: TaskName, classes: list[str]) -> Task:
    """The task object of a recipe's head."""
    if name == "detection":
        from vitgraft.trainer.tasks.detection import DetectionTask

        return DetectionTask(classes)
    if name == "semantic":
        from vitgraft.trainer.tasks.semantic import SemanticTask

        return SemanticTask(classes)
    if name == "image":
        from vitgraft.trainer.tasks.image import ImageTask

        return ImageTask(classes)
    from vitgraft.trainer.tasks.video import VideoTask

    return VideoTask(classes)


__all__ = ["Metric", "Task", "make_task"]
