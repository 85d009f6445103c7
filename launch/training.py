"""``vitgraft train``: recipe in, run directory out."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.errors import CheckpointError, ConfigError, DataError, VitgraftError
from vitgraft.configs.files import home_path
from vitgraft.configs.schema import Recipe
from vitgraft.configs.worlds import check_world
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.mixture import check_mixture
from vitgraft.data_shards.sources import resolve_source
from vitgraft.launch import deepspeed_launch
from vitgraft.launch.backends import Backend, HereBackend, HostfileBackend
from vitgraft.launch.devices import place
from vitgraft.launch.hosts import Host, choose_slots, read_hostfile, ssh_arguments
from vitgraft.launch.node_backend import NodeBackend, follow, name_of
from vitgraft.launch.nodes import NodePlace
from vitgraft.launch.normalisation import with_normalisation
from vitgraft.launch.run_dir import RunHandle, open_run, record_failed_start
from vitgraft.launch.stopping import stopping_at_once
from vitgraft.launch.supervisor import Supervisor
from vitgraft.launch.ui import Screen
from vitgraft.models.weight_names import check_file
from vitgraft.trainer.checkpoint.commit import all_step_names
from vitgraft.trainer.checkpoint.layout import MANIFEST
from vitgraft.trainer.checkpoint.read import complete_checkpoints
from vitgraft.trainer.deepspeed_config import render


@dataclass(frozen=True)
class Where:
    """On which hosts a run is to be. ``processes``: ranks on this host. ``include`` and ``exclude`` choose slots of the
    hostfile. ``place``: this node's, where one command runs on each. ``command``: how training was asked for, without
    the run directory, for messages."""

    processes: int | None = None
    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    place: NodePlace | None = None
    command: Sequence[str] | None = None


def train(recipe: Recipe, run: Path, screen: Screen, where: Where | None = None, *, resume: str = "auto") -> None:
    """Train to the end of the recipe, or go on where the run stopped.

    Raises:
        VitgraftError: one line and an exit code; no process is left.
    """
    where = where or Where()
    if where.place is not None and not where.place.leads:
        follow(where.place, run, screen)
        return
    try:
        with stopping_at_once():
            open_backend = _backend(recipe, where, screen)
            classes = check_data(recipe, screen)
            check_model(recipe, classes)
            check_copy(recipe)
            recipe = with_normalisation(recipe, run, resume, screen.note)
            if resume == "never" or not all_step_names(run):
                check_start(recipe)
            handle = open_run(run, recipe, resume, where.command)
    except VitgraftError as error:
        if where.place is not None:
            # Nodes that wait for this one read there that it will not lead.
            record_failed_start(run, error)
        raise
    screen.keep(handle.path / "logs" / f"supervisor.{os.uname().nodename}.log")
    try:
        try:
            backend = open_backend(handle)
        except VitgraftError as error:
            handle.event("end", code=error.exit_code, reason=str(error))
            raise
        Supervisor(handle, recipe, backend, screen, os.getcwd()).run()
    except Exception as error:
        known = isinstance(error, VitgraftError)
        screen.record(str(error) if known else "".join(traceback.format_exception(error)))
        raise
    finally:
        handle.close()


def _backend(recipe: Recipe, where: Where, screen: Screen) -> Callable[[RunHandle], Backend]:
    """Check everything about the hosts that can fail before a process starts, and return the backend's factory.

    Raises:
        ConfigError: hosts that are not there, or worlds that cannot carry the batch.
    """
    if where.hostfile is not None:
        if where.processes is not None or where.place is not None:
            raise ConfigError("--hostfile: its slots say how many ranks run where; leave --processes and --nodes out")
        hosts = read_hostfile(where.hostfile)
        slots = choose_slots(hosts, where.include, where.exclude)
        unwanted = [] if not where.exclude else [part.partition(":")[0] for part in where.exclude.split("@")]
        spares = {
            host.name: tuple(range(host.slots))
            for host in hosts
            if host.spare and host.name not in slots and host.name not in unwanted
        }
        chosen = [
            Host(host.name, len((slots | spares)[host.name]), host.spare and host.name not in slots)
            for host in hosts
            if host.name in slots | spares
        ]
        _check_evaluator(recipe, [host.name for host in chosen], f"of {where.hostfile} that are used")
        world = sum(host.slots for host in chosen if not host.spare)
        check_world(recipe.train.global_batch, recipe.train.accumulation, world)
        render(recipe, world)
        ssh_args = ssh_arguments(recipe.launch.ssh_args, os.environ)
        pdsh = shutil.which("pdsh") is not None
        if pdsh:
            deepspeed_launch.check_folder(Path.cwd())

        def over_ssh(handle: RunHandle) -> Backend:
            if not pdsh:
                handle.notes.append("pdsh is not installed here: the ranks start over plain ssh")
            return HostfileBackend(chosen, slots | spares, ssh_args, pdsh, handle.path / "logs")

        return over_ssh
    if where.include or where.exclude:
        raise ConfigError("--include and --exclude choose among the hosts of a --hostfile; name one")
    here = os.uname().nodename
    names = [here] if where.place is None else [name_of(node) for node in range(where.place.nodes)]
    _check_evaluator(recipe, names, "of this run")
    placement = place(recipe, where.processes)
    if where.place is not None:
        node, world = where.place, where.place.nodes * placement.processes
        check_world(recipe.train.global_batch, recipe.train.accumulation, world)
        render(recipe, world)
        return lambda handle: NodeBackend(node, placement.processes, handle.path, handle.lock.fileno(), screen.note)
    render(recipe, placement.processes)
    return lambda handle: HereBackend(here, placement.processes, handle.lock.fileno(), handle.path / "logs")


def _check_evaluator(recipe: Recipe, hosts: Sequence[str], which: str) -> None:
    if recipe.evaluator is not None and recipe.evaluator.host not in (None, *hosts):
        raise ConfigError(
            f"evaluator.host: {recipe.evaluator.host} is not among the hosts {which} ({', '.join(hosts)}); name one "
            "of them, or null"
        )


def check_copy(recipe: Recipe) -> None:
    """Check that checkpoints can be copied to the kind of store that the recipe names.

    Raises:
        ConfigError: an unknown scheme, or its client library is missing.
    """
    if recipe.train.checkpoint.copy_to is not None:
        from vitgraft.trainer.checkpoint.store_copy import check_store

        check_store(recipe.train.checkpoint.copy_to)


def check_start(recipe: Recipe) -> None:
    """Check that ``train.init_from`` has a checkpoint; its hashes are checked when it is read.

    Raises:
        CheckpointError: ``train.init_from`` names neither a checkpoint nor a run that has one.
    """
    if recipe.train.init_from is None:
        return
    path = home_path(recipe.train.init_from)
    if not (path / MANIFEST).is_file() and not complete_checkpoints(path):
        raise CheckpointError(f"train.init_from: {path}: neither a checkpoint nor a run that has one; name another")


def check_model(recipe: Recipe, classes: int) -> None:
    """Check the model by building it on the meta device where the recipe alone is not enough, before a process starts.

    Raises:
        ConfigError: an unknown timm name, a rule that matches no parameter, a file of weights that is not there.
        CheckpointError: a file that holds no weights.
    """
    backbone = recipe.model.backbone
    for key, weights in ("model.backbone.weights", backbone.weights), ("model.weights", recipe.model.weights):
        if weights is not None and weights != "timm":
            check_file(weights, key)
    if getattr(backbone, "timm", None) is None and not recipe.train.param_groups:
        return
    # Importing torch takes seconds, so it is left to the ranks where the recipe alone tells enough.
    import torch

    from vitgraft.models.build import build_model
    from vitgraft.trainer.param_groups import check_rules

    size = recipe.data.image_size
    with torch.device("meta"):
        model = build_model(recipe.model.without_weights(), num_classes=classes, image_size=(size[0], size[1]))
    check_rules(recipe.train, [name for name, _ in model.named_parameters()])


def check_data(recipe: Recipe, screen: Screen) -> int:
    """Check everything about the data that can fail before a process starts; return the number of classes.

    Raises:
        DataError, ConfigError: one line.
    """
    sources = recipe.data.train
    paths = [(key, path) for key, path in recipe.data.paths().items() if key != "data.val.path"]
    manifests = [_manifest(recipe, path, key, screen) for key, path in paths]
    train, path = manifests[0], sources[0].path
    check_mixture([source.path for source in sources], manifests, [source.visits for source in sources])
    wanted = recipe.model.head.num_classes
    if wanted is not None and wanted != len(train.classes):
        raise ConfigError(
            f"model.head.num_classes: {wanted}, but {path} has {len(train.classes)} classes; "
            "remove the key to use those of the data"
        )
    if recipe.data.val is None:
        return len(train.classes)
    val = _manifest(recipe, recipe.data.val.path, "data.val.path", screen)
    if val.classes != train.classes:
        raise DataError(
            f"data.val.path: {recipe.data.val.path} has other classes than {path} "
            f"({len(val.classes)} and {len(train.classes)}); pack it again with --classes {path}"
        )
    return len(train.classes)


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
