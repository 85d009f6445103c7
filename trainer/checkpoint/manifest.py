"""Reading ``manifest.json``: bounded, typed, and checked against its own digest."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from vitgraft.configs.errors import CheckpointError
from vitgraft.configs.hashing import sha256_of
from vitgraft.trainer.checkpoint.layout import MANIFEST, SCHEMA, Manifest

MAX_MANIFEST_BYTES = 64 << 20


def read_manifest(file: Path) -> Manifest:
    """The manifest in a file, checked against its own digest.

    Raises:
        CheckpointError: missing, larger than any manifest, of another schema, edited, or not a manifest.
    """
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: no {MANIFEST}, so this is not a committed checkpoint")
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes")
        tree = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
        if not isinstance(tree, dict):
            raise ValueError(f"expected an object, found {type(tree).__name__}")
        version = tree.get("schema_version")
        if version != SCHEMA:
            raise CheckpointError(f"{file}: schema {version!r}, this vitgraft reads {SCHEMA}; use a matching one")
        digest = sha256_of({key: value for key, value in tree.items() if key != "digest"})
        if tree.get("digest") != digest:
            raise CheckpointError(f"{file}: was edited or damaged: its content does not have the digest it states")
        return Manifest.model_validate(tree)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise CheckpointError(f"{file}: not a manifest: {first['msg']} at {where}") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested beyond reason
        raise CheckpointError(f"{file}: not a manifest: {str(error)[:200]}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
