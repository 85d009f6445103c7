"""Setup of a rank before its first step: data, model, DeepSpeed engine, restored state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitgraft.configs.errors import CheckpointError, ConfigError, DataError
from vitgraft.configs.hashing import seed_of
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.train import AdamWConfig
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import TrainBatches, train_batches
from vitgraft.data_shards.plan import data_state, micro_batches, samples_before
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.layer_decay import layer_of
from vitgraft.models.norms import convert_sync_batchnorm
from vitgraft.models.recompute import apply_recompute
from vitgraft.models.tuning import tuning_report
from vitgraft.trainer import comm, param_groups
from vitgraft.trainer.checkpoint.layout import DataState, Normalisation
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState, load_checkpoint, store_frozen
from vitgraft.trainer.checkpoint.savers import Saver, make_saver
from vitgraft.trainer.deepspeed_config import render
from vitgraft.trainer.init_from import start_from
from vitgraft.trainer.new_run import new_run
from vitgraft.trainer.non_finite import read_left_out
from vitgraft.trainer.report import Reporter
from vitgraft.trainer.schedule import learning_rate, stage_ends


@dataclass(frozen=True)
class Assignment:
    """Arguments of a rank from the launcher."""

    run: Path
    attempt: int
    resume: Path | None
    device: str


@dataclass
class Session:
    """One attempt on one rank."""

    recipe: Recipe
    assignment: Assignment
    device: torch.device
    dataset: PackedDataset
    engine: Any
    state: TrainerState
    saver: Saver
    facts: RunFacts
    groups: list[param_groups.Group]
    first_step: int
    stage_ends: list[int]
    reporter: Reporter

    @property
    def last_step(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stage_ends[-1]

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the step that starts after ``step`` steps."""
        return learning_rate(self.recipe.train, self.stage_ends, step, self.samples_at)

    def samples_at(self, step: int) -> int:
        """Return the number of samples consumed before ``step``."""
        return samples_before(step, self.dataset.epoch_size, self.recipe.train.global_batch)

    def entries_of(self, step: int) -> list[Entry]:
        """Return all entries of a step, over all ranks and micro-steps; ``step``: from 1, as in the metrics."""
        start, size = self.samples_at(step - 1), self.dataset.epoch_size
        epoch, first = divmod(start, size)
        return self.dataset.plan(epoch).entries(first, first + self.samples_at(step) - start)

    def data_state(self, step: int) -> DataState:
        """Return the global cursor before ``step``."""
        train = self.recipe.train
        state = data_state(
            step,
            fingerprint=self.dataset.fingerprint,
            seed=train.seed,
            epoch_size=self.dataset.epoch_size,
            global_batch=train.global_batch,
        )
        return DataState(**state)

    def batches(self) -> TrainBatches:
        """Return this rank's micro-batches from the first step to the last."""
        train = self.recipe.train
        cut = micro_batches(
            self.dataset.plan,
            epoch_size=self.dataset.epoch_size,
            first_step=self.first_step,
            last_step=self.last_step,
            global_batch=train.global_batch,
            accumulation=train.accumulation,
            rank=comm.rank(),
            world=comm.world(),
            paired=self.dataset.paired,
        )
        return train_batches(self.dataset, cut)


def open_session(recipe: Recipe, assignment: Assignment, reporter: Reporter) -> Session:
    """Build, distribute and restore.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: one line each.
    """
    device = _device(assignment.device)
    train = recipe.train
    dataset = PackedDataset(recipe.data.train, recipe.data, recipe.task, seed=train.seed, train=True)
    checkpoint = None if assignment.resume is None else open_checkpoint(assignment.resume)
    classes = dataset.manifest.classes
    comm.agree(
        {
            "run directory": str(assignment.run.resolve()),
            "recipe": recipe.identity_hash(),
            "data fingerprint": dataset.fingerprint,
            "resumed step": None if checkpoint is None else checkpoint.step,
        }
    )
    if checkpoint is not None:
        _check_same_run(recipe, dataset, checkpoint)
    if train.on_non_finite == "skip":
        # Read once, so that all ranks leave the same out whatever their hosts see of the shared disk.
        left_out = comm.from_first(list(read_left_out(assignment.run)) if comm.rank() == 0 else None)
        dataset.left_out = frozenset((epoch, position) for epoch, position in left_out)
    # The same weights on all ranks, whatever the world size.
    torch.manual_seed(seed_of("init", train.seed))
    size = (recipe.data.image_size[0], recipe.data.image_size[1])
    config = recipe.model if checkpoint is None else recipe.model.without_weights()
    model = build_model(config, num_classes=len(classes), image_size=size)
    if checkpoint is None and train.init_from is not None:
        started = start_from(train.init_from, model, config, classes, size)
        if comm.rank() == 0:
            reporter.note(started)
    groups = _group_parameters(recipe, model)
    frozen = _load_or_store(model, assignment.run, checkpoint)
    if comm.rank() == 0:
        reporter.note(f"{tuning_report(model)}; {len(dataset):,} samples")
    engine = _initialize(recipe, model.to(device), groups, device)
    state = TrainerState(engine, train.ema)
    if checkpoint is not None:
        state.restore(checkpoint)
    data = recipe.data
    facts = RunFacts(
        run=assignment.run,
        attempt=assignment.attempt,
        recipe_hash=recipe.identity_hash(),
        classes=classes,
        normalisation=Normalisation(mean=data.mean, std=data.std, image_size=data.image_size),
        frozen=frozen,
    )
    ends = stage_ends(train, dataset.epoch_size)
    return Session(
        recipe=recipe,
        assignment=assignment,
        device=device,
        dataset=dataset,
        engine=engine,
        state=state,
        saver=make_saver(recipe, state, facts, ends[-1], reporter),
        facts=facts,
        groups=groups,
        first_step=0 if checkpoint is None else checkpoint.step,
        stage_ends=ends,
        reporter=reporter,
    )


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _check_same_run(recipe: Recipe, dataset: PackedDataset, checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    if manifest.data.fingerprint != dataset.fingerprint:
        paths = ", ".join(source.path for source in recipe.data.train)
        raise DataError(
            f"{paths}: changed since {checkpoint.path.name} was written (fingerprint "
            f"{dataset.fingerprint[:12]}, expected {manifest.data.fingerprint[:12]}); restore it, or start a new run "
            f"from this one's weights: {new_run(checkpoint.run, recipe)}"
        )
    if not recipe.has_hash(manifest.recipe_hash):
        raise CheckpointError(
            f"{checkpoint.path}: written under another recipe (hash {manifest.recipe_hash[:12]}, this one "
            f"{recipe.identity_hash()[:12]}); use that one, or start a new run from this one's weights: "
            f"{new_run(checkpoint.run, recipe)}"
        )


def _load_or_store(model: GraftedModel, run: Path, checkpoint: Checkpoint | None) -> str | None:
    """Load all weights before DeepSpeed partitions them, or store what a new run freezes; returns the blob's hash."""
    if checkpoint is not None:
        with checkpoint.reading():
            load_checkpoint(model, checkpoint)
        return checkpoint.manifest.frozen
    digest = store_frozen(run, model) if comm.rank() == 0 else None
    shared: str | None = comm.from_first(digest)
    return shared


def _group_parameters(recipe: Recipe, model: GraftedModel) -> list[param_groups.Group]:
    """Freeze by the rules, then group the other parameters."""
    train = recipe.train
    names = [name for name, _ in model.named_parameters()]
    param_groups.check_rules(train, names)
    frozen = param_groups.frozen_names(train, names)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    facts = [param_groups.ParameterFacts(n, p.dim()) for n, p in model.named_parameters() if p.requires_grad]
    if not facts:
        raise ConfigError("train.param_groups: every parameter is frozen; leave some to train")
    depth = model.backbone.depth
    return param_groups.make_groups(train, facts, lambda name: layer_of(name, depth), depth)


def _initialize(recipe: Recipe, model: GraftedModel, groups: list[param_groups.Group], device: torch.device) -> Any:
    import deepspeed

    train = recipe.train
    convert_sync_batchnorm(model, device, comm.world())
    apply_recompute(model.recompute_units(), train.activation_checkpointing)
    parameters = dict(model.named_parameters())
    torch_groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": train.optimizer.lr * group.lr_multiplier,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    optimizer: torch.optim.Optimizer
    if isinstance(train.optimizer, AdamWConfig):
        betas = (train.optimizer.betas[0], train.optimizer.betas[1])
        fused = device.type == "cuda"
        optimizer = torch.optim.AdamW(
            torch_groups, lr=train.optimizer.lr, betas=betas, eps=train.optimizer.eps, fused=fused
        )
    else:
        optimizer = torch.optim.SGD(torch_groups, lr=train.optimizer.lr, momentum=train.optimizer.momentum)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=render(recipe, comm.world()))
    return engine
