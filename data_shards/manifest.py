"""Packed data set: a folder of tar shards, their indices, and one manifest that a reader trusts.

DIR/manifest.json       written last: its presence means that packing finished
DIR/shard-000000.tar    samples one after the other, the members of a sample next to each other
DIR/shard-000000.idx    little-endian uint64: byte offset of each sample, then the end of the last (n + 1 numbers)

DIR may be a URL. Tars that others wrote stay as and where they are (foreign.py writes their indices and the manifest).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import read_bytes
from vitgraft.configs.hashing import canonical_json
from vitgraft.configs.schema.section import Section, StoredSize
from vitgraft.data_shards.remote import is_url, join, read_small, shown
from vitgraft.data_shards.shards import SHARD_NAME as SHARD_NAME
from vitgraft.data_shards.shards import Sha256, Shards, index_name
from vitgraft.data_shards.shards import Shard as Shard

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
IGNORE = 255
"""Label of pixels that count neither in the loss nor in the metrics."""

Kind = Literal["detection", "semantic", "video", "image"]
CLASSED: tuple[Kind, ...] = ("video", "image")
"""Kinds whose samples have one class each."""


class Foreign(Section):
    """Settings for reading foreign tars.

    ``members``: the name that a member is read by, by its name in the tar (what follows the key); others are passed
    over. ``root``: folder or URL of the tars; ``None``: the manifest's.
    """

    members: dict[str, str]
    root: str | None = None


class Manifest(Section):
    """The content of a packed data set.

    ``classes``: names, by class id. ``category_ids``: detection only: the ids that the classes had in the COCO file.
    ``source``: how it was packed (for people; it does not decide the fingerprint).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    kind: Kind
    classes: list[str]
    category_ids: list[int] | None = None
    samples: StoredSize
    shards: Shards
    source: dict[str, Any] = Field(default_factory=dict)
    fingerprint: Sha256
    foreign: Foreign | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        total = sum(self.shards.samples.tolist())
        if total != self.samples:
            raise ValueError(f"samples is {self.samples}, but the shards hold {total}")
        if self.category_ids is not None and len(self.category_ids) != len(self.classes):
            raise ValueError(f"{len(self.category_ids)} category_ids for {len(self.classes)} classes")
        if len(set(self.shards.names)) != len(self.shards):
            raise ValueError("a shard is listed twice")
        if bool(((self.shards.index_sizes > 0) != (self.foreign is not None)).any()):
            raise ValueError("index_size belongs to the shards of foreign tars, and to all of them")
        expected = fingerprint_of(self.kind, self.classes, self.category_ids, self.shards, self.foreign)
        if self.fingerprint != expected:
            raise ValueError("fingerprint does not fit the content: the manifest was edited")
        return self

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in order: what :class:`~vitgraft.data_shards.plan.EpochPlan` needs."""
        sizes: list[int] = self.shards.samples.tolist()
        return sizes

    def tars(self, folder: Path | str) -> Path | str:
        """Return the folder (or URL, a ``str``) of the tars of a data set whose manifest is in ``folder``."""
        if self.foreign is None or self.foreign.root is None:
            return folder
        return self.foreign.root if is_url(self.foreign.root) else Path(self.foreign.root)


def fingerprint_of(
    kind: Kind,
    classes: list[str],
    category_ids: list[int] | None,
    shards: Shards,
    foreign: Foreign | None = None,
) -> str:
    """Return the SHA-256 (hex) over everything that decides what a training run reads."""
    tree: dict[str, Any] = {"kind": kind, "classes": classes, "category_ids": category_ids}
    if foreign is not None:
        # Here the labels are in the index.
        tree["foreign"] = [foreign.members, list(shards.index_hashes())]
    # Canonical JSON of {..., "shards": [[name, samples, sha256], ...]}, whose last key that is; names need no escapes.
    rows = zip(shards.names, shards.samples.tolist(), shards.hashes(), strict=True)
    content = ",".join([f'["{name}",{samples},"{digest}"]' for name, samples, digest in rows])
    text = f'{canonical_json(tree)[:-1]},"shards":[{content}]}}'
    return sha256(text.encode()).hexdigest()


def make_manifest(
    kind: Kind,
    classes: list[str],
    category_ids: list[int] | None,
    shards: Iterable[Shard],
    source: dict[str, Any],
    foreign: Foreign | None = None,
) -> Manifest:
    """Return the manifest of these shards, with totals and fingerprint filled in."""
    columns = Shards(shards)
    return Manifest(
        kind=kind,
        classes=classes,
        category_ids=category_ids,
        samples=sum(columns.samples.tolist()),
        shards=columns,
        source=source,
        fingerprint=fingerprint_of(kind, classes, category_ids, columns, foreign),
        foreign=foreign,
    )


def dump_manifest(manifest: Manifest) -> str:
    """Return the manifest as JSON text."""
    tree = manifest.model_dump(mode="json", by_alias=True)
    if manifest.foreign is None:
        # Our own shards are described as ever.
        del tree["foreign"]
    return json.dumps(tree, indent=1) + "\n"


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read manifest JSON.

    Raises:
        DataError: not JSON, another schema, unknown or inconsistent content; names ``where``.
    """
    match = re.match(rb'\s*\{\s*"schema"\s*:\s*(\d+)', text)
    # As text: Python refuses to read numbers of thousands of digits.
    if match and match.group(1).lstrip(b"0") != str(SCHEMA).encode():
        raise DataError(
            f"{where}: manifest schema {match.group(1)[:20].decode()}, expected {SCHEMA}; "
            "read it with the vitgraft version that wrote it, or pack again"
        )
    try:
        # The keys of 10^5 shards are five strings.
        tree = from_json(text, cache_strings="keys")
    except ValueError as error:
        raise DataError(f"{where}: manifest: Invalid JSON: {error}; pack the data set again") from None
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "manifest"
        reason = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{where}: {key}: {reason}; pack the data set again") from None


def read_manifest(folder: Path | str) -> Manifest:
    """Read a data set's manifest and check that every file it names is there in full (sizes, not hashes).

    Files behind a URL are checked when they are fetched.

    Args:
        folder: a folder, or a URL as ``str``.

    Raises:
        DataError: the folder or manifest is missing or damaged, or a shard or index is missing or has another size.
        ConfigError: a URL whose scheme is not supported here.
    """
    if isinstance(folder, str) and is_url(folder):
        return _read_remote(folder)
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; pack a data set with: vitgraft shards pack FORMAT --out DIR")
    if not os.path.lexists(path):
        raise DataError(
            f"{folder}: no {MANIFEST}, so this is not a packed data set, or packing was interrupted; pack it again"
        )
    manifest = parse_manifest(read_bytes(path, MAX_MANIFEST_BYTES), str(path))
    _check_samples(manifest, str(path))
    shards, tars = manifest.shards, manifest.tars(folder)
    indices = dict(zip(map(index_name, shards.names), shards.index_bytes.tolist(), strict=True))
    sizes = dict(zip(shards.names, shards.bytes.tolist(), strict=True))
    if tars == folder:
        _check_sizes(folder, sizes | indices)
    else:
        if isinstance(tars, Path):
            _check_sizes(tars, sizes)
        _check_sizes(folder, indices)
    return manifest


def _read_remote(url: str) -> Manifest:
    where = join(url, MANIFEST)
    try:
        text = read_small(where, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{shown(url)}: no {MANIFEST}, so this is not a packed data set, or its upload was interrupted; upload the "
            "folder that vitgraft shards pack wrote"
        ) from None
    manifest = parse_manifest(text, shown(where))
    _check_samples(manifest, shown(where))
    if not is_url(manifest.tars(url)):
        raise DataError(f"{shown(where)}: names tars on another machine; index them again where they are now")
    return manifest


def _check_samples(manifest: Manifest, where: str) -> None:
    """Raise DataError where a shard has more samples than its bytes can hold: plans of as many would be made."""
    if bool((manifest.shards.samples > manifest.shards.bytes // BLOCKSIZE).any()):
        raise DataError(f"{where}: shards: more samples than bytes can hold; pack the data set again")


def _check_sizes(folder: Path, expected: dict[str, int]) -> None:
    """Compare sizes by one walk over the folder: on network file systems a question for each file takes minutes."""
    found: dict[str, int] = {}
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By descriptor, so that the kernel need not find the folder again for each file.
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = entry.name
                    if name in expected:
                        try:
                            found[name] = entry.stat().st_size
                        except FileNotFoundError:
                            # A link to nowhere.
                            continue
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        found.clear()
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be read: {error.strerror}; check its permissions"
        ) from None
    if found == expected:
        return
    name = next(name for name, size in expected.items() if found.get(name) != size)
    if name not in found:
        raise DataError(f"{folder / name}: missing, though {MANIFEST} lists it; copy it again or pack again")
    raise DataError(
        f"{folder / name}: {found[name]} bytes, expected {expected[name]} (truncated or changed); copy it again or "
        "pack again, then check with: vitgraft shards verify DIR"
    )
