"""Hashes that never change between processes, versions or machines.

Python's ``hash`` is salted and numpy may change its streams between versions; order, augmentation and model randomness
must not, so all of them start from these functions.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vitgraft.configs.files import open_regular


def canonical_json(value: Any) -> str:
    """Return JSON text with sorted keys and no spaces: the same value always gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_of(value: Any) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def seed_of(*parts: str | int) -> int:
    """Return a 63-bit seed from the parts: the only source of randomness in vitgraft."""
    digest = hashlib.sha256(canonical_json(list(parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sha256_file(path: Path, chunk: int = 1 << 20) -> str:
    """Return the SHA-256 (hex) of a regular file's bytes.

    Raises:
        OSError: it cannot be read, or is a fifo or device, which might never end.
    """
    descriptor = open_regular(path)
    try:
        return sha256_descriptor(descriptor, chunk)
    finally:
        os.close(descriptor)


def sha256_descriptor(descriptor: int, chunk: int = 1 << 20) -> str:
    """Return the SHA-256 (hex) of all bytes of an open file; its position does not change."""
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(descriptor, chunk, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()
