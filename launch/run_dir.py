"""Run directory before and between attempts: ownership, configuration, checkpoint to resume from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vitgraft.configs.errors import CheckpointError, ConfigError, TrainingError, VitgraftError, cause_of
from vitgraft.configs.files import open_regular
from vitgraft.configs.load import dump_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.run_recipe import CONFIG, check_recipe, is_another, is_bound
from vitgraft.trainer.checkpoint.commit import (
    ATTEMPT,
    COMMITTED,
    MAX_ATTEMPT,
    all_step_names,
    owning_attempt,
    set_aside,
    sweep,
)
from vitgraft.trainer.checkpoint.files import make_folders, replace_text
from vitgraft.trainer.checkpoint.layout import POINTER, parse_step, step_name
from vitgraft.trainer.checkpoint.read import Checkpoint, complete_checkpoints, newest_valid, resolve_checkpoint
from vitgraft.trainer.monitor_files import drop_torn_line, read_rows
from vitgraft.trainer.non_finite import LEFT_OUT, NON_FINITE

LOCK = "lock"
LOCK_PATIENCE_S = 20.0
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# What says that the run has a past goes last.
_OF_THE_OLD_START = ("metrics.jsonl", "results", "ledger", "tensorboard", COMMITTED)
# What names entries by their place in an order, which another recipe changes.
_OF_THE_OLD_ORDER = ("skipped.jsonl", NON_FINITE, LEFT_OUT)


@dataclass
class RunHandle:
    """This attempt's ownership of a run. ``lock`` stays open, and is inherited by the ranks: while one of them runs, no
    other attempt owns the run."""

    path: Path
    attempt: int
    resume: Checkpoint | None
    lock: IO[str]
    notes: list[str]

    def event(self, name: str, **facts: Any) -> None:
        """Append to RUN/events.jsonl."""
        row = {"time": time.time(), "event": name, "attempt": self.attempt, **facts}
        if self.is_lost():
            return  # it would be written into another run
        # On a full disk the run's own error matters more than its record.
        with contextlib.suppress(OSError), (self.path / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def is_lost(self) -> bool:
        """Tell whether the directory was removed, or replaced by another run, since this attempt locked it."""
        try:
            return not os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.path / LOCK))
        except FileNotFoundError:
            return not self.path.is_dir()
        except OSError:
            return False  # storage that fails tells nothing

    def check_place(self) -> None:
        """Check that the run's directory was not moved or replaced.

        Raises:
            ConfigError: it is not; what lies there now is left alone.
        """
        if self.is_lost():
            raise ConfigError(
                f"{self.path}: the run was removed or moved while it ran, or another has taken its place; nothing more "
                "is written there; start it again where it is now"
            )

    def claim(self) -> None:
        """Make this the attempt that owns the run: what an earlier one has left may not commit any more."""
        self.attempt = max(self.attempt + 1, _next_attempt(self.path))
        replace_text(self.path / ATTEMPT, f"{self.attempt}\n")

    def next_attempt(self) -> None:
        """Begin another attempt of the same command, from the newest valid checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but no valid one.
            ConfigError: another supervisor has taken the run, or the folder is gone.
            TrainingError: the disk is full, or may not be written any more.
        """
        self.notes = []
        self.check_place()
        try:
            owner = _owner(self.path)
            if owner not in (None, self.attempt):  # locks do not reach across hosts everywhere
                raise ConfigError(
                    f"{self.path}: another supervisor owns the run now (attempt {owner}; this one's was "
                    f"{self.attempt}); leave the run to it, and start the command on one host only"
                )
            self.claim()  # first: from here on no other attempt commits
            sweep(self.path)
            self.resume = _where_to_go_on(self.path, "auto", self.notes)
        except OSError as error:
            cause = cause_of(error)
            if cause in ("no_space", "read_only"):
                raise TrainingError(
                    f"{self.path}: cannot be written for another attempt: {error.strerror}; make "
                    f"{'room' if cause == 'no_space' else 'it writable'} and start the same command",
                    cause=cause,
                ) from None
            raise _unwritable(self.path, error) from None

    def close(self) -> None:
        """Release the run."""
        self.lock.close()


def open_run(path: Path, recipe: Recipe, resume: str, command: Sequence[str] | None = None) -> RunHandle:
    """Lock the run directory, check the recipe against it and find the checkpoint to resume from.

    Args:
        resume: ``auto`` (the newest valid checkpoint, else the start), ``never`` (the start; old ones are set aside) or
            the path of a checkpoint of this run.
        command: how training was asked for, without the run directory: for messages.

    Raises:
        ConfigError: another process owns the run, the recipe is another one, or the folder cannot be used.
        CheckpointError: there are checkpoints, or were, but no valid one.
    """
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:  # recipes, manifests and events are UTF-8, and name it
        raise ConfigError(f"--run-dir {os.fsencode(path)!r}: the path is not UTF-8; choose another folder") from None
    try:
        make_folders(path)
        lock = _own(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        note = check_recipe(path, recipe, resume, command) if resume != "never" and is_bound(path) else None
        handle = RunHandle(path, 0, None, lock, [])
        # Before anything is looked at: ranks of a killed attempt may live on hosts that this lock does not reach, and
        # what they committed behind our back would be in the way of this attempt's checkpoints.
        handle.claim()
        sweep(path)
        another = is_another(path, recipe)
        if note is not None:
            handle.notes.append(note)
        handle.resume = _where_to_go_on(path, resume, handle.notes)
        if handle.resume is None and another:
            _forget_another(path, handle.notes)
        for folder in ("logs", "results", "checkpoints"):
            (path / folder).mkdir(exist_ok=True)
        replace_text(path / CONFIG, dump_recipe(recipe))
        return handle
    except BaseException as error:
        lock.close()
        if isinstance(error, OSError):
            raise _unwritable(path, error) from None
        raise


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"--run-dir {path}: cannot be written: {error.strerror or error}; make room or choose another folder"
    )


def open_lock(path: Path) -> IO[str]:
    """Open RUN/lock, which is made where it is not there.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = open_regular(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    return open(descriptor, "a+", encoding="utf-8", errors="replace")


def _own(path: Path) -> IO[str]:
    """Take the exclusive lock; ranks of a killed attempt may hold it briefly until they end."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        lock = open_lock(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path / LOCK)):
                break
            lock.close()  # the run was removed meanwhile, and created again by another start
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                owner = lock.read(200).strip()
                lock.close()
                raise ConfigError(f"{path}: owned by a running attempt ({owner}); wait for it or end it") from None
            lock.close()
            time.sleep(0.1)
        except OSError as error:
            lock.close()
            if error.errno not in NO_LOCKS:
                raise
            raise ConfigError(
                f"--run-dir {path}: its file system has no locks ({error.strerror}), which keep two commands off one "
                "run; mount it with them (Lustre: flock; NFS: without nolock, its lock service running), or choose "
                "another folder"
            ) from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
    lock.flush()
    return lock


def _where_to_go_on(path: Path, resume: str, notes: list[str]) -> Checkpoint | None:
    names = all_step_names(path)
    pointer = path / "checkpoints" / POINTER
    if resume == "never":
        old = [f"checkpoints/{name}" for name in names]
        old += [name for name in _OF_THE_OLD_START if (path / name).exists()]
        pointer.unlink(missing_ok=True)
        if old:
            folder = set_aside(path, old, "train --resume never")
            notes.append(f"starting afresh; {len(names)} checkpoints, metrics and results moved to {folder}")
        return None
    if resume != "auto":
        chosen = resolve_checkpoint(Path(resume))
        if chosen.run.resolve() != path.resolve():
            raise CheckpointError(f"--resume {resume}: a checkpoint of another run ({chosen.run}); name one of {path}")
        # A restart looks nowhere else, and would go on from an older one.
        if chosen.path.name not in names or chosen.path.parent.resolve() != pointer.parent.resolve():
            raise CheckpointError(
                f"--resume {resume}: not among the run's checkpoints; move it back to "
                f"{pointer.parent / step_name(chosen.step)} and name that"
            )
        _remember(path, chosen)
        return _set_later_aside(path, names, chosen, f"train --resume {resume}", notes)
    found, invalid = newest_valid(path)
    if found is None:
        if names or pointer.exists() or (path / COMMITTED).exists():
            why = invalid[0][1] if invalid else f"those in {pointer.parent} are gone"
            raise CheckpointError(
                f"{path}: no valid checkpoint is left ({why}); restore one, or --resume never to start afresh"
            )
        return None
    for bad, reason in invalid:
        notes.append(f"WARNING {bad.name} is invalid: {reason}; going on from {found.path.name}")
    _remember(path, found)
    return _set_later_aside(path, names, found, "invalid, found when resuming", notes)


def _forget_another(path: Path, notes: list[str]) -> None:
    """Move aside the files that a start with another recipe has left."""
    left = [name for name in (*_OF_THE_OLD_START, *_OF_THE_OLD_ORDER) if (path / name).exists()]
    left = [name for name in left if name != "results" or any((path / name).iterdir())]
    if left:
        folder = set_aside(path, left, "of a start with another recipe")
        notes.append(f"the recipe is another than at the last start; what that one left is moved to {folder}")


def _remember(path: Path, found: Checkpoint) -> None:
    """Mark the run as one with a checkpoint, where its commit did not: in a copy, or by an earlier version."""
    if not (path / COMMITTED).exists():
        replace_text(path / COMMITTED, found.path.name + "\n")


def _set_later_aside(path: Path, names: list[str], chosen: Checkpoint, reason: str, notes: list[str]) -> Checkpoint:
    """Move later checkpoints away, and their results, which do not apply to the checkpoints to be written under these
    names."""
    later = [name for name in names if name > chosen.path.name]
    results = [f"results/{file.name}" for file in sorted(path.glob("results/step-*.*")) if _step(file) > chosen.step]
    if later or results:
        folder = set_aside(path, [*(f"checkpoints/{name}" for name in later), *results], reason)
        notes.append(f"{', '.join(later or results)} moved to {folder}")
    if later:
        replace_text(path / "checkpoints" / POINTER, chosen.path.name + "\n")
    return chosen


def _step(result: Path) -> int:
    return parse_step(result.stem) or 0


def _owner(path: Path) -> int | None:
    """Return the attempt that owns the run; ``None``: none, or a damaged file."""
    try:
        return owning_attempt(path)
    except CheckpointError:
        return None


def _next_attempt(path: Path) -> int:
    """Return the largest attempt number in the run's files plus one; each file may be incomplete after a full disk."""
    known = [_owner(path) or 0]
    events = path / "events.jsonl"
    drop_torn_line(events)
    rows = read_rows(events)
    known.append(sum(row.get("event") == "start" for row in rows))
    known += [number for row in rows if type(number := row.get("attempt")) is int and 0 < number < MAX_ATTEMPT]
    known += [checkpoint.manifest.attempt for checkpoint in complete_checkpoints(path)]
    return 1 + max(number for number in known if number < MAX_ATTEMPT)


def record_failed_start(path: Path, error: VitgraftError) -> None:
    """Record in the run's events why a command did not start it, unless another process owns it."""
    # Where nothing can be written there is no reader either.
    with contextlib.suppress(OSError):
        make_folders(path)
        with open_lock(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handle = RunHandle(path, _owner(path) or 0, None, lock, [])
            handle.event("end", code=error.exit_code, reason=str(error))
