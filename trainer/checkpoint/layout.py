"""Structure of a checkpoint: names, ranges and the manifest. Pure: no files, no torch.

A saved tensor is a named flat vector of float32; a shard is a safetensors file of ranges of such vectors. The key of a
range is ``KIND|PARAMETER|START``: KIND is ``master`` (the weights), ``ema`` or the name of an optimizer state, START
the index of its first element in the flattened parameter.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.hashing import sha256_of

SCHEMA = 1
MANIFEST = "manifest.json"
BUFFERS = "buffers.safetensors"
POINTER = "latest"
MASTER = "master"
EMA = "ema"

MAX_WORLD = 1 << 16

_STEP = re.compile(r"^step-([0-9]{8,18})$")
_START = re.compile(r"0|[1-9][0-9]{0,17}")

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    bytes: Count
    sha256: Sha256


class DataState(BaseModel):
    """Position of the run in its data: the same at every world size and worker count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    seed: int
    epoch: Count
    cursor: Count


class Normalisation(BaseModel):
    """Normalisation and size of the model's input images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: list[FiniteFloat]
    std: list[FiniteFloat]
    image_size: list[Count]


class RankRecord(BaseModel):
    """Files written by one rank's writer, or its error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attempt: int
    step: int
    world: int
    rank: int
    files: list[FileRecord]
    error: str | None = None


class Manifest(BaseModel):
    """The contents of ``manifest.json``: what a reader trusts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    run: Annotated[str, Field(pattern=r"^[^/\x00]*$")]
    attempt: Count
    step: Count
    samples: Count
    data: DataState
    world: Annotated[int, Field(ge=1, le=MAX_WORLD)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    recipe_hash: str
    classes: list[str]
    normalisation: Normalisation
    parameters: dict[str, list[Count]]
    """Trained parameters and their shapes."""
    kinds: list[str]
    """Vectors stored for every trained parameter: master, optimizer states, ema."""
    scalars: dict[str, FiniteFloat]
    """Scalar states of the optimizer, e.g. its step count."""
    groups: list[dict[str, Any]]
    """Hyper-parameters of each parameter group at this step, in the optimizer's order: for people. A resume takes
    them, and which parameter is in which group, from the recipe, which must have the same hash."""
    frozen: Sha256 | None
    """SHA-256 of the blob with the frozen parameters, if any."""
    ema_ramped: bool = False
    """The average's decay grows with the steps (:mod:`vitgraft.trainer.ema`); a resumed run goes on as it began."""
    code_version: str
    created: FiniteFloat
    files: list[FileRecord]
    digest: Sha256 | None = None
    """SHA-256 of everything else in the manifest (:func:`seal`); ``None`` until it is written."""


def seal(manifest: Manifest) -> Manifest:
    """Return the same manifest with the digest of its own content, so that an edited one is noticed."""
    return manifest.model_copy(update={"digest": sha256_of(manifest.model_dump(mode="json", exclude={"digest"}))})


def step_name(step: int) -> str:
    """Return the directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """Return the step of a checkpoint's directory name, or ``None`` for any other name."""
    match = _STEP.match(name)
    return int(match.group(1)) if match else None


def shard_name(rank: int) -> str:
    """Return the file name of one rank's shard."""
    return f"rank-{rank:05d}.safetensors"


def record_name(rank: int) -> str:
    """Return the file name of one rank's record for the commit, which deletes it."""
    return f"rank-{rank:05d}.written.json"


def expected_files(world: int) -> list[str]:
    """Return the files of a checkpoint of this world size: computed, never listed from a directory."""
    return [BUFFERS, *(shard_name(rank) for rank in range(world))]


def range_key(kind: str, name: str, start: int) -> str:
    """Return the safetensors key of a range."""
    return f"{kind}|{name}|{start}"


def parse_range_key(key: str) -> tuple[str, str, int]:
    """Return (kind, parameter, start) of a safetensors key.

    Raises:
        CheckpointError: the key is not of this format.
    """
    kind, _, rest = key.partition("|")
    name, _, start = rest.rpartition("|")
    if not (kind and name and _START.fullmatch(start)):
        raise CheckpointError(f"key {key!r} is not KIND|PARAMETER|START: the file was not written by vitgraft")
    return kind, name, int(start)


def even_range(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Return the part of a vector that ``rank`` writes when all ranks hold all of it."""
    size = math.ceil(numel / world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def intersections(ranges: list[tuple[int, int]], start: int, stop: int, what: str) -> list[tuple[int, int, int]]:
    """Return the pieces of the sorted ``ranges`` that cover [start, stop): (index, piece start, piece stop).

    Raises:
        CheckpointError: the ranges leave a gap.
    """
    pieces: list[tuple[int, int, int]] = []
    position = start
    for index, (low, high) in enumerate(ranges):
        if high <= position or position >= stop:
            continue
        if low > position:
            break
        end = min(high, stop)
        pieces.append((index, position, end))
        position = end
    if position < stop:
        raise CheckpointError(f"{what}: elements {position} to {stop} are missing from the shards")
    return pieces
