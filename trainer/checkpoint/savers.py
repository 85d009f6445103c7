"""Two ways to save the trainer's state: written here and now, or copied for the checkpointer to write.

Both give the same files. :class:`InlineSaver` is the reference (``train.roles: inline``); :class:`HandoverSaver` keeps
the trainer for no longer than the copy of its shard takes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitgraft.configs.errors import CheckpointError, TrainingError, VitgraftError, cause_of
from vitgraft.configs.schema import Recipe
from vitgraft.trainer import comm
from vitgraft.trainer.checkpoint import commit
from vitgraft.trainer.checkpoint.files import remove_tree, write_safetensors
from vitgraft.trainer.checkpoint.handover import BUFFER_VARIABLE, Control, FilePart, HandoverBuffer, place_files
from vitgraft.trainer.checkpoint.image import Image, lay_out
from vitgraft.trainer.checkpoint.layout import BUFFERS, DataState, FileRecord, shard_name
from vitgraft.trainer.checkpoint.memory import available_memory
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.checkpoint.retention import retain
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState
from vitgraft.trainer.report import Reporter

_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "F32",  # numpy, by which checkpoints are read, has no bfloat16
    torch.int32: "I32",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_STORED = {name: dtype for dtype, name in _DTYPES.items() if dtype is not torch.bfloat16}
_GROWTH = 1 << 16
"""Bytes by which a control record may grow during a run: numbers get longer, nothing else changes."""


class Saver(Protocol):
    """Interface of a saver to the training loop. All methods are collective, :meth:`failed` excepted."""

    def begin(self, step: int, samples: int, data: DataState) -> None:
        """Save; the weights may change again when it returns.

        Raises:
            TrainingError: not written, or an earlier one was not; nothing is left of it.
        """

    def finish(self) -> Checkpoint:
        """Wait for the commit of what was begun last.

        Raises:
            TrainingError: as in :meth:`begin`.
        """

    def failed(self) -> bool:
        """Tell whether this rank knows that the last save failed (:meth:`finish` raises the error). Never waits."""

    def tidy(self) -> None:
        """Apply the retention policy, unless the checkpointer does."""


def make_saver(recipe: Recipe, state: TrainerState, facts: RunFacts, last_step: int, reporter: Reporter) -> Saver:
    """Return the saver of ``train.roles``. A rank that was started without a hand-over buffer saves inline.

    Raises:
        TrainingError: not enough memory for the buffer.
    """
    path = os.environ.get(BUFFER_VARIABLE)
    if recipe.train.roles == "separate" and path is not None:
        return HandoverSaver(state, facts, last_step, path)
    if recipe.train.roles == "separate" and comm.rank() == 0:
        copy = "" if recipe.train.checkpoint.copy_to is None else ", and not copied to train.checkpoint.copy_to"
        reporter.note(
            f"train.roles: separate, but {BUFFER_VARIABLE} names no buffer; checkpoints are written inline{copy}"
        )
    return InlineSaver(recipe, state, facts, last_step, reporter)


def _agree(facts: RunFacts, step: int, data: DataState) -> None:
    comm.agree(
        {
            "run directory": str(facts.run.resolve()),
            "step": step,
            "recipe": facts.recipe_hash,
            "data fingerprint": data.fingerprint,
        }
    )


def _not_written(step: int, reason: str) -> TrainingError:
    text = f"checkpoint of step {step} not written: {reason}; earlier checkpoints are untouched"
    return TrainingError(text, cause=commit.cause_in(reason))


def _stored_type(file: str, tensor: Tensor) -> str:
    """Return the stored dtype of a tensor, by safetensors's name: vectors are float32, buffers keep theirs."""
    return _DTYPES[tensor.dtype] if file == BUFFERS else "F32"


def _files(state: TrainerState) -> dict[str, dict[str, Tensor]]:
    """Return this rank's files: their tensors by key."""
    files = {shard_name(comm.rank()): state.tensors()}
    if comm.rank() == 0:
        files[BUFFERS] = state.buffers()
    return files


class InlineSaver:
    """Every rank writes its shard, rank 0 commits, all wait."""

    def __init__(
        self, recipe: Recipe, state: TrainerState, facts: RunFacts, last_step: int, reporter: Reporter
    ) -> None:
        self._recipe, self._state, self._facts = recipe, state, facts
        self._last_step, self._reporter = last_step, reporter
        self._checkpoint: Checkpoint | None = None

    def begin(self, step: int, samples: int, data: DataState) -> None:
        """Write, hash, commit."""
        run = self._facts.run
        _agree(self._facts, step, data)
        temporary = commit.temporary_folder(run, step, self._facts.attempt)
        failure = comm.from_first(_attempt_prepare(temporary) if comm.rank() == 0 else None)
        answers = comm.gather(self._attempt_write(temporary) if failure is None else failure)
        failure = next((a for a in answers if isinstance(a, str)), None)
        if comm.rank() == 0 and failure is None:
            records = [FileRecord(**record) for a in answers if not isinstance(a, str) for record in a]
            manifest = commit.with_files(self._state.manifest(self._facts, step, samples, data), records)
            try:
                commit.commit(run, manifest)
            except (OSError, VitgraftError) as error:
                failure = commit.why(error, temporary)
        failure = next((f for f in comm.gather(failure) if f is not None), None)
        if failure is not None:
            if comm.rank() == 0:
                with contextlib.suppress(OSError):
                    remove_tree(temporary)
            comm.barrier()
            raise _not_written(step, failure)
        self._checkpoint = open_checkpoint(commit.final_folder(run, step))
        if comm.rank() == 0:
            self._reporter.progress("commit", step, self._last_step)

    def finish(self) -> Checkpoint:
        """Return the checkpoint, which is committed already."""
        assert self._checkpoint is not None
        return self._checkpoint

    def failed(self) -> bool:
        """Return ``False``: a failure is raised by :meth:`begin`."""
        return False

    def tidy(self) -> None:
        """Delete what the policy does not keep."""
        if comm.rank() == 0 and self._checkpoint is not None:
            run = self._facts.run
            try:
                commit.check_owner(run, self._facts.attempt)
                retain(run, self._recipe, self._checkpoint.step)
            except (OSError, CheckpointError) as error:
                self._reporter.note(f"WARNING an old checkpoint could not be deleted: {error}")

    def _attempt_write(self, folder: Path) -> list[dict[str, Any]] | str:
        """Write this rank's files; return their records, or the reason of a failure, for all ranks to raise
        together."""
        try:
            records = []
            for name, tensors in _files(self._state).items():
                types = {key: _STORED[_stored_type(name, value)] for key, value in tensors.items()}
                arrays = {key: value.detach().to(types[key]).cpu().numpy() for key, value in tensors.items()}
                records.append(write_safetensors(folder / name, arrays).model_dump())
            return records
        except OSError as error:
            return commit.why(error, folder)


def _attempt_prepare(folder: Path) -> str | None:
    try:
        remove_tree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        return commit.why(error, folder)
    return None


class HandoverSaver:
    """Every rank copies its shard into memory that its host's checkpointer reads."""

    def __init__(self, state: TrainerState, facts: RunFacts, last_step: int, path: str) -> None:
        self._state, self._facts, self._last_step = state, facts, last_step
        self._sequence = 0
        self._step = 0
        self._images = {name: _image(name, tensors) for name, tensors in _files(self._state).items()}
        self._parts, size = place_files({name: image.size for name, image in self._images.items()})
        _check_memory(size)
        data = DataState(fingerprint="", seed=0, epoch=0, cursor=0)
        draft = state.manifest(facts, 0, 0, data).model_dump_json() if comm.rank() == 0 else ""
        # Quotes are escaped where the draft lies inside the control record.
        control = 2 * len(draft.encode()) + _GROWTH
        try:
            self._buffer = HandoverBuffer.create(path, control, size)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"hand-over buffer of {size / 1e9:.2f} GB: {error}; set train.roles to inline to do without it",
                cause=cause_of(error),
            ) from None
        self._places = self._lay_out()
        self._addresses: list[int] | None = None
        self._vectors: list[tuple[Tensor, Tensor]] = []

    def begin(self, step: int, samples: int, data: DataState) -> None:
        """Copy, once what was begun before is committed."""
        _agree(self._facts, step, data)
        if self._sequence:
            self._wait()
        self._copy()
        self._sequence += 1
        self._step = step
        draft = None
        if comm.rank() == 0:
            draft = self._state.manifest(self._facts, step, samples, data).model_dump_json()
        self._buffer.hand_over(
            Control(
                sequence=self._sequence,
                step=step,
                last_step=self._last_step,
                world=comm.world(),
                rank=comm.rank(),
                files=self._parts,
                manifest=draft,
            )
        )

    def finish(self) -> Checkpoint:
        """Wait for the checkpointer's answer."""
        self._wait()
        return open_checkpoint(commit.final_folder(self._facts.run, self._step))

    def failed(self) -> bool:
        """Check the checkpointer's answer, if there is one."""
        if not self._sequence:
            return False
        answer = self._buffer.answered(self._sequence - 1)
        return answer is not None and answer.error is not None

    def tidy(self) -> None:
        """Do nothing: the checkpointer deletes old files."""

    def _wait(self) -> None:
        answer = self._buffer.wait(self._sequence)
        if answer.error is not None:
            raise _not_written(answer.step, answer.error)

    def _lay_out(self) -> dict[str, dict[str, Tensor]]:
        """Write the headers, which never change, and make a tensor of every tensor's place."""
        _pin(self._buffer)
        places: dict[str, dict[str, Tensor]] = {}
        tensors = _files(self._state)
        for part in self._parts:
            image = self._images[part.path]
            self._buffer.payload[part.offset : part.offset + len(image.header)] = image.header
            places[part.path] = self._places_in(part, image, tensors[part.path])
        return places

    def _places_in(self, part: FilePart, image: Image, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # All of them views of one tensor; every tensor of a file is aligned, and every file begins with a page.
        whole = torch.frombuffer(self._buffer.mapped, dtype=torch.uint8)[self._buffer.payload_start + part.offset :]
        places: dict[str, Tensor] = {}
        for key, offset in image.offsets.items():
            dtype, shape = _STORED[_stored_type(part.path, tensors[key])], tensors[key].shape
            places[key] = whole[offset : offset + dtype.itemsize * shape.numel()].view(dtype).view(shape)
        return places

    @torch.no_grad()
    def _copy(self) -> None:
        # Large models have thousands of vectors, which do not move once the optimizer has made its states.
        if (addresses := self._state.addresses()) != self._addresses:
            self._addresses = addresses
            self._vectors = join_neighbours(self._pairs(shard_name(comm.rank()), self._state.tensors()))
        buffers = self._pairs(BUFFERS, self._state.buffers()) if comm.rank() == 0 else []
        on_device = False
        for place, source in [*self._vectors, *buffers]:
            # From a GPU all copies are queued, and waited for once; types are converted on the way.
            place.copy_(source, non_blocking=True)
            on_device |= source.is_cuda
        if on_device:
            torch.cuda.synchronize()

    def _pairs(self, file: str, tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [(place, tensors[key].detach()) for key, place in self._places[file].items()]


def join_neighbours(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Merge (destination, source) pairs of vectors that are adjacent in both memories, as one large copy is faster than
    many small ones."""
    joined: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        if joined and all(_follows(last, next_) for last, next_ in zip(joined[-1], pair, strict=True)):
            length = joined[-1][0].numel() + pair[0].numel()
            first, second = (t.as_strided((length,), (1,), t.storage_offset()) for t in joined[-1])
            joined[-1] = (first, second)
        else:
            joined.append(pair)
    return joined


def _follows(last: Tensor, next_: Tensor) -> bool:
    return bool(
        last.dim() == next_.dim() == 1
        and last.dtype == next_.dtype
        and last.is_contiguous()
        and next_.is_contiguous()
        and last.untyped_storage().data_ptr() == next_.untyped_storage().data_ptr()
        and last.storage_offset() + last.numel() == next_.storage_offset()
    )


def _image(file: str, tensors: dict[str, Tensor]) -> Image:
    return lay_out({key: (_stored_type(file, value), value.shape) for key, value in tensors.items()})


def _check_memory(size: int) -> None:
    """Refuse, on all ranks alike, buffers that do not fit into a host's memory. Collective: no rank allocates before
    all have checked.

    Raises:
        TrainingError: says how much is needed and there.
    """
    hosts = comm.gather((socket.gethostname(), size, available_memory()))
    for host in sorted({name for name, _, _ in hosts}):
        needed = sum(bytes_ for name, bytes_, _ in hosts if name == host)
        free = min(left for name, _, left in hosts if name == host)
        if needed > free:
            raise TrainingError(
                f"train.roles: separate needs {needed / 1e9:.2f} GB of memory on {host} for the checkpointer's copy of "
                f"the state, {free / 1e9:.2f} GB are available; set it to inline, or use more hosts",
                cause="host_memory",
            )


def _pin(buffer: HandoverBuffer) -> None:
    """Pin the buffer for direct copies from the GPU at the bus's speed; without it the driver copies in pieces."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return
    address = torch.frombuffer(buffer.mapped, dtype=torch.uint8).data_ptr()
    refused = int(torch.cuda.cudart().cudaHostRegister(address, len(buffer.mapped), 0))  # type: ignore[no-untyped-call]
    if refused:  # by a limit on locked memory, say: copies are slower, nothing else
        with contextlib.suppress(RuntimeError):
            # The driver keeps its last error for the next query: clear it here.
            torch.zeros(1, device="cuda").add_(1)
