"""train: optimisation, parallelism, precision, schedule and checkpointing."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vitgraft.configs.schema.section import (
    BelowOne,
    Fraction,
    LargeCount,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class AdamWConfig(Section):
    """AdamW with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    betas: list[BelowOne] = [0.9, 0.999]
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.05

    @field_validator("betas")
    @classmethod
    def _two(cls, value: list[float]) -> list[float]:
        if len(value) != 2:
            raise ValueError(f"expected two numbers, e.g. [0.9, 0.999], not {value}")
        return value


class SGDConfig(Section):
    """SGD with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 0.0


OptimizerConfig = Annotated[AdamWConfig | SGDConfig, Field(discriminator="name")]


class ParamRule(Section):
    """Settings of the parameters whose name the regular expression ``match`` finds; later rules win."""

    match: Annotated[str, Field(max_length=1000)]
    lr_multiplier: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    frozen: bool | None = None

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class CosineSchedule(Section):
    """Half a cosine from lr to ``final`` × lr."""

    name: Literal["cosine"] = "cosine"
    warmup: Fraction = 0.05
    """Share of the run's samples over which the learning rate rises linearly from 0."""
    final: Fraction = 0.0

    @property
    def ends_at(self) -> float:
        """The factor on lr at the end."""
        return self.final if self.warmup < 1 else 1.0


class PolySchedule(Section):
    """lr × (1 - progress) ** power."""

    name: Literal["poly"] = "poly"
    warmup: Fraction = 0.05
    power: PositiveFloat = 1.0

    @property
    def ends_at(self) -> float:
        """The factor on lr at the end."""
        return 0.0 if self.warmup < 1 else 1.0


class StepSchedule(Section):
    """lr × gamma at each milestone (shares of the run's samples)."""

    name: Literal["step"] = "step"
    warmup: Fraction = 0.05
    milestones: Annotated[list[Fraction], Field(max_length=1000)] = [0.67, 0.92]
    gamma: Fraction = 0.1

    @property
    def ends_at(self) -> float:
        """The factor on lr at the end."""
        return float(self.gamma ** len(self.milestones))


ScheduleConfig = Annotated[CosineSchedule | PolySchedule | StepSchedule, Field(discriminator="name")]


class ExtendConfig(Section):
    """Further stage of a run, after the earlier ones."""

    epochs: LargeCount | None = None
    steps: LargeCount | None = None
    """Its length, in the unit of the run's: exactly one of ``epochs`` and ``steps``."""
    schedule: ScheduleConfig | None = None
    """Over this stage alone, with a warm-up of its own; ``null``: the rate with which the stage before ended stays."""
    lr: PositiveFloat | None = None
    """Base rate that the schedule scales; ``null``: the optimizer's."""

    @model_validator(mode="after")
    def _combination(self) -> ExtendConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        if self.schedule is None and self.lr is not None:
            raise ValueError("lr is of a schedule; give one, e.g. schedule: {name: cosine}, or remove lr")
        return self


class CheckpointConfig(Section):
    """Schedule and retention of checkpoints."""

    every_steps: LargeCount | None = None
    """Commit every so many steps, and always at the end; ``null``: at the end only."""
    keep_last: LargeCount = 3
    """Number of the newest valid checkpoints to keep."""
    keep_every: LargeCount | None = None
    """Keep also those of the steps that this number divides."""
    keep_best: str | None = None
    """Keep also the best of those evaluated by this metric, e.g. ``mIoU``; needs ``data.val``."""
    copy_to: str | None = None
    """URL of a folder in any store of fsspec (s3://, gs://, file://) that gets a copy after each commit."""
    writer_silence_s: Annotated[float, Field(ge=2, le=10**8, allow_inf_nan=False)] = 30.0
    """Seconds of silence after which the checkpointer is killed and restarted; it resumes from the shared memory. Its
    start-up may take two minutes."""

    @field_validator("copy_to")
    @classmethod
    def _a_store(cls, value: str | None) -> str | None:
        if value is not None and ("://" not in value or value.lower().startswith(("http://", "https://"))):
            raise ValueError(f"expected the URL of a store that can be written, e.g. s3://bucket/run, not {value!r}")
        return value


class TrainConfig(Section):
    """One of the five axes: how the model is trained."""

    seed: int = 0
    init_from: str | None = None
    """Another run, or one of its checkpoints, whose weights (averaged, where it has an average) the run starts from,
    instead of ``model.weights`` and ``model.backbone.weights``. The head's last layers start fresh when the classes are
    others. Not read again when the run is resumed."""
    epochs: LargeCount | None = None
    steps: LargeCount | None = None
    """Length of the run: exactly one of ``epochs`` and ``steps``. The schedule covers it."""
    extend: Annotated[list[ExtendConfig], Field(max_length=100)] = []
    """Stages after that, e.g. [{epochs: 12, schedule: {name: cosine}}]: what a run that is to train longer gets at a
    resume, with the same result as if it had had them from the start. Those that have begun stay as they are."""
    global_batch: Positive
    """Samples per optimizer step over all ranks and micro-steps."""
    accumulation: Positive = 1
    """Micro-steps per optimizer step."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = CosineSchedule()
    clip_grad: NonNegativeFloat = 0.0
    """Largest gradient norm; 0: no clipping."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate × rate ** (depth + 1 - layer) for the trunk's layers (BEiT's layer-wise decay)."""
    param_groups: Annotated[list[ParamRule], Field(max_length=10_000)] = []
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the exponential moving average of the weights, (1 + n) / (10 + n) in step n while that is less;
    evaluation then uses the average."""
    precision: Literal["fp32", "bf16", "bf16_params"] = "fp32"
    """bf16: fp32 parameters under torch autocast; bf16_params: DeepSpeed's bf16 engine with fp32 masters (GPU)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload_optimizer: bool = False
    """Keep masters and optimizer states in host memory and update there: for models whose states exceed GPU memory."""
    deterministic: bool = False
    """Deterministic kernels on CUDA (slower); on CPU runs are deterministic anyway."""
    activation_checkpointing: Literal["none", "full", "offload"] = "none"
    deepspeed: dict[str, Any] = {}
    """DeepSpeed dictionary merged over the rendered one; keys that vitgraft sets cannot be overridden."""
    roles: Literal["separate", "inline"] = "separate"
    """separate: a checkpointer process writes and commits while training goes on; inline: the trainer does it."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    peak_tflops: PositiveFloat | None = None
    """Peak of one device, for the MFU curve; ``null``: that of the GPU's name, dense bfloat16, where it is known."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """Policy for samples whose loss is not finite, also when their steps are repeated. skip: at the recorded positions
    they keep their place in the order at weight zero, unread; at others they take part."""
    ledger: bool = False
    """Write RUN/ledger: step, rank and entries of every batch."""

    @model_validator(mode="after")
    def _combination(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        self._check_stages()
        if self.global_batch % self.accumulation:
            raise ValueError(f"global_batch {self.global_batch} must be a multiple of accumulation {self.accumulation}")
        if self.precision == "bf16_params" and self.zero_stage == 0:
            raise ValueError("precision bf16_params needs zero_stage 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.activation_checkpointing == "offload" and self.precision == "bf16":
            raise ValueError(
                "activation_checkpointing offload does not work under autocast; use full, or precision fp32"
            )
        return self

    def _check_stages(self) -> None:
        ends_at = self.schedule.ends_at
        for number, stage in enumerate(self.extend):
            if (stage.epochs is None) != (self.epochs is None):
                unit = "steps" if self.epochs is None else "epochs"
                raise ValueError(f"extend.{number}: the run is counted in {unit}; give {unit} here, too")
            ends_at = ends_at if stage.schedule is None else stage.schedule.ends_at
            if stage.schedule is None and ends_at == 0:
                raise ValueError(
                    f"extend.{number}: the schedule before it ends with a rate of 0, with which nothing is learned; "
                    "give this stage a schedule, e.g. schedule: {name: cosine}"
                )

    def stage_lengths(self) -> list[int]:
        """Return the lengths of the run's stages, first that of ``epochs`` or ``steps``, in its unit."""
        return [self.epochs or self.steps or 0, *(stage.epochs or stage.steps or 0 for stage in self.extend)]
