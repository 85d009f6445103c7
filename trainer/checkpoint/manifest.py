"""Reading ``manifest.json``: bounded, typed, and checked against its own digest."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path

from pydantic import ValidationError

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.files import parse_json, read_bytes
from vitgraft.configs.hashing import sha256_of
from vitgraft.trainer.checkpoint.layout import MANIFEST, SCHEMA, Manifest

MAX_MANIFEST_BYTES = 64 << 20


def read_manifest(file: Path) -> Manifest:
    """Return the manifest in a file, checked against its own digest.

    Raises:
        CheckpointError: missing, larger than any manifest, of another schema, edited, or not a manifest.
    """
    if not os.path.lexists(file):
        raise CheckpointError(f"{file.parent}: no {MANIFEST}, so this is not a committed checkpoint")
    tree = parse_json(read_bytes(file, MAX_MANIFEST_BYTES, CheckpointError), str(file), CheckpointError)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: not a manifest: expected an object, found {type(tree).__name__}")
    version = tree.get("schema_version")
    if type(version) is not int or version != SCHEMA:
        raise CheckpointError(
            f"{file}: schema {reprlib.repr(version)}, this vitgraft reads {SCHEMA}; use a matching one"
        )
    try:
        digest = sha256_of({key: value for key, value in tree.items() if key != "digest"})
    except RecursionError:
        raise CheckpointError(f"{file}: not a manifest: nested too deeply") from None
    if tree.get("digest") != digest:
        raise CheckpointError(f"{file}: was edited or damaged: its content does not have the digest it states")
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise CheckpointError(f"{file}: not a manifest: {first['msg']} at {where}") from None
