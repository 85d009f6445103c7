"""The commit: ``step-N.ATTEMPT.tmp`` → manifest of the expected files → rename → pointer.

Only the role that commits calls these; the ranks' shards are in the temporary folder by then. A successor can
take each step up again: :func:`commit` begins when all shards are there, :func:`publish` when the manifest is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from vitgraft.configs.errors import CheckpointError, ErrorCause, cause_of
from vitgraft.configs.files import open_regular, read_bytes, read_text
from vitgraft.trainer.checkpoint.files import (
    remove_file,
    remove_tree,
    rename_durably,
    sync_file,
    sync_folder,
    write_text_durably,
)
from vitgraft.trainer.checkpoint.layout import (
    MANIFEST,
    POINTER,
    FileRecord,
    Manifest,
    RankRecord,
    expected_files,
    parse_step,
    record_name,
    seal,
    step_name,
)
from vitgraft.trainer.checkpoint.manifest import read_manifest

TEMPORARY = ".tmp"
_NO_SPACE = "no space left on the disk of"
_READ_ONLY = "cannot write to the folder"
ATTEMPT = "attempt"
"""RUN/attempt: the number of the attempt that owns the run. Another one may not commit."""
MAX_ATTEMPT = 10**9
_MAX_RECORD_BYTES = 1 << 20
COMMITTED = "committed"
"""RUN/committed: the name of the first checkpoint that is known of. While it is there the run does not start afresh by
itself, even when RUN/checkpoints is lost."""


def checkpoints_folder(run: Path) -> Path:
    """Return RUN/checkpoints."""
    return run / "checkpoints"


def final_folder(run: Path, step: int) -> Path:
    """Return a step's committed checkpoint."""
    return checkpoints_folder(run) / step_name(step)


def temporary_folder(run: Path, step: int, attempt: int) -> Path:
    """Return the folder of an attempt's shards of a step before the commit. Each attempt has its own, so that a stalled
    attempt cannot touch the files of the next."""
    return checkpoints_folder(run) / f"{step_name(step)}.{attempt}{TEMPORARY}"


def sweep(run: Path) -> None:
    """Remove what a killed attempt left half-written or half-deleted."""
    folder = checkpoints_folder(run)
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.endswith(TEMPORARY):
                remove_tree(entry) if entry.is_dir() else remove_file(entry)
    for entry in run.glob(f"{COMMITTED}.*{TEMPORARY}"):
        remove_file(entry)


def why(error: BaseException, folder: Path) -> str:
    """Return one line on why a checkpoint was not written."""
    cause, text = cause_of(error), " ".join(str(error).split())
    if cause == "no_space":
        return f"{_NO_SPACE} {folder.parent}; free some and start again with the same command"
    if cause == "read_only":
        return f"{_READ_ONLY} {folder.parent} ({text}); make it writable and start again with the same command"
    return text


def cause_in(reason: str) -> ErrorCause | None:
    """Return the cause in a line of :func:`why`, as roles exchange only the line; ``None``: neither cause."""
    if reason.startswith(_READ_ONLY):
        return "read_only"
    return "no_space" if reason.startswith(_NO_SPACE) else None


def write_record(folder: Path, record: RankRecord) -> None:
    """Tell the one who commits what a rank's writer has done: whole or not at all, but good for this boot only."""
    part = folder / f"{record_name(record.rank)}.part"
    part.write_text(record.model_dump_json(), encoding="utf-8")
    os.replace(part, folder / record_name(record.rank))


def read_record(folder: Path, rank: int, *, attempt: int, step: int, world: int) -> RankRecord | None:
    """Return the record of a rank's writer; ``None``: absent, invalid, of another attempt, or files are incomplete."""
    try:
        data = read_bytes(folder / record_name(rank), _MAX_RECORD_BYTES, CheckpointError)
        record = RankRecord.model_validate_json(data)
        if (record.attempt, record.step, record.world, record.rank) != (attempt, step, world, rank):
            return None
        if any((folder / file.path).stat().st_size != file.bytes for file in record.files):
            return None
    except (OSError, ValueError, CheckpointError):
        return None
    return record


def interrupted_commit(run: Path, attempt: int, step: int) -> Manifest | None:
    """Return the manifest of a commit that was killed between manifest and rename: all files are there then."""
    with contextlib.suppress(CheckpointError, OSError):
        manifest = read_manifest(temporary_folder(run, step, attempt) / MANIFEST)
        if (manifest.attempt, manifest.step) == (attempt, step):
            return manifest
    return None


def is_committed(run: Path, attempt: int, step: int) -> bool:
    """Tell whether this attempt has committed a checkpoint of the step."""
    with contextlib.suppress(CheckpointError, OSError):
        return read_manifest(final_folder(run, step) / MANIFEST).attempt == attempt
    return False


def with_files(manifest: Manifest, records: list[FileRecord]) -> Manifest:
    """Return the draft of a manifest with the files that were written, in a fixed order."""
    return manifest.model_copy(update={"files": sorted(records, key=lambda record: record.path)})


def commit(run: Path, manifest: Manifest) -> Path:
    """Turn a step's temporary folder into a checkpoint.

    Raises:
        CheckpointError: the files that ranks reported are not the expected ones, or as in :func:`publish`.
        OSError: e.g. a full disk; nothing is committed.
    """
    temporary = temporary_folder(run, manifest.step, manifest.attempt)
    expected, written = sorted(expected_files(manifest.world)), sorted(record.path for record in manifest.files)
    if expected != written:
        raise CheckpointError(f"{temporary}: expected the files {expected}, the ranks wrote {written}")
    (temporary / MANIFEST).write_text(seal(manifest).model_dump_json(indent=1), encoding="utf-8")
    return publish(run, manifest)


def publish(run: Path, manifest: Manifest) -> Path:
    """Publish a commit with a manifest: delete the writers' records, then rename the folder.

    Raises:
        CheckpointError: a newer attempt owns the run, or there is a checkpoint of this step.
        OSError: nothing is committed, or the pointer could not be written.
    """
    temporary = temporary_folder(run, manifest.step, manifest.attempt)
    final = final_folder(run, manifest.step)
    expected = {MANIFEST, *expected_files(manifest.world)}
    for entry in sorted(temporary.iterdir()):
        if entry.name not in expected:
            remove_file(entry)
    # Here, because a predecessor may have been killed between writing the manifest and this.
    sync_file(temporary / MANIFEST)
    sync_folder(temporary)
    if final.exists():
        raise CheckpointError(f"{final}: exists already; a checkpoint is never overwritten")
    check_owner(run, manifest.attempt)
    rename_durably(temporary, final)
    point_to(final, manifest.attempt)
    return final


def check_owner(run: Path, attempt: int) -> None:
    """Refuse to commit for an attempt that does not own the run any more.

    Raises:
        CheckpointError: names both attempts.
    """
    owner = owning_attempt(run)
    if owner is not None and owner != attempt:
        raise CheckpointError(f"{run}: attempt {attempt} is stale, attempt {owner} owns the run; nothing is committed")


def owning_attempt(run: Path) -> int | None:
    """Return the attempt that owns the run; ``None`` for a run that no launcher has opened.

    Raises:
        CheckpointError: the file holds no number, so the owner of the run is unknown.
        OSError: it cannot be read.
    """
    try:
        descriptor = open_regular(run / ATTEMPT)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as stream:
        said = stream.read(100).strip()
    if not re.fullmatch(rb"[0-9]{1,9}", said):
        raise CheckpointError(
            f"{run / ATTEMPT}: {said[:20]!r} is no number of an attempt, so nobody may commit; start "
            "the same command again"
        )
    return int(said)


def point_to(final: Path, attempt: int) -> None:
    """Set the pointer to this checkpoint, unless it is set, and mark the run as one with a checkpoint.

    Raises:
        CheckpointError: a newer attempt owns the run, whose pointer then stays, or the checkpoint is gone from it.
    """
    pointer, line, run = final.parent / POINTER, final.name + "\n", final.parent.parent
    if not (run / COMMITTED).exists():
        _replace_as_owner(run / COMMITTED, final, attempt)
    with contextlib.suppress(CheckpointError):
        if read_text(pointer, 1000, CheckpointError) == line:
            return
    _replace_as_owner(pointer, final, attempt)


def _replace_as_owner(path: Path, final: Path, attempt: int) -> None:
    # Of this attempt alone, and swept by the next, like its shards: whenever this one sleeps, it does no harm.
    temporary = path.with_name(f"{path.name}.{attempt}{TEMPORARY}")
    write_text_durably(temporary, final.name + "\n")
    try:
        check_owner(final.parent.parent, attempt)
        # The run may have been moved away, and another folder with the same attempt put in its place, since the rename.
        if not final.is_dir():
            raise CheckpointError(f"{final}: is gone; the run was removed or moved while it ran")
    except CheckpointError:
        remove_file(temporary)
        raise
    rename_durably(temporary, path)


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
        shutil.move(run / name, target / Path(name).name)  # a link may have put checkpoints on another disk
    sync_folder(target)
    sync_folder(run)
    return target


def all_step_names(run: Path) -> list[str]:
    """Return the names of all checkpoint folders, valid or not, oldest first."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and parse_step(entry.name) is not None)
