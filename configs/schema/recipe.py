"""The whole recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.schema.data import DataConfig, ViewsConfig
from vitgraft.configs.schema.identity import differences, remove_keys
from vitgraft.configs.schema.model import ModelConfig, Task
from vitgraft.configs.schema.section import NonNegative, Positive, Seconds, Section, SmallCount
from vitgraft.configs.schema.train import TrainConfig
from vitgraft.configs.schema.transforms import check_task

# Keys that may change when a run is resumed: where and how it runs, not what it computes.
OPERATIONAL = (
    "name",
    "launch",
    "evaluate",
    "evaluator",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.on_error",
    "data.train.path",
    "data.val",
    # What has begun of it is compared at a resume (launch/run_recipe.py).
    "train.extend",
    "train.roles",
    "train.checkpoint",
    "train.ledger",
    "train.on_non_finite",
    "train.peak_tflops",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.deterministic",
    "train.activation_checkpointing",
    "train.deepspeed",
)
# Keys that came while manifests hashed all keys: null there means that the recipe was written before them.
_SINCE_THEN = (
    "data.train.weight",
    "data.clip.decoder",
    "data.transforms.sides",
    "data.transforms.cat_max_ratio",
    "train.init_from",
)

METRICS: dict[Task, tuple[str, ...]] = {
    "detection": tuple(
        f"{of}_{name}" for of in ("box", "mask") for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    ),
    "semantic": ("mIoU", "mAcc", "aAcc"),
    "video": ("top1", "top5"),
    "image": ("top1", "top5"),
}
"""The figures by which ``train.checkpoint.keep_best`` can choose; larger is better in all."""


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
    """Number of pictures of predictions that each evaluation writes."""
    raw: bool = True
    """With ``train.ema``, evaluate the weights themselves beside their average: one more pass over ``data.val``."""
    loss: bool = True
    """Compute the loss on ``data.val`` too, for its curve."""


Backlog = Literal["all", "latest"]


class EvaluatorConfig(Section):
    """The evaluator: a process of its own that follows committed checkpoints. Training never waits for it."""

    host: str | None = None
    """The host that it runs on, by its name in the hostfile; ``null``: that of rank 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: the first of its host's GPUs that no rank uses, else the CPU. ``cuda`` where ranks use them all: the
    last one, beside its rank."""
    backlog: Backlog = "latest"
    """Policy when checkpoints come faster than evaluations: ``latest`` evaluates the newest and skips older ones;
    ``all`` evaluates every one, oldest first, and keeps them until then."""
    threads: SmallCount | None = None
    """Its CPU threads; ``null``: the cores of its host divided by the ranks there and itself."""


class DeadlinesConfig(Section):
    """Seconds after which a phase that has not ended is a hang; ``null``: learned from the run."""

    start: Seconds | None = None
    """From a rank's start to its first step."""
    first_step: Seconds | None = None
    step: Seconds | None = None
    save: Seconds | None = None
    evaluate: Seconds | None = None
    silence: Seconds = 60.0
    """A rank that gives no sign of life for so long stands still, whatever its phase may take."""

    def by_phase(self) -> dict[Literal["start", "first_step", "step", "save", "evaluate"], float | None]:
        """Return the limits of the phases."""
        return {
            "start": self.start,
            "first_step": self.first_step,
            "step": self.step,
            "save": self.save,
            "evaluate": self.evaluate,
        }


class LaunchConfig(Section):
    """Processes and devices of a run, and the policy for failures."""

    processes: SmallCount | None = None
    """Ranks; ``null``: one for each GPU, or two on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: SmallCount | None = None
    """CPU threads of each rank; ``null``: the cores divided by the ranks. Bit-exact resume needs the same number."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on which the ranks meet; 0: a free one."""
    max_restarts: NonNegative = 3
    """Restarts without a newer checkpoint between them; then the run ends with code 6. 0: the first failure ends it."""
    restart_delay_s: Annotated[float, Field(ge=0, le=10**8, allow_inf_nan=False)] = 5.0
    """Pause before the second restart in a row without a newer checkpoint; it doubles with each further one."""
    host_failures: Positive = 2
    """After so many failures a host is left out of the next attempt."""
    deadlines: DeadlinesConfig = DeadlinesConfig()
    ssh_args: Annotated[list[str], Field(max_length=1000)] = []
    """Arguments of every ssh to another host, e.g. ["-p", "2222"]; put values with spaces into a file: ["-F", FILE]."""


class Recipe(Section):
    """Recipe of a run, validated before any process starts."""

    name: str = "run"
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LaunchConfig()
    evaluator: EvaluatorConfig | None = None
    """``null``: the trainer's ranks evaluate together, between two steps."""

    @model_validator(mode="after")
    def _suits_the_task(self) -> Recipe:
        check_task(self.data.transforms, self.task)
        if self.evaluate.views is not None and self.task != "video":
            raise ValueError(f"evaluate.views: views are of videos, the head does {self.task}; set it to null")
        return self

    @model_validator(mode="after")
    def _best_of_something(self) -> Recipe:
        metric = self.train.checkpoint.keep_best
        if metric is not None and metric not in METRICS[self.task]:
            names = ", ".join(METRICS[self.task])
            raise ValueError(f"train.checkpoint.keep_best: {metric!r} is no metric of {self.task}; use one of {names}")
        if metric is not None and metric.startswith("mask_") and not getattr(self.model.head, "masks", True):
            raise ValueError(
                f"train.checkpoint.keep_best: model.head.masks false gives no {metric}; use "
                f"{metric.replace('mask_', 'box_')}, or set masks to true"
            )
        if metric is not None and self.data.val is None:
            raise ValueError("train.checkpoint.keep_best needs evaluations: set data.val, or keep_best to null")
        return self

    @model_validator(mode="after")
    def _evaluator_has_work(self) -> Recipe:
        if self.evaluator is not None and self.train.roles == "inline":
            raise ValueError(
                "evaluator: train.roles inline leaves no role a process; set evaluator to null, or roles to separate"
            )
        if self.evaluator is not None and self.data.val is None:
            raise ValueError("evaluator: there is nothing to evaluate on; set data.val, or evaluator to null")
        return self

    @model_validator(mode="after")
    def _copies_have_a_role(self) -> Recipe:
        if self.train.checkpoint.copy_to is not None and self.train.roles == "inline":
            raise ValueError(
                "train.checkpoint.copy_to: train.roles inline leaves no role to copy; set copy_to to null, or roles to "
                "separate"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Recipe:
        for key, weights in ("weights", self.model.weights), ("backbone.weights", self.model.backbone.weights):
            if self.train.init_from is not None and weights is not None:
                raise ValueError(f"train.init_from names weights for the trunk too; remove model.{key}, or init_from")
        return self

    @property
    def task(self) -> Task:
        """Task of the head: detection, semantic, video or image."""
        return self.model.head.task

    def identity(self) -> dict[str, Any]:
        """Return the keys that decide what is computed, defaults written out: a resumed run must agree in all."""
        tree = self.model_dump(mode="json")
        remove_keys(tree, OPERATIONAL)
        return tree

    def identity_hash(self) -> str:
        """Return the recipe hash of manifests: SHA-256 of what :meth:`identity` holds beside defaults."""
        tree = differences(self)
        remove_keys(tree, OPERATIONAL)
        return sha256_of(tree)

    def has_hash(self, recipe_hash: str) -> bool:
        """Tell whether a manifest's recipe hash is this recipe's, in the form of today or of before it."""
        return recipe_hash == self.identity_hash() or recipe_hash == self._first_hash()

    def _first_hash(self) -> str:
        """Return the hash of manifests that hold it over all keys, defaults too."""
        tree = self.identity()
        remove_keys(tree, _SINCE_THEN, unset_only=True)
        return sha256_of(tree)
