"""The command line. Heavy imports happen inside the commands: ``vitgraft --help`` answers at once."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from vitgraft.configs.errors import ConfigError, VitgraftError
from vitgraft.launch import ending, stdout
from vitgraft.launch.checkpoints_cli import checkpoints
from vitgraft.launch.entry import end_of_signal
from vitgraft.launch.launch_cli import launch
from vitgraft.launch.shards_cli import shards
from vitgraft.launch.stderr import forgiving_stderr

app = typer.Typer(
    name="vitgraft",
    help="Train plain Vision Transformers with grafted adapters on detection, segmentation and video, on DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(shards, name="shards")
app.add_typer(checkpoints, name="checkpoints")
app.add_typer(launch, name="launch")

_OF_THE_NAME = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR)
"""Exceptions of a bad file name given by the user, wherever it is first opened."""

Device = Literal["auto", "cpu", "cuda"]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run directory or one of its checkpoints.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to run.")]
WeightsOption = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(
        "--weights", help="The weights' moving average or the weights themselves [default: ema where there is one]."
    ),
]


@app.command(epilog="Example: vitgraft train quickstart/detection --run-dir runs/first --set train.epochs=2")
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of a packaged one such as quickstart/detection.")
    ],
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Run directory [default: runs/NAME].")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="Ranks on this host.")] = None,
    resume: Annotated[str, typer.Option("--resume", help="auto, never, or a checkpoint of this run.")] = "auto",
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", help="Run on these hosts, from this one: lines NAME slots=N [spare=true]."),
    ] = None,
    include: Annotated[str, typer.Option("--include", help="Only these of the hostfile, e.g. node-1@node-2:0,1.")] = "",
    exclude: Annotated[str, typer.Option("--exclude", help="All of the hostfile but these.")] = "",
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="This command runs once on each of so many nodes.")
    ] = None,
    node_rank: Annotated[int | None, typer.Option("--node-rank", min=0, help="This node's number; 0 leads.")] = None,
    leader: Annotated[
        str | None, typer.Option("--leader", metavar="HOST[:PORT]", help="Where the others reach node 0.")
    ] = None,
) -> None:
    """Train a recipe. The same command goes on where a stopped or killed run was."""
    from vitgraft.configs.load import default_run, load_recipe
    from vitgraft.launch import training
    from vitgraft.launch.nodes import node_place
    from vitgraft.launch.ui import Screen

    loaded = load_recipe(recipe, overrides)
    run = run_dir or default_run(loaded)
    place = None if hostfile is not None and nodes is None else node_place(nodes, node_rank, leader, os.environ)
    options = {
        "--processes": processes,
        "--hostfile": hostfile,
        "--include": include or None,
        "--exclude": exclude or None,
        "--nodes": nodes,
        "--node-rank": node_rank,
        "--leader": leader,
    }
    given = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    changes = [word for override in overrides or [] for word in ("--set", override)]
    where = training.Where(
        processes, hostfile, include, exclude, place, ["vitgraft", "train", recipe, *given, *changes]
    )
    with Screen() as screen:
        training.train(loaded, run, screen, where, resume=resume)
        ending.decide()
    with contextlib.suppress(OSError):  # it is done, even if it cannot be reported
        typer.echo(f"done: {run}")


@app.command(epilog="Example: vitgraft status runs/first --watch")
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything that is known, as one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Draw it again and again, until Ctrl-C.")] = False,
) -> None:
    """Show how a run is: state, step, ETA, loss, speed, checkpoint, evaluation, roles and last events."""
    import json

    from vitgraft.launch import status_view
    from vitgraft.launch.status import read_status

    if watch and (as_json or not sys.stdout.isatty()):
        raise ConfigError("--watch draws on a terminal; elsewhere, or with --json, call status as often as needed")
    if watch:
        status_view.watch(run)
    elif as_json:
        typer.echo(json.dumps(read_status(run).as_json(), indent=1))
    else:
        for line in status_view.lines(read_status(run)):
            typer.echo(line)


@app.command(epilog="Example: vitgraft evaluate runs/first --data data/val --out figures.json")
def evaluate(
    target: RunOrCheckpoint,
    data: Annotated[
        str | None, typer.Option("--data", help="Packed data set [default: the recipe's data.val].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the figures and their protocol here as JSON.")
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Evaluate a checkpoint: COCO box and mask AP, mIoU, or top-1 and top-5, with the protocol of the figures."""
    from vitgraft.launch import inference
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        evaluation = inference.evaluate(target, data, out, device, screen, weights)
    from vitgraft.trainer.figures import in_words

    for name, figure in evaluation.metrics.items():
        typer.echo(f"{name:16s} {in_words(figure, 4)}")
    for key, value in evaluation.protocol.items():
        typer.echo(f"# {key}: {value}")


@app.command(epilog="Example: vitgraft predict runs/first photo.jpg clips/ --out predictions")
def predict(
    target: RunOrCheckpoint,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images or clips, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for a JSON and a picture of each input.")],
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            min=0,
            max=1,
            help="List and draw what has this score or more [default: draw 0.5 and more, list all].",
        ),
    ] = None,
    value_range: Annotated[
        str,
        typer.Option("--range", metavar="LOW,HIGH", help="Values of black and white in grey images of 16 or 32 bits."),
    ] = "",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Predict on images or clips: JSON and pictures with boxes, masks and labels.

    Files that cannot be read are listed at the end, which then exits with 3; all others are done.
    """
    from vitgraft.configs.errors import DataError
    from vitgraft.launch import inference
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        found = inference.predict(target, inputs, out, device, screen, weights, threshold, value_range)
    typer.echo(f"{found.done} prediction{'' if found.done == 1 else 's'} in {out}")
    if found.broken:
        total = found.done + len(found.broken)
        raise DataError(
            f"{len(found.broken)} of {total} inputs could not be read, as listed above; the first: {found.broken[0]}"
        )


@app.command(epilog="Example: vitgraft export runs/first --format safetensors --part backbone --out trunk.safetensors")
def export(
    target: RunOrCheckpoint,
    format: Annotated[
        Literal["safetensors", "torch-export"],
        typer.Option("--format", help="Weights alone, or the forward pass as a torch.export program."),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write: .safetensors, or .pt2.")],
    weights: WeightsOption = None,
    part: Annotated[
        Literal["model", "backbone"],
        typer.Option("--part", help="The whole model, or the trunk alone under timm's or the official names."),
    ] = "model",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write a checkpoint's model for use elsewhere, with classes, normalisation and origin in its metadata."""
    from vitgraft.launch import inference

    holds = inference.export(target, format, out, weights, part, overwrite)
    typer.echo(f"{out}: {holds}")


@app.command(epilog="Example: vitgraft doctor --hostfile hosts recipe.yaml --run-dir /shared/runs/first")
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="Also see whether this recipe and its data are the same everywhere.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option("--hostfile", help="Hosts to examine, lines NAME slots=N [default: this one].")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where the run will be written [default: runs/NAME of the recipe].")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds after which a host that does not answer is given up.")
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Before a run: see on every host what would go wrong, and what to do; exits with 2 if something would."""
    from vitgraft.launch.doctor import case_of, examine
    from vitgraft.launch.doctor_report import require_health, show
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        findings = examine(case_of(recipe, hostfile, run_dir, timeout), screen)
    show(findings, as_json=as_json)
    require_health(findings)


@app.command(epilog="Example: vitgraft demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the three runs.")] = Path("runs/demo"),
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="Only detection, semantic or video; may be given several times."),
    ] = None,
) -> None:
    """Pack, train, evaluate and draw detection, segmentation and video on the built-in digits."""
    from vitgraft.launch import demonstration

    demonstration.run(out, tasks)


def run() -> int:
    """Run a command, errors becoming one line; returns the exit code."""
    stdout.take_stdout()
    # No run ends, and no exit code changes, because what it says is not read or the disk of its log is full.
    sys.stderr = forgiving_stderr()
    code: object
    try:
        code = app(standalone_mode=False)
        if sys.argv[1:2] != ["train"]:  # which is done, even if it cannot be reported
            sys.stdout.flush()
    except BaseException as error:
        code = _answer(error)
    else:
        if ending.asked() is not None and code:
            code = end_of_signal()  # typer has caught it, and knows of one code only
    stdout.let_go()
    return code if isinstance(code, int) else 0


def _answer(error: BaseException) -> object:
    """Report in one line why a command has ended; return its exit code."""
    if ending.asked() is not None or isinstance(error, KeyboardInterrupt | typer.Abort):
        # Libraries that a signal interrupts, in the middle of an import above all, make other errors of it.
        return end_of_signal()
    if isinstance(error, VitgraftError):
        return _say(error)
    if isinstance(error, SystemExit):
        # What typer makes of a broken pipe, whichever pipe it is.
        broken = error.__context__
        return _broken_pipe(broken) if isinstance(broken, BrokenPipeError) else error.code
    if isinstance(error, BrokenPipeError):
        return _broken_pipe(error)
    if isinstance(error, stdout.Unwritable):
        return _say(ConfigError(f"standard output cannot be written: {error.strerror}; make room or write elsewhere"))
    if isinstance(error, OSError) and error.errno in _OF_THE_NAME and error.filename is not None:
        name = str(error.filename)
        shown = name if len(name) <= 200 else f"{name[:97]} … {name[-97:]}"
        return _say(ConfigError(f"{shown}: {error.strerror}; check its name and permissions"))
    return _usage_error(error)


def _say(error: VitgraftError) -> int:
    print(f"vitgraft: {error}", file=sys.stderr)
    return error.exit_code


def _broken_pipe(error: BrokenPipeError) -> int:
    """Return 0 if the reader of our output, e.g. head, has closed it; for training, the exit code of an error."""
    return 0 if stdout.has_lost_its_reader() and sys.argv[1:2] != ["train"] else _usage_error(error)


def _usage_error(error: BaseException) -> int:
    """Show typer's message on a wrong command or option; any other error is a defect."""
    # typer carries its own copy of click and does not export the base class of its usage errors.
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        return ConfigError.exit_code
    traceback.print_exception(error)
    print("vitgraft: a defect of vitgraft; please report it with the lines above", file=sys.stderr)
    return 1
