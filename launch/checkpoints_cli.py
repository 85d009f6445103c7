"""``vitgraft checkpoints``: look at a run's checkpoints, verify them, delete some. Heavy imports wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

checkpoints = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@checkpoints.command("list", epilog="Example: vitgraft checkpoints list runs/first --verify")
def list_checkpoints(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """List checkpoints: step, validity, samples, size, age, world, figures, and which is the latest and the best."""
    from vitgraft.launch import inspection
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        listed = inspection.list_checkpoints(run, hashes=verify, progress=screen.callback("bytes hashed"))
    if as_json:
        typer.echo(json.dumps([checkpoint.as_json() for checkpoint in listed], indent=1))
        return
    for checkpoint in listed:
        typer.echo(checkpoint.as_line())


@checkpoints.command("verify", epilog="Example: vitgraft checkpoints verify runs/first/checkpoints/step-00000120")
def verify_checkpoints(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run directory or one of its checkpoints.")
    ],
) -> None:
    """Hash every file of every checkpoint; exits with 4 when one is damaged."""
    from vitgraft.launch import inspection
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        for line in inspection.verify_lines(target, screen.callback("bytes hashed")):
            typer.echo(line)


@checkpoints.command("prune", epilog="Example: vitgraft checkpoints prune runs/first --keep-last 1 --dry-run")
def prune_checkpoints(
    run: Run,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, help="How many of the newest stay.")] = None,
    keep_every: Annotated[int | None, typer.Option("--keep-every", min=1, help="Steps that it divides stay.")] = None,
    keep_best: Annotated[
        str | None, typer.Option("--keep-best", metavar="METRIC", help="The best by this figure stays, e.g. mIoU.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
) -> None:
    """Delete checkpoints that the recipe's policy does not keep, and blobs that no other names.

    Each option replaces one key of the recipe (train.checkpoint). Invalid checkpoints are neither counted nor deleted.
    """
    from vitgraft.launch import pruning
    from vitgraft.launch.ui import Screen

    wanted = pruning.Wanted(keep_last, keep_every, keep_best)
    with Screen() as screen:
        said = False
        for line in pruning.prune(run, wanted, dry_run=dry_run, progress=screen.callback("bytes hashed")):
            typer.echo(line)
            said = True
        if not said:
            screen.note("nothing to delete: the policy keeps every checkpoint")
