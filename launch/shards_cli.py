"""``vitgraft shards``: pack, verify and inspect data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

shards = typer.Typer(help="Pack, verify and inspect data sets as WebDataset shards.", no_args_is_help=True)
pack = typer.Typer(help="Pack a labelled data set into shards with a manifest.", no_args_is_help=True)
shards.add_typer(pack, name="pack")

Out = Annotated[Path, typer.Option("--out", help="Folder of the packed data set; made new.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is already in --out.")]
PerShard = Annotated[int, typer.Option("--samples-per-shard", min=1, help="Samples in one tar file.")]


@pack.command(epilog="Example: vitgraft shards pack coco --images photos --annotations boxes.json --out data/train")
def coco(
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.")],
    annotations: Annotated[Path, typer.Option("--annotations", help="COCO instances JSON.")],
    out: Out,
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
) -> None:
    """Pack a COCO-format data set: boxes, polygons, RLE, crowds."""
    from vitgraft.data_shards.pack.coco import pack_coco
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_coco(
            images,
            annotations,
            out,
            overwrite=overwrite,
            samples_per_shard=samples_per_shard,
            progress=screen.callback("pack"),
        )
    _say(manifest.samples, len(manifest.classes), out)


@pack.command(
    epilog="Example: vitgraft shards pack semantic --images img --labels png --classes names.txt --out data/train"
)
def semantic(
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.")],
    labels: Annotated[Path, typer.Option("--labels", help="Folder of label PNGs with the images' stems.")],
    classes: Annotated[str, typer.Option("--classes", help="File with one class name per line, or names with commas.")],
    out: Out,
    ignore: Annotated[int, typer.Option("--ignore", help="Label id that does not count, besides 255.")] = 255,
    reduce_zero: Annotated[
        bool, typer.Option("--reduce-zero", help="0 does not count and the other ids fall by one.")
    ] = False,
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
) -> None:
    """Pack images with label PNGs (grey or palette, 8 or 16 bit)."""
    from vitgraft.data_shards.pack.semantic import pack_semantic
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_semantic(
            images,
            labels,
            out,
            _class_names(classes),
            ignore=ignore,
            reduce_zero=reduce_zero,
            overwrite=overwrite,
            samples_per_shard=samples_per_shard,
            progress=screen.callback("pack"),
        )
    _say(manifest.samples, len(manifest.classes), out)


@pack.command(epilog="Example: vitgraft shards pack video --list train.csv --root videos --out data/train")
def video(
    list_file: Annotated[Path, typer.Option("--list", help="Lines of PATH LABEL, parted by a space or a comma.")],
    out: Out,
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder that the paths start from [default: the list's].")
    ] = None,
    classes: Annotated[str | None, typer.Option("--classes", help="Class names: a file or names with commas.")] = None,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option("--on-error", help="What an undecodable clip does.")
    ] = "raise",
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
) -> None:
    """Pack video clips with one label each (mp4, avi, mkv, webm, mov)."""
    from vitgraft.data_shards.pack.video import pack_video
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_video(
            list_file,
            out,
            root=root,
            classes=None if classes is None else _class_names(classes),
            on_error=on_error,
            overwrite=overwrite,
            samples_per_shard=samples_per_shard,
            progress=screen.callback("pack"),
        )
    _say(manifest.samples, len(manifest.classes), out)


@pack.command(epilog="Example: vitgraft shards pack digits --task detection --split train --out data/digits")
def digits(
    out: Out,
    task: Annotated[
        Literal["detection", "semantic", "video"], typer.Option("--task", help="Kind of samples.")
    ] = "detection",
    split: Annotated[Literal["train", "val"], typer.Option("--split", help="The splits share no scan.")] = "train",
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="How many.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides every pixel.")] = 0,
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
) -> None:
    """Compose scenes and clips from the real handwritten digit scans that ship with scikit-learn."""
    from vitgraft.data_shards.pack.digits import pack_digits
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_digits(
            task,
            split,
            out,
            samples=samples,
            seed=seed,
            overwrite=overwrite,
            samples_per_shard=samples_per_shard,
            progress=screen.callback("pack"),
        )
    _say(manifest.samples, len(manifest.classes), out)


@shards.command("verify", epilog="Example: vitgraft shards verify data/train")
def verify_shards(folder: Annotated[Path, typer.Argument(help="A packed data set.")]) -> None:
    """Hash every shard and decode every sample; exits with 3 when something is damaged."""
    from vitgraft.configs.errors import DataError
    from vitgraft.data_shards.report import verify
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        report = verify(folder, screen.callback("verify"))
    for line in [*report.bad_files, *report.bad_samples.values()]:
        typer.echo(line)
    if not report.ok:
        raise DataError(
            f"{folder}: {len(report.bad_files)} damaged files, {len(report.bad_samples)} damaged samples; "
            "copy it again or pack again"
        )
    typer.echo(f"{folder}: {report.manifest.samples} samples in {len(report.manifest.shards)} shards, all valid")


@shards.command("inspect", epilog="Example: vitgraft shards inspect data/train --draw 16 --out pictures")
def inspect_shards(
    folder: Annotated[Path, typer.Argument(help="A packed data set.")],
    draw: Annotated[int, typer.Option("--draw", min=0, help="Draw so many samples with their labels.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("pictures"),
) -> None:
    """Print class counts, sizes and faults, and draw samples with their labels."""
    from vitgraft.data_shards.report import inspect
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        report = inspect(folder, draw, out, screen.callback("inspect"))
    manifest = report.manifest
    unit = {"detection": "instances", "semantic": "pixels", "video": "clips"}[manifest.kind]
    typer.echo(f"{manifest.kind}: {manifest.samples} samples, fingerprint {manifest.fingerprint[:12]}")
    for name, count in report.class_counts.items():
        typer.echo(f"  {name:24s} {count:>12,} {unit}")
    for (height, width), count in list(report.sizes.items())[:10]:
        typer.echo(f"  {height} x {width}: {count:,} samples")
    typer.echo(f"  without label: {report.unlabelled:,}; unreadable: {len(report.unreadable)}")
    for line in report.unreadable.values():
        typer.echo(f"  {line}")
    if report.pictures:
        typer.echo(f"{len(report.pictures)} pictures in {out}")


def _class_names(text: str) -> list[str]:
    from vitgraft.configs.errors import ConfigError

    path = Path(text)
    try:
        names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--classes {text}: cannot be read: {error}; give a text file with one name per line"
        ) from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 1 or len(set(names)) != len(names):
        raise ConfigError(f"--classes {text}: expected distinct names, one per line or with commas")
    return names


def _say(samples: int, classes: int, out: Path) -> None:
    typer.echo(f"{samples} samples of {classes} classes packed into {out}")
