"""A copy of committed checkpoints in any store that fsspec knows, made beside the run and never in its way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.data_shards.remote import ATTEMPTS, FIRST_DELAY, LONGEST_DELAY, file_system, join, shown
from vitgraft.trainer.checkpoint.layout import MANIFEST, POINTER
from vitgraft.trainer.checkpoint.read import Checkpoint, blob_path, open_checkpoint

_LOOK_S = 0.1


class StoreCopy:
    """Copies one checkpoint after another in a thread of its own; of several that wait only the newest.

    The store then holds what a run directory holds: config.yaml, blobs, and checkpoints/step-N with its manifest last.
    Nothing is ever deleted there.

    Args:
        run: the run directory. url: the folder in the store.
        warn: told in one line when a checkpoint was not copied.
        first_delay: seconds before the second attempt, doubled each time.
    """

    def __init__(self, run: Path, url: str, warn: Callable[[str], None], first_delay: float = FIRST_DELAY) -> None:
        self._run, self._url, self._warn, self._first_delay = run, url, warn, first_delay
        self._changed = threading.Condition()
        self._next: Path | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="store-copy", daemon=True)
        self._thread.start()

    def offer(self, checkpoint: Path) -> None:
        """Copy this one next; one that waits is dropped for it."""
        with self._changed:
            self._next = checkpoint
            self._changed.notify()

    def close(self, drop: threading.Event | None = None) -> None:
        """Finish what was offered, however long it takes, and end.

        Args:
            drop: once it is set nothing is waited for: a copy without its manifest is none, and the next start offers
                the newest checkpoint again.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        while self._thread.is_alive() and not (drop is not None and drop.is_set()):
            self._thread.join(_LOOK_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closing)
                if self._next is None:
                    return
                path, self._next = self._next, None
            try:
                checkpoint = open_checkpoint(path)
                # The lock keeps retention away until the copy is whole.
                with checkpoint.reading():
                    self._copy_with_patience(checkpoint)
            except CheckpointError:
                continue  # gone already: a newer one is on its way
            except Exception as error:  # the thread must live to copy the next one
                self._failed(path, error)

    def _copy_with_patience(self, checkpoint: Checkpoint) -> None:
        failure, delay = Exception(), self._first_delay
        for attempt in range(ATTEMPTS):
            try:
                copy_checkpoint(checkpoint, self._url)
                return
            # Client libraries raise what they like; whatever it is, training goes on.
            except Exception as error:
                failure = error
            with self._changed:
                if attempt + 1 < ATTEMPTS and self._changed.wait_for(lambda: self._next is not None, delay):
                    break
            delay = min(LONGEST_DELAY, 2 * delay)
        self._failed(checkpoint.path, failure)

    def _failed(self, path: Path, error: Exception) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self._warn(
            f"WARNING {path.name} was not copied to {shown(self._url)} ({reason}); training goes on, "
            "and the next checkpoint is tried again"
        )


def check_store(url: str) -> None:
    """See that the store's kind is supported here, before a run starts.

    Raises:
        ConfigError: it is not, or its client library is missing.
    """
    try:
        file_system(url)
    except ConfigError as error:
        raise ConfigError(f"train.checkpoint.copy_to: {error}") from None


def copy_checkpoint(checkpoint: Checkpoint, url: str) -> None:
    """Copy one checkpoint: blobs first, then its files, the manifest last, then the pointer.

    Raises:
        Exception: whatever the store's client raises; a copy without its manifest is none.
    """
    run, name = checkpoint.run, checkpoint.path.name
    system, _ = file_system(url)

    def place(relative: str) -> str:
        return str(file_system(join(url, relative))[1])

    manifest, content = place(f"checkpoints/{name}/{MANIFEST}"), (checkpoint.path / MANIFEST).read_bytes()
    files = {place(f"checkpoints/{name}/{r.path}"): checkpoint.path / r.path for r in checkpoint.manifest.files}
    blobs = {}
    if checkpoint.manifest.frozen is not None:
        blob = blob_path(run, checkpoint.manifest.frozen)
        blobs = {place(f"blobs/{blob.name}"): blob}

    def there(target: str, source: Path) -> bool:
        return _size(system, target) == source.stat().st_size

    if system.exists(manifest):
        if system.cat_file(manifest) == content and all(there(*pair) for pair in (blobs | files).items()):
            return
        system.rm_file(manifest)  # of an earlier attempt, or of files that were lost since: they are replaced now
    if (run / "config.yaml").is_file():
        _put(system, run / "config.yaml", place("config.yaml"))
    for target, source in blobs.items():
        if not there(target, source):
            _put(system, source, target)
    for target, source in files.items():
        _put(system, source, target)
    system.pipe_file(manifest, content)
    system.pipe_file(place(f"checkpoints/{POINTER}"), f"{name}\n".encode())


def _put(system: Any, source: Path, target: str) -> None:
    system.makedirs(target.rpartition("/")[0], exist_ok=True)
    system.put_file(str(source), target)
    stored, size = _size(system, target), source.stat().st_size
    if stored != size:
        raise OSError(f"{target}: {stored} bytes were stored, {size} sent")


def _size(system: Any, path: str) -> int | None:
    # What an object store listed before is not what it holds now.
    system.invalidate_cache()
    try:
        size = system.info(path)["size"]
    except FileNotFoundError:
        return None
    return int(size) if size is not None else None
