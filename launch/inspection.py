"""Results of ``vitgraft checkpoints list`` and ``verify``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import CheckpointError, ConfigError, DataError
from vitgraft.configs.files import read_text
from vitgraft.configs.schema.recipe import METRICS
from vitgraft.trainer.checkpoint.layout import MANIFEST, POINTER, parse_step
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint, scan, verify
from vitgraft.trainer.checkpoint.retention import best_step, figures_of

Progress = Callable[[int, int], None]
SHOWN = ("box_AP", "mask_AP", "mIoU", "top1")
"""The figures that fit on a line; ``--json`` has all."""


@dataclass
class Listed:
    """One checkpoint of a run. ``state``: complete (the files are there), valid (their hashes are right) or invalid."""

    name: str
    step: int
    state: str
    problem: str | None = None
    bytes: int = 0
    created: float = 0.0
    samples: int = 0
    world: int = 0
    zero_stage: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    latest: bool = False
    best: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(self.__dict__)

    def as_line(self) -> str:
        """Return one line of text."""
        if self.problem is not None:
            return f"{self.name}  INVALID  {self.problem}"
        figures = "  ".join(f"{name} {self.metrics[name]:.3f}" for name in SHOWN if name in self.metrics)
        marks = " ".join(name for name, marked in (("latest", self.latest), ("best", self.best)) if marked)
        age = _age(time.time() - self.created)
        line = (
            f"{self.name}  {self.state:8s}  {self.samples:>10,} samples  {self.bytes / 1e6:9.1f} MB  {age:>7s} old  "
            f"world {self.world}  ZeRO-{self.zero_stage}  {figures}  {marks}"
        )
        return line.rstrip()


def list_checkpoints(run: Path, *, hashes: bool = False, progress: Progress | None = None) -> list[Listed]:
    """Return every checkpoint of a run, oldest first.

    Args:
        hashes: check them, not only that the files are there.

    Raises:
        CheckpointError: no such run, or it has none.
    """
    found = scan_run(run)
    good = [checkpoint for _, checkpoint in found if isinstance(checkpoint, Checkpoint)]
    figures = figures_of(run, [checkpoint.step for checkpoint in good])
    best = _best(run, figures)
    latest = _pointed_to(run)
    problems = dict(damaged(found, progress)) if hashes else {}
    listed = []
    for path, checkpoint in found:
        step = parse_step(path.name) or 0
        if isinstance(checkpoint, CheckpointError):
            listed.append(Listed(path.name, step, "invalid", str(checkpoint), latest=path.name == latest))
            continue
        manifest, problem = checkpoint.manifest, problems.get(path)
        state = "invalid" if problem else "valid" if hashes else "complete"
        listed.append(
            Listed(
                name=path.name,
                step=step,
                state=state,
                problem=problem,
                bytes=sum(record.bytes for record in manifest.files),
                created=manifest.created,
                samples=manifest.samples,
                world=manifest.world,
                zero_stage=manifest.zero_stage,
                metrics=figures.get(step, {}),
                latest=path.name == latest,
                best=step == best,
            )
        )
    return listed


def verify_lines(target: Path, progress: Progress | None = None) -> Iterator[str]:
    """Yield one line for each checkpoint as its hashes are checked.

    Raises:
        CheckpointError: at the end, when one is damaged.
    """
    if (target / MANIFEST).is_file():
        verify(open_checkpoint(target), progress)
        yield f"{target.name}  valid"
        return
    found = scan_run(target)
    problems = dict(damaged(found, progress))
    for path, _ in found:
        yield f"{path.name}  INVALID  {problems[path]}" if path in problems else f"{path.name}  valid"
    if problems:
        names = ", ".join(path.name for path in problems)
        raise CheckpointError(f"{target}: damaged: {names}; training goes on from the newest valid one")


def damaged(
    found: list[tuple[Path, Checkpoint | CheckpointError]], progress: Progress | None = None
) -> Iterator[tuple[Path, str]]:
    """Yield the checkpoints whose files differ from their manifests, and why; ``progress`` in bytes over all."""
    good = [checkpoint for _, checkpoint in found if isinstance(checkpoint, Checkpoint)]
    total = sum(record.bytes for checkpoint in good for record in checkpoint.manifest.files)
    before, trusted = 0, set[Path]()
    for path, checkpoint in found:
        if isinstance(checkpoint, CheckpointError):
            yield path, str(checkpoint)
            continue
        try:
            verify(checkpoint, trusted=trusted)
        except CheckpointError as error:
            yield path, str(error)
        before += sum(record.bytes for record in checkpoint.manifest.files)
        if progress is not None:
            progress(before, total)


def scan_run(run: Path) -> list[tuple[Path, Checkpoint | CheckpointError]]:
    """Return every checkpoint folder of a run, opened or with what is wrong with it.

    Raises:
        CheckpointError: no such run, or it has none.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run directory")
    found = scan(run)
    if not found:
        raise CheckpointError(f"{run}: no checkpoints yet")
    return found


def _best(run: Path, figures: dict[int, dict[str, float]]) -> int | None:
    """Return the best by the recipe's ``keep_best``, else by its task's first figure that was evaluated."""
    from vitgraft.configs.load import load_recipe

    config = run / "config.yaml"
    if not figures or not config.is_file():
        return None
    try:
        recipe = load_recipe(str(config))
    except ConfigError:  # the checkpoints are there all the same
        return None
    wanted = recipe.train.checkpoint.keep_best
    names = [wanted] if wanted is not None else list(METRICS[recipe.task])
    metric = next((name for name in names if any(name in found for found in figures.values())), None)
    return None if metric is None else best_step(list(figures), figures, metric)


def _pointed_to(run: Path) -> str | None:
    try:
        return read_text(run / "checkpoints" / POINTER, 1000).strip()
    except DataError:
        return None


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
