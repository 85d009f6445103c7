"""Trainer's state as named flat vectors: collected for saving, and restored (savers.py writes it)."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, TrainingError, cause_of
from vitgraft.trainer import comm
from vitgraft.trainer.checkpoint.code_version import code_version
from vitgraft.trainer.checkpoint.commit import why
from vitgraft.trainer.checkpoint.files import make_folders, sync_folder, write_safetensors
from vitgraft.trainer.checkpoint.layout import EMA, MASTER, DataState, Manifest, Normalisation, range_key
from vitgraft.trainer.checkpoint.read import Checkpoint, VectorReader, blob_path, read_weights
from vitgraft.trainer.deepspeed_state import (
    Fragment,
    fragments,
    full_shape,
    inner_optimizer,
    install_states,
    scalar_states,
    tensor_states,
)
from vitgraft.trainer.ema import Ema


@dataclass(frozen=True)
class RunFacts:
    """Facts common to all manifests of a run."""

    run: Path
    attempt: int
    recipe_hash: str
    classes: list[str]
    normalisation: Normalisation
    frozen: str | None


class TrainerState:
    """The state of a DeepSpeed engine as named flat vectors."""

    def __init__(self, engine: Any, ema_decay: float | None) -> None:
        self.engine = engine
        self.names: dict[nn.Parameter, str] = {p: n for n, p in engine.module.named_parameters() if p.requires_grad}
        self.shapes = {name: full_shape(p) for p, name in self.names.items()}
        self.fragments: list[Fragment] = fragments(engine, self.names, comm.rank(), comm.world())
        self.flats: list[Tensor] = list({id(f.flat): f.flat for f in self.fragments}.values())
        self.states = state_names(inner_optimizer(engine))
        self.ema = None if ema_decay is None else Ema(self.flats, ema_decay)

    def buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers, e.g. BatchNorm statistics; the loop keeps them the same on all ranks."""
        module: nn.Module = self.engine.module
        parameters = {name for name, _ in module.named_parameters()}
        return {name: value for name, value in module.state_dict().items() if name not in parameters}

    def tensors(self) -> dict[str, Tensor]:
        """Return this rank's ranges by safetensors key, as views. States that the optimizer has not created yet are
        zero, their initial value. Ordered by kind, then by memory address, so that neighbours in the file are
        neighbours in memory.

        Raises:
            TrainingError: the optimizer keeps other states than its class is known for.
        """
        sources = [self._sources(flat) for flat in self.flats]
        place = {id(flat): number for number, flat in enumerate(self.flats)}
        ordered = sorted(self.fragments, key=lambda fragment: (place[id(fragment.flat)], fragment.offset))
        out: dict[str, Tensor] = {}
        for kind in self.kinds():
            for fragment in ordered:
                first, last = fragment.writes
                source = sources[place[id(fragment.flat)]].get(kind)
                values = fragment.saved(source) if source is not None else torch.zeros(1).expand(last - first)
                if first < last:
                    out[range_key(kind, fragment.name, first)] = values
        return out

    def addresses(self) -> list[int]:
        """Return the addresses of the memory of :meth:`tensors`; its views are valid while they are unchanged."""
        return [source.data_ptr() for flat in self.flats for source in self._sources(flat).values()]

    def _sources(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a flat tensor's vectors by kind, with its layout."""
        states = tensor_states(self.engine, flat, self.states)
        if states and sorted(states) != self.states:
            raise TrainingError(
                f"{type(inner_optimizer(self.engine)).__name__} keeps the states {sorted(states)}, expected "
                f"{self.states}: this version of it is not supported"
            )
        return {MASTER: flat, **states, **({EMA: self.ema.of(flat)} if self.ema is not None else {})}

    def kinds(self) -> list[str]:
        """Return the kinds of the vectors stored for each parameter."""
        return [MASTER, *self.states, *([EMA] if self.ema is not None else [])]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Read this rank's ranges, whatever world and stage wrote them. The model's own weights were loaded before
        ``deepspeed.initialize`` (see :func:`load_checkpoint`).

        Raises:
            CheckpointError: of another model or optimizer, or damaged.
            TrainingError: its storage fails.
        """
        manifest = checkpoint.manifest
        if manifest.parameters != self.shapes:
            raise CheckpointError(f"{checkpoint.path}: {_first_difference(manifest.parameters, self.shapes)}")
        if self.ema is not None:
            self.ema.ramped = manifest.ema_ramped
        reader = VectorReader(checkpoint)
        states = [kind for kind in manifest.kinds if kind not in (MASTER, EMA)]
        if sorted(states) != sorted(self.states):
            raise CheckpointError(
                f"{checkpoint.path}: of another optimizer: it holds the states {sorted(states)}, this one keeps "
                f"{sorted(self.states)}"
            )
        # Earlier versions took the state of a parameter with one element for a scalar, too.
        scalars = {name: value for name, value in manifest.scalars.items() if name not in states}
        install_states(self.engine, self.flats, states, scalars)
        sources = {id(flat): self._sources(flat) for flat in self.flats}
        # One kind after the other, which bounds what lies on the host for a GPU.
        for kind in self.kinds():
            views = [fragment.view(sources[id(fragment.flat)][kind]) for fragment in self.fragments]
            # On the CPU straight to its place: every further pass over the memory costs as much as reading it.
            read = [view if _is_readable(view) else torch.empty(view.shape, dtype=torch.float32) for view in views]
            reader.fill(
                (kind, fragment.name, fragment.start, values.numpy())
                for fragment, values in zip(self.fragments, read, strict=True)
            )
            for view, values in zip(views, read, strict=True):
                if values is not view:
                    view.copy_(values)

    def groups(self) -> list[dict[str, Any]]:
        """Return the hyper-parameters of each parameter group: plain values."""
        groups: list[dict[str, Any]] = []
        for group in self.engine.optimizer.param_groups:
            plain = {k: v for k, v in group.items() if isinstance(v, int | float | str | bool)}
            betas = group.get("betas")
            groups.append({**plain, **({"betas": list(betas)} if betas else {})})
        return groups

    def manifest(self, facts: RunFacts, step: int, samples: int, data: DataState) -> Manifest:
        """Return the manifest without its files."""
        return Manifest(
            run=facts.run.name,
            attempt=facts.attempt,
            step=step,
            samples=samples,
            data=data,
            world=comm.world(),
            zero_stage=self.engine.zero_optimization_stage(),
            recipe_hash=facts.recipe_hash,
            classes=facts.classes,
            normalisation=facts.normalisation,
            parameters=self.shapes,
            kinds=self.kinds(),
            scalars=scalar_states(self.engine, self.flats, self.states),
            groups=self.groups(),
            frozen=facts.frozen,
            ema_ramped=self.ema is not None and self.ema.ramped,
            code_version=code_version(),
            created=time.time(),
            files=[],
        )


def state_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the tensor states that an optimizer keeps for each parameter, known before its first step from its class.

    Raises:
        TrainingError: an unknown class.
    """
    name = type(optimizer).__name__
    if "adam" in name.lower():
        return ["exp_avg", "exp_avg_sq"]
    if name == "SGD":
        return ["momentum_buffer"] if any(group["momentum"] for group in optimizer.param_groups) else []
    raise TrainingError(f"optimizer {name}: its states are not known, so it cannot be saved; use adamw or sgd")


def _is_readable(view: Tensor) -> bool:
    return view.device.type == "cpu" and view.dtype == torch.float32


def _first_difference(theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> str:
    for name, shape in ours.items():
        if name not in theirs:
            return f"a checkpoint of another model: it lacks parameter {name}"
        if theirs[name] != shape:
            return f"a checkpoint of another model: {name} has shape {theirs[name]}, the recipe's model {shape}"
    extra = next(name for name in theirs if name not in ours)
    return f"a checkpoint of another model: its parameter {extra} is not in the recipe's model"


def load_model(model: nn.Module, weights: dict[str, NDArray[np.generic]], where: str) -> None:
    """Load a whole state strictly, with one line when it is of another model.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected or of another shape.
    """
    _check_keys(model.state_dict(), weights, where)
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()})


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights to go on from (not their average), straight to their places where these are plain memory.

    Raises:
        CheckpointError: as in :func:`load_model`, or damaged; the model is then partly loaded.
        TrainingError: its storage fails.
    """
    shapes = checkpoint.manifest.parameters
    places = {
        name: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if _is_readable(parameter) and parameter.is_contiguous() and list(parameter.shape) == shapes.get(name)
    }
    weights = read_weights(checkpoint, ema=False, places=places)
    _check_keys(model.state_dict(), weights, str(checkpoint.path))
    rest = {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items() if name not in places}
    model.load_state_dict(rest, strict=False)


def _check_keys(own: dict[str, Tensor], weights: dict[str, NDArray[np.generic]], where: str) -> None:
    problem = _first_difference_of_keys(own, weights)
    if problem:
        raise CheckpointError(f"{where}: a checkpoint of another model: {problem}")


def _first_difference_of_keys(own: dict[str, Tensor], weights: dict[str, NDArray[np.generic]]) -> str | None:
    for name, tensor in own.items():
        if name not in weights:
            return f"it lacks {name}"
        if tuple(weights[name].shape) != tuple(tensor.shape):
            return f"{name} has shape {tuple(weights[name].shape)}, the recipe's model {tuple(tensor.shape)}"
    extra = next((name for name in weights if name not in own), None)
    return None if extra is None else f"its {extra} is not in the recipe's model"


def store_frozen(run: Path, model: nn.Module) -> str | None:
    """Write the frozen parameters once per run, under their hash; ``None`` when nothing is frozen."""
    frozen = {name: p.detach().cpu().numpy() for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        return None
    folder = run / "blobs"
    temporary = folder / "frozen.tmp"
    try:
        make_folders(folder)
        record = write_safetensors(temporary, frozen)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TrainingError(f"frozen trunk not written: {why(error, temporary)}", cause=cause_of(error)) from None
    final = blob_path(run, record.sha256)
    os.replace(temporary, final)
    sync_folder(folder)
    return record.sha256
