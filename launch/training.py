"""``vitgraft train`` on one host: recipe in, run directory out."""

from __future__ import annotations

from pathlib import Path

from vitgraft.configs.errors import ConfigError, DataError, VitgraftError
from vitgraft.configs.schema import Recipe
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.sources import resolve_source
from vitgraft.launch.devices import place
from vitgraft.launch.local import Gang, free_port
from vitgraft.launch.run_dir import open_run
from vitgraft.launch.ui import Screen


def train(recipe: Recipe, run: Path, screen: Screen, *, processes: int | None = None, resume: str = "auto") -> None:
    """Train to the end of the recipe, or go on where the run stopped.

    Raises:
        VitgraftError: one line and an exit code; no process is left.
    """
    placement = place(recipe, processes)
    check_data(recipe, screen)
    port = free_port(recipe.launch.port)
    handle = open_run(run, recipe, resume)
    try:
        for note in handle.notes:
            screen.note(note)
        start = f"from {handle.resume.path.name}" if handle.resume is not None else "from the start"
        screen.note(
            f"attempt {handle.attempt} {start}: {placement.processes} ranks on {placement.device}, "
            f"{placement.threads} threads each, in {run}"
        )
        facts = {"resume": handle.resume.step if handle.resume else None, "world": placement.processes}
        handle.event("start", **facts, device=placement.device, threads=placement.threads, notes=handle.notes)
        try:
            Gang(handle, placement, screen).run(port)
        except VitgraftError as error:
            handle.event("end", code=error.exit_code, reason=str(error))
            raise
        handle.event("end", code=0, reason="done")
    finally:
        handle.close()


def check_data(recipe: Recipe, screen: Screen) -> None:
    """Everything about the data that can be wrong before a process starts.

    Raises:
        DataError, ConfigError: one line.
    """
    train = _manifest(recipe, recipe.data.train.path, "data.train.path", screen)
    wanted = recipe.model.head.num_classes
    if wanted is not None and wanted != len(train.classes):
        raise ConfigError(
            f"model.head.num_classes: {wanted}, but {recipe.data.train.path} has {len(train.classes)} classes; "
            "remove the key to use those of the data"
        )
    if recipe.data.val is None:
        return
    val = _manifest(recipe, recipe.data.val.path, "data.val.path", screen)
    if val.classes != train.classes:
        raise DataError(
            f"data.val.path: {recipe.data.val.path} has other classes than {recipe.data.train.path} "
            f"({len(val.classes)} and {len(train.classes)}); pack both with the same class list"
        )


def _manifest(recipe: Recipe, path: str, key: str, screen: Screen) -> Manifest:
    if path.startswith("digits:"):
        screen.note(f"built-in data: {path} (made on first use)")
    manifest = read_manifest(resolve_source(path))
    if manifest.kind != recipe.task:
        raise ConfigError(
            f"{key}: {path} holds {manifest.kind} samples, head {recipe.model.head.name} needs {recipe.task}"
        )
    if manifest.samples == 0:
        raise DataError(f"{key}: {path} holds no samples; pack some")
    return manifest
