"""The whole recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.schema.data import DataConfig, ViewsConfig
from vitgraft.configs.schema.model import ModelConfig, Task
from vitgraft.configs.schema.section import NonNegative, Positive, Section
from vitgraft.configs.schema.train import TrainConfig
from vitgraft.configs.schema.transforms import check_task

# Keys that may change when a run is resumed: where and how it runs, not what it computes.
OPERATIONAL = (
    "name",
    "launch",
    "evaluate",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.on_error",
    "data.train.path",
    "data.val",
    "train.checkpoint",
    "train.ledger",
    "train.zero_stage",
    "train.deterministic",
    "train.activation_checkpointing",
    "train.deepspeed",
)
# Keys that came after the first runs: unset they stay out of the identity, so that those runs go on.
_WHERE_SET = ("data.train.weight", "data.clip.decoder", "data.transforms.sides", "data.transforms.cat_max_ratio")


class EvaluateConfig(Section):
    """Evaluation of committed checkpoints."""

    batch: Positive = 8
    """Samples (with ``views``: views) per forward pass and rank."""
    views: ViewsConfig | None = None
    """Video only: average over several views of each video, e.g. {clips: 4, crops: 3}, each crop filling the canvas;
    ``null``: one clip, resized to fit the canvas."""
    every_checkpoints: Positive = 1
    """Evaluate every so many committed checkpoints, and always the last."""
    pictures: NonNegative = 8
    """How many pictures of predictions each evaluation writes."""


class LaunchConfig(Section):
    """Processes and devices of a run on this host."""

    processes: Positive | None = None
    """Ranks; ``null``: one for each GPU, or two on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive | None = None
    """CPU threads of each rank; ``null``: the cores divided by the ranks. Bit-exact resume needs the same number."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on which the ranks meet; 0: a free one."""


class Recipe(Section):
    """What a run is: validated before any process starts."""

    name: str = "run"
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _suits_the_task(self) -> Recipe:
        check_task(self.data.transforms, self.task)
        if self.evaluate.views is not None and self.task != "video":
            raise ValueError(f"evaluate.views: views are of videos, the head does {self.task}; set it to null")
        return self

    @property
    def task(self) -> Task:
        """What the head does: detection, semantic, video or image."""
        return self.model.head.task

    def identity(self) -> dict[str, Any]:
        """The keys that decide what is computed: a resumed run must agree in all of them."""
        tree = self.model_dump(mode="json")
        for key in (*OPERATIONAL, *_WHERE_SET):
            *parents, leaf = key.split(".")
            nodes = [tree]
            for parent in parents:
                below = [node[parent] for node in nodes]
                nodes = [item for node in below for item in (node if isinstance(node, list) else [node])]
            for node in nodes:
                if key in OPERATIONAL or node.get(leaf) is None:
                    node.pop(leaf, None)
        return tree

    def identity_hash(self) -> str:
        """SHA-256 of :meth:`identity`: the recipe hash of manifests."""
        return sha256_of(self.identity())


def possible_worlds(global_batch: int, accumulation: int, limit: NonNegative = 4096) -> list[int]:
    """World sizes that can carry the global batch: it is cut by accumulation first, then over ranks."""
    micro = global_batch // accumulation
    return [world for world in range(1, min(micro, limit) + 1) if micro % world == 0]
