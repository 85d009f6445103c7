"""``vitgraft checkpoints prune``: apply the run's retention on demand."""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.recipe import METRICS
from vitgraft.launch.inspection import Progress, damaged, scan_run
from vitgraft.launch.run_dir import open_lock
from vitgraft.trainer.checkpoint.layout import MANIFEST, parse_step, step_name
from vitgraft.trainer.checkpoint.manifest import read_manifest
from vitgraft.trainer.checkpoint.read import Checkpoint
from vitgraft.trainer.checkpoint.retention import Policy, delete, figures_of, plan, spared_for_evaluation

_BLOB = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Wanted:
    """Retention given on the command line, instead of the recipe's."""

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: str | None = None


def prune(run: Path, wanted: Wanted, *, dry_run: bool = False, progress: Progress | None = None) -> Iterator[str]:
    """Delete the checkpoints that the policy does not keep, and the blobs that none of the others names; one line each.

    Every hash is checked first: an invalid checkpoint is neither counted nor deleted. Those that await their
    evaluation are kept, and those that are being read.

    Raises:
        ConfigError: an attempt owns the run, or a metric that its task does not have.
        CheckpointError: no such run, no checkpoints, or no recipe beside them.
    """
    found = scan_run(run)
    config = run / "config.yaml"
    if not config.is_file():
        raise CheckpointError(f"{config}: missing; it says what the run keeps")
    recipe = load_recipe(str(config))
    policy = _policy(recipe, wanted)
    with contextlib.nullcontext() if dry_run else _owned(run):
        problems = dict(damaged(found, progress))
        for path, problem in problems.items():
            yield f"{path.name}  left, INVALID  {problem}"
        valid = {c.step: c for path, c in found if isinstance(c, Checkpoint) and path not in problems}
        figures = figures_of(run, valid)
        spared = spared_for_evaluation(run, recipe, valid, figures)
        doomed = plan(valid, policy, figures, spared)
        gone = {step_name(step) for step in doomed} if dry_run else set(_delete(run, doomed))
        verb = "would be deleted" if dry_run else "deleted"
        for step in sorted(valid):
            name = step_name(step)
            if name in gone:
                yield f"{name}  {verb}  {sum(record.bytes for record in valid[step].manifest.files) / 1e6:.1f} MB"
            elif step in doomed:
                yield f"{name}  left, somebody reads it"
            elif step in plan(valid, policy, figures):
                yield f"{name}  left, it awaits its evaluation"
        for blob in _unreferenced(run, gone):
            try:
                size = blob.stat().st_size
                if not dry_run:
                    blob.unlink()
            except OSError as error:
                raise _undeleted(run, error) from None
            yield f"blobs/{blob.name[:12]}…  {verb}  {size / 1e6:.1f} MB"


def _delete(run: Path, steps: list[int]) -> list[str]:
    try:
        return delete(run, steps)
    except OSError as error:
        raise _undeleted(run, error) from None


def _undeleted(run: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{error.filename or run}: cannot be deleted: {error.strerror}; make it writable and prune again, which goes on"
    )


def _policy(recipe: Recipe, wanted: Wanted) -> Policy:
    known = METRICS[recipe.task]
    if wanted.keep_best is not None and wanted.keep_best not in known:
        raise ConfigError(f"--keep-best {wanted.keep_best}: no metric of {recipe.task}; use one of {', '.join(known)}")
    own = Policy.of(recipe)
    return Policy(
        own.keep_last if wanted.keep_last is None else wanted.keep_last,
        own.keep_every if wanted.keep_every is None else wanted.keep_every,
        own.keep_best if wanted.keep_best is None else wanted.keep_best,
    )


@contextlib.contextmanager
def _owned(run: Path) -> Iterator[None]:
    """Hold the run's lock, as an attempt does, so that none starts meanwhile."""
    try:
        lock = open_lock(run)
    except OSError as error:
        raise ConfigError(f"{run}: cannot be written: {error.strerror}; make it writable") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read(200).strip()
            raise ConfigError(
                f"{run}: owned by a running attempt ({owner}), which prunes after each commit; wait for its end"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{run}: cannot be locked: {error.strerror}; prune it where its file system has locks"
            ) from None
        yield


def _unreferenced(run: Path, gone: set[str]) -> list[Path]:
    """Return blobs referenced only by ``gone`` checkpoints; none while a manifest is missing or unreadable.

    Those set aside count: they may be put back.
    """
    named = set()
    for folder in [*run.glob("checkpoints/step-*"), *run.glob("set-aside-*/step-*")]:
        if parse_step(folder.name) is None or (folder.name in gone and folder.parent.name == "checkpoints"):
            continue
        try:
            named.add(read_manifest(folder / MANIFEST).frozen)
        except CheckpointError:
            return []
    return sorted(path for path in run.glob("blobs/*") if _BLOB.match(path.name) and path.name not in named)
