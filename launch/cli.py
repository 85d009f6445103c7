"""The command line. Heavy imports happen inside the commands: ``vitgraft --help`` answers at once."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from vitgraft.configs.errors import ConfigError, InterruptedRun, VitgraftError
from vitgraft.launch.shards_cli import shards

app = typer.Typer(
    name="vitgraft",
    help="Train plain Vision Transformers with grafted adapters on detection, segmentation and video, on DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
checkpoints = typer.Typer(help="List and verify the checkpoints of a run.", no_args_is_help=True)
app.add_typer(shards, name="shards")
app.add_typer(checkpoints, name="checkpoints")

Device = Literal["auto", "cpu", "cuda"]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run directory or one of its checkpoints.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to run.")]


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
) -> None:
    """Train a recipe. The same command goes on where a stopped or killed run was."""
    from vitgraft.configs.load import load_recipe
    from vitgraft.launch import training
    from vitgraft.launch.ui import Screen

    loaded = load_recipe(recipe, overrides)
    run = run_dir or Path("runs") / loaded.name
    with Screen() as screen:
        training.train(loaded, run, screen, processes=processes, resume=resume)
    typer.echo(f"done: {run}")


@app.command(epilog="Example: vitgraft evaluate runs/first --data data/val --out figures.json")
def evaluate(
    target: RunOrCheckpoint,
    data: Annotated[
        str | None, typer.Option("--data", help="Packed data set [default: the recipe's data.val].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the figures and their protocol here as JSON.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Evaluate a checkpoint: COCO box and mask AP, mIoU, or top-1 and top-5."""
    from vitgraft.launch import inference
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        figures = inference.evaluate(target, data, out, device, screen)
    for name, value in figures.items():
        typer.echo(f"{name:16s} {value:.4f}")


@app.command(epilog="Example: vitgraft predict runs/first photo.jpg clips/ --out predictions")
def predict(
    target: RunOrCheckpoint,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images or clips, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for a JSON and a picture of each input.")],
    device: DeviceOption = "auto",
) -> None:
    """Predict on images or clips: JSON and pictures with boxes, masks and labels."""
    from vitgraft.launch import inference
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        count = inference.predict(target, inputs, out, device, screen)
    typer.echo(f"{count} predictions in {out}")


@checkpoints.command("list", epilog="Example: vitgraft checkpoints list runs/first")
def list_checkpoints(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """List checkpoints with step, size, age and whether their files are complete."""
    from vitgraft.launch import inspection

    for line in inspection.list_lines(run):
        typer.echo(line)


@checkpoints.command("verify", epilog="Example: vitgraft checkpoints verify runs/first")
def verify_checkpoints(target: RunOrCheckpoint) -> None:
    """Hash every file of every checkpoint; exits with 4 when one is damaged."""
    from vitgraft.launch import inspection

    for line in inspection.verify_lines(target):
        typer.echo(line)


@app.command(epilog="Example: vitgraft demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the three runs.")] = Path("runs/demo"),
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Only this task (repeatable).")] = None,
) -> None:
    """Pack, train, evaluate and draw detection, segmentation and video on the built-in digits."""
    from vitgraft.launch import demonstration

    demonstration.run(out, tasks)


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except VitgraftError as error:
        print(f"vitgraft: {error}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("vitgraft: interrupted", file=sys.stderr)
        code = InterruptedRun.exit_code
    except BrokenPipeError:
        code = 0  # the reader of our output, e.g. head, has seen enough
    except Exception as error:
        code = _usage_error(error)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: Exception) -> int:
    """Show a wrong command or option the way typer words it; anything else is a defect."""
    # typer carries its own copy of click and does not export the base class of its usage errors.
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        return ConfigError.exit_code
    traceback.print_exception(error)
    print("vitgraft: a defect of vitgraft; please report it with the lines above", file=sys.stderr)
    return 1
