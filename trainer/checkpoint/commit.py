"""The commit: ``step-N.tmp`` → manifest of the expected files → rename → pointer; then retention.

Only the rank that commits calls these; the ranks' shards are in the temporary folder by then (see save.py).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from vitgraft.configs.errors import CheckpointError
from vitgraft.trainer.checkpoint.files import replace_text, sync_folder, write_text_durably
from vitgraft.trainer.checkpoint.layout import MANIFEST, POINTER, Manifest, expected_files, parse_step, step_name
from vitgraft.trainer.checkpoint.read import complete_checkpoints

TEMPORARY = ".tmp"


def checkpoints_folder(run: Path) -> Path:
    """RUN/checkpoints."""
    return run / "checkpoints"


def temporary_folder(run: Path, step: int) -> Path:
    """Where the shards of a step are written before the commit."""
    return checkpoints_folder(run) / (step_name(step) + TEMPORARY)


def sweep(run: Path) -> None:
    """Remove what a killed attempt left half-written or half-deleted."""
    folder = checkpoints_folder(run)
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.endswith(TEMPORARY):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def commit(run: Path, manifest: Manifest) -> Path:
    """Turn a step's temporary folder into a checkpoint.

    Raises:
        CheckpointError: the files that ranks reported are not the expected ones.
        OSError: e.g. a full disk; nothing is committed.
    """
    temporary = temporary_folder(run, manifest.step)
    final = temporary.with_name(step_name(manifest.step))
    expected, written = sorted(expected_files(manifest.world)), sorted(record.path for record in manifest.files)
    if expected != written:
        raise CheckpointError(f"{temporary}: expected the files {expected}, the ranks wrote {written}")
    write_text_durably(temporary / MANIFEST, manifest.model_dump_json(indent=1))
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)
    replace_text(final.parent / POINTER, final.name + "\n")
    return final


def retain(run: Path, keep_last: int, spare: set[str] | None = None) -> list[str]:
    """Delete all but the newest ``keep_last`` complete checkpoints; returns the names of the deleted ones.

    One that somebody reads (it holds a shared lock on the manifest) or that ``spare`` names stays.
    """
    deleted = []
    for checkpoint in complete_checkpoints(run)[:-keep_last]:
        if checkpoint.path.name in (spare or set()):
            continue
        with (checkpoint.path / MANIFEST).open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            doomed = checkpoint.path.with_name(checkpoint.path.name + ".deleted" + TEMPORARY)
            os.rename(checkpoint.path, doomed)
        shutil.rmtree(doomed)
        deleted.append(checkpoint.path.name)
    return deleted


def set_aside(run: Path, names: list[str], reason: str) -> Path:
    """Move files and folders of a run, named from the run directory, out of the way without deleting them.

    Returns the folder that they lie in.
    """
    number = 1
    while (target := run / f"set-aside-{number}").exists():
        number += 1
    target.mkdir(parents=True)
    write_text_durably(target / "reason.txt", reason + "\n")
    for name in names:
        os.rename(run / name, target / Path(name).name)
    sync_folder(target)
    sync_folder(run)
    return target


def all_step_names(run: Path) -> list[str]:
    """Names of all checkpoint folders, valid or not, oldest first."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and parse_step(entry.name) is not None)
