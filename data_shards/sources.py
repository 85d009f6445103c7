"""Where a recipe's ``data.*.path`` points: a folder, a URL, or ``digits:KIND/SPLIT`` packed on first use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import cast

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema.data import CacheConfig
from vitgraft.data_shards.cache import FileCache
from vitgraft.data_shards.manifest import Kind, read_manifest
from vitgraft.data_shards.pack.writer import Progress
from vitgraft.data_shards.remote import is_url

SCHEME = "digits:"


def cache_folder() -> Path:
    """Where built-in data is kept: ``$VITGRAFT_CACHE``, else ``~/.cache/vitgraft``."""
    given = os.environ.get("VITGRAFT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "vitgraft"


def resolve_source(path: str) -> Path | str:
    """The folder that a recipe's path means (``~`` expanded); a URL comes back as it is, as ``str``."""
    if is_url(path):
        return path
    return ensure_digits(path) if path.startswith(SCHEME) else Path(path).expanduser()


def open_cache(config: CacheConfig) -> FileCache:
    """The cache that a recipe's ``data.cache`` means."""
    folder = cache_folder() / "shards" if config.folder is None else Path(config.folder).expanduser()
    return FileCache(folder, config.max_bytes)


def ensure_digits(uri: str, progress: Progress | None = None) -> Path:
    """The folder of ``digits:KIND/SPLIT``, packed if it is not there yet; safe in many processes at once.

    Raises:
        ConfigError: unknown KIND or SPLIT (lists the valid ones), or scikit-learn is missing.
        DataError: the cache folder cannot be written.
    """
    # Imports torch, which takes seconds; the launcher asks for sources too.
    from vitgraft.data_shards.pack.digits import DEFAULT_SAMPLES, VERSION, Split, pack_digits

    kind, _, split = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or (kind, split) not in DEFAULT_SAMPLES:
        valid = ", ".join(f"{SCHEME}{k}/{s}" for k, s in DEFAULT_SAMPLES)
        raise ConfigError(f"{uri}: no such built-in data set; valid ones: {valid}")
    folder = cache_folder() / f"digits-v{VERSION}" / f"{kind}-{split}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_suffix(".lock"), "w")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise DataError(f"{folder.parent}: cannot be written: {error.strerror}; set VITGRAFT_CACHE") from None
    with lock:
        # Released when the file is closed, also by the kernel when its holder is killed.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            read_manifest(folder)
        except DataError:
            pack_digits(cast(Kind, kind), cast(Split, split), folder, overwrite=True, progress=progress)
    return folder
