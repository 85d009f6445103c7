"""Sources of a recipe's ``data.*.path``: a folder, a URL, or ``digits:KIND/SPLIT`` packed on first use."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import cast

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.files import home_path, lock_holder, lock_within, open_regular
from vitgraft.configs.schema.data import CacheConfig
from vitgraft.data_shards.cache import FileCache
from vitgraft.data_shards.manifest import Kind, read_manifest
from vitgraft.data_shards.pack.writer import Progress
from vitgraft.data_shards.remote import is_url

SCHEME = "digits:"
WAIT_SECONDS, TELL_SECONDS = 600.0, 30.0
"""Time to wait for another process that packs built-in data, and time after which the wait is reported."""
_log = logging.getLogger("vitgraft")


def cache_folder() -> Path:
    """Return the folder of built-in data: ``$VITGRAFT_CACHE``, else ``~/.cache/vitgraft``.

    Raises:
        ConfigError: no variable, and the user has no home folder.
    """
    given = os.environ.get("VITGRAFT_CACHE")
    if given:
        return Path(given)
    home = home_path("~")
    if not home.is_absolute():  # as in a container whose user has no entry
        raise ConfigError("this user has no home folder, in which built-in data would be kept; set VITGRAFT_CACHE")
    return home / ".cache" / "vitgraft"


def resolve_source(path: str) -> Path | str:
    """Return the folder of a recipe's path (``~`` expanded); a URL is returned unchanged, as ``str``."""
    if is_url(path):
        return path
    return ensure_digits(path) if path.startswith(SCHEME) else home_path(path)


def open_cache(config: CacheConfig) -> FileCache:
    """Return the cache of a recipe's ``data.cache``."""
    folder = cache_folder() / "shards" if config.folder is None else home_path(config.folder)
    return FileCache(folder, config.max_bytes)


def ensure_digits(uri: str, progress: Progress | None = None) -> Path:
    """Return the folder of ``digits:KIND/SPLIT``, packed if it is not there yet; safe in many processes at once.

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
    lock = folder.with_suffix(".lock")
    try:
        folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = open_regular(lock, os.O_RDWR | os.O_CREAT, 0o644, follow=False)
    except OSError as error:
        raise DataError(f"{lock}: cannot be written: {error.strerror}; set VITGRAFT_CACHE") from None
    try:
        # Released when the file is closed, also by the kernel when its holder is killed.
        if not lock_within(descriptor, TELL_SECONDS):
            _log.warning("%s: waiting for %s, which packs it", folder, lock_holder(descriptor))
            if not lock_within(descriptor, WAIT_SECONDS):
                holder = lock_holder(descriptor)
                raise DataError(f"{lock}: locked by {holder} for {WAIT_SECONDS:.0f} s; end it, or set VITGRAFT_CACHE")
        if _is_strange(folder.parent):
            raise DataError(
                f"{folder.parent}: not this user's own, or writable by all; chmod o-w or set VITGRAFT_CACHE"
            )
        try:
            if folder.exists() and _is_strange(folder):
                raise DataError("packed anew")
            read_manifest(folder)
        except DataError:
            pack_digits(cast(Kind, kind), cast(Split, split), folder, overwrite=True, progress=progress)
    finally:
        os.close(descriptor)
    return folder


def _is_strange(folder: Path) -> bool:
    """Tell whether another user may have written to a folder. Groups are trusted, as a umask may grant them access."""
    facts = folder.stat()
    return facts.st_uid not in (0, os.geteuid()) or bool(facts.st_mode & stat.S_IWOTH)
