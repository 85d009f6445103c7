"""Save and restore the trainer's state: every rank its shard, one manifest for all."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, TrainingError, VitgraftError
from vitgraft.trainer import comm
from vitgraft.trainer.checkpoint import commit
from vitgraft.trainer.checkpoint.files import sync_folder, write_safetensors
from vitgraft.trainer.checkpoint.layout import (
    BUFFERS,
    EMA,
    MASTER,
    DataState,
    FileRecord,
    Manifest,
    Normalisation,
    range_key,
    shard_name,
    step_name,
)
from vitgraft.trainer.checkpoint.read import Checkpoint, VectorReader, blob_path, open_checkpoint
from vitgraft.trainer.deepspeed_state import (
    Fragment,
    fragments,
    full_shape,
    install_states,
    scalar_states,
    tensor_states,
)
from vitgraft.trainer.ema import Ema


@dataclass(frozen=True)
class RunFacts:
    """What every manifest of a run says."""

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
        self.ema = None if ema_decay is None else Ema(self.flats, ema_decay)

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers, e.g. BatchNorm statistics; the loop keeps them the same on all ranks."""
        module: nn.Module = self.engine.module
        parameters = {name for name, _ in module.named_parameters()}
        return {name: value for name, value in module.state_dict().items() if name not in parameters}

    def vectors(self) -> dict[str, NDArray[np.generic]]:
        """This rank's ranges, by safetensors key."""
        out: dict[str, NDArray[np.generic]] = {}
        for fragment in self.fragments:
            sources = {MASTER: fragment.flat, **tensor_states(self.engine, fragment.flat)}
            if self.ema is not None:
                sources[EMA] = self.ema.of(fragment.flat)
            for kind, source in sources.items():
                values = fragment.saved(source)
                if values.numel():
                    out[range_key(kind, fragment.name, fragment.writes[0])] = values.float().cpu().numpy()
        return out

    def kinds(self) -> list[str]:
        """Which vectors are stored for each parameter."""
        states = tensor_states(self.engine, self.flats[0]) if self.flats else {}
        return [MASTER, *sorted(states), *([EMA] if self.ema is not None else [])]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Read this rank's ranges, whatever world and stage wrote them. The model's own weights were loaded before
        ``deepspeed.initialize`` (see :func:`load_model`).

        Raises:
            CheckpointError: of another model or optimizer, or damaged.
        """
        manifest = checkpoint.manifest
        if manifest.parameters != self.shapes:
            raise CheckpointError(f"{checkpoint.path}: {_first_difference(manifest.parameters, self.shapes)}")
        reader = VectorReader(checkpoint)
        states = [kind for kind in manifest.kinds if kind not in (MASTER, EMA)]
        install_states(self.engine, self.flats, states, manifest.scalars)
        for fragment in self.fragments:
            targets = {MASTER: fragment.flat, **tensor_states(self.engine, fragment.flat)}
            if self.ema is not None:
                targets[EMA] = self.ema.of(fragment.flat)
            for kind, target in targets.items():
                values = reader.read(kind, fragment.name, fragment.start, fragment.stop)
                fragment.view(target).copy_(torch.from_numpy(values))

    def save(self, facts: RunFacts, step: int, samples: int, data: DataState) -> Checkpoint:
        """Write, hash, commit; collective. Returns the committed checkpoint.

        Raises:
            TrainingError: a rank could not write (e.g. a full disk); nothing is committed and nothing is left.
        """
        temporary = commit.temporary_folder(facts.run, step)
        if comm.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        comm.barrier()
        groups = self._groups()
        answer = _attempt_write(self, temporary)
        answers = comm.gather(answer)
        failure = next((a for a in answers if isinstance(a, str)), None)
        if failure is None and comm.rank() == 0:
            records = [record for a in answers if not isinstance(a, str) for record in a]
            try:
                commit.commit(facts.run, self._manifest(facts, step, samples, data, records, groups))
            except (OSError, VitgraftError) as error:
                failure = _reason(error, temporary)
        failure = next((f for f in comm.gather(failure) if f is not None), None)
        if failure is not None:
            if comm.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            comm.barrier()
            raise TrainingError(f"checkpoint of step {step} not written: {failure}; earlier checkpoints are untouched")
        return open_checkpoint(temporary.with_name(step_name(step)))

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for group in self.engine.optimizer.param_groups:
            plain = {k: v for k, v in group.items() if isinstance(v, int | float | str | bool)}
            betas = group.get("betas")
            groups.append({**plain, **({"betas": list(betas)} if betas else {})})
        return groups

    def _manifest(
        self,
        facts: RunFacts,
        step: int,
        samples: int,
        data: DataState,
        records: list[FileRecord],
        groups: list[dict[str, Any]],
    ) -> Manifest:
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
            scalars=scalar_states(self.engine, self.flats),
            groups=groups,
            frozen=facts.frozen,
            code_version=version("vitgraft"),
            created=time.time(),
            files=records,
        )


def _attempt_write(state: TrainerState, folder: Path) -> list[FileRecord] | str:
    """This rank's files, or why they could not be written: the ranks must all learn of it, not hang."""
    try:
        records = [write_safetensors(folder / shard_name(comm.rank()), state.vectors())]
        if comm.rank() == 0:
            arrays = {name: value.cpu().numpy() for name, value in state.buffers().items()}
            records.append(write_safetensors(folder / BUFFERS, arrays))
    except OSError as error:
        return _reason(error, folder)
    return records


def _reason(error: BaseException, folder: Path) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk of {folder.parent}; free some and start again with the same command"
    return str(error)


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
    own = model.state_dict()
    problem = _first_difference_of_keys(own, weights)
    if problem:
        raise CheckpointError(f"{where}: a checkpoint of another model: {problem}")
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()})


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
    folder.mkdir(exist_ok=True)
    temporary = folder / "frozen.tmp"
    try:
        record = write_safetensors(temporary, frozen)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"frozen trunk not written: {_reason(error, temporary)}") from None
    final = blob_path(run, record.sha256)
    os.replace(temporary, final)
    sync_folder(folder)
    return record.sha256
