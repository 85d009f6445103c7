"""``vitgraft launch``: job files for cluster schedulers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

launch = typer.Typer(name="launch", help="Print files for a cluster's scheduler.", no_args_is_help=True)


@launch.callback()
def _group() -> None:
    """Print files for a cluster's scheduler."""


@launch.command(
    epilog="Example: vitgraft launch slurm quickstart/detection --nodes 2 --gpus-per-node 8 --time 12:00:00 "
    "--run-dir /shared/runs/first > job.sh"
)
def slurm(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of a packaged one such as quickstart/detection.")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the job.")],
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of each node, a rank for each.")
    ] = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option("--cpus-per-task", min=1, help="CPUs of each node, for all of its ranks [default: whole nodes]."),
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", help="Longest time of one start: minutes, H:M:S or DAYS-H:M:S.")
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Account that pays.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Run directory, seen by all nodes [default: runs/NAME].")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    signal_seconds: Annotated[
        int, typer.Option("--signal-seconds", help="Stop and checkpoint so long before the time is up.")
    ] = 120,
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", metavar="OPTION", help="Another option of sbatch, e.g. --qos=long.")
    ] = None,
) -> None:
    """Print a job file for sbatch that starts on all nodes, and queues itself again when it was stopped."""
    from vitgraft.configs.load import default_run, load_recipe
    from vitgraft.launch.slurm import SlurmJob, check_job_world, job_file

    loaded = load_recipe(recipe, overrides)
    check_job_world(loaded, nodes, gpus_per_node)
    run = run_dir or default_run(loaded)
    changes = [word for override in overrides or [] for word in ("--set", override)]
    # By its path: the nodes need no activated environment.
    beside = Path(sys.executable).with_name("vitgraft")
    job = SlurmJob(
        name=f"vitgraft-{loaded.name}",
        folder=str(Path.cwd()),
        nodes=nodes,
        train=[str(beside) if beside.is_file() else "vitgraft", "train", recipe, "--run-dir", str(run), *changes],
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        signal_seconds=signal_seconds,
        sbatch=sbatch or [],
    )
    typer.echo(job_file(job), nl=False)
