"""``vitgraft shards``: pack, verify and inspect data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from vitgraft.data_shards.manifest import Manifest
    from vitgraft.data_shards.pack.items import PackOptions
    from vitgraft.launch.ui import Screen

shards = typer.Typer(help="Pack, verify and inspect data sets as WebDataset shards.", no_args_is_help=True)
pack = typer.Typer(help="Pack a labelled data set into shards with a manifest.", no_args_is_help=True)
shards.add_typer(pack, name="pack")

Out = Annotated[Path, typer.Option("--out", help="Folder of the packed data set; made new.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is already in --out.")]
PerShard = Annotated[int, typer.Option("--samples-per-shard", min=1, help="Samples in one tar file.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", min=1, help="Processes; the result is the same at every number [default: one for each core, up to 8]."
    ),
]
OnErrorChoice = Annotated[
    Literal["raise", "skip"],
    typer.Option("--on-error", help="raise: faults in the data stop; skip: what is faulty is left out and listed."),
]
_CLASSES = typer.Option(
    "--classes",
    help="Names in order: a file, names with commas, or a packed data set, such as the one trained on.",
    metavar="FILE|SET|NAMES",
)
Classes = Annotated[str | None, _CLASSES]
ClassesNeeded = Annotated[str, _CLASSES]
DropFaulty = Annotated[bool, typer.Option("--drop-faulty", help="The same as --on-error skip.")]
Exif = Annotated[
    Literal["auto", "apply", "ignore"],
    typer.Option(
        "--exif", help="Turn images by their EXIF orientation; auto: unless the labels are of the unturned size."
    ),
]
Decode = Annotated[bool, typer.Option("--decode", help="Decode every image first, so that damaged ones are found.")]
ValueRange = Annotated[
    str, typer.Option("--range", metavar="LOW,HIGH", help="Values of black and white in grey images of 16 or 32 bits.")
]


@pack.command(epilog="Example: vitgraft shards pack coco --images photos --annotations boxes.json --out data/train")
def coco(
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.")],
    annotations: Annotated[Path, typer.Option("--annotations", help="COCO instances JSON.")],
    out: Out,
    classes: Classes = None,
    crowds: Annotated[
        Literal["keep", "objects"] | None,
        typer.Option(
            "--crowds",
            help="iscrowd 1 means a crowd (keep) or one object [default: a crowd; a class of crowds alone is a fault].",
        ),
    ] = None,
    on_error: OnErrorChoice = "raise",
    drop_faulty: DropFaulty = False,
    exif: Exif = "auto",
    decode: Decode = False,
    value_range: ValueRange = "",
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
    jobs: Jobs = None,
) -> None:
    """Pack a COCO-format data set: boxes, polygons, RLE, crowds."""
    from vitgraft.data_shards.pack.coco import pack_coco
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_coco(
            images,
            annotations,
            out,
            classes=None if classes is None else _class_names(classes),
            crowds=crowds,
            **_options(screen, overwrite, samples_per_shard, jobs, on_error, drop_faulty, exif, decode, value_range),
        )
    _say(manifest, out)


@pack.command(
    epilog="Example: vitgraft shards pack semantic --images img --labels png --classes names.txt --out data/train"
)
def semantic(
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.")],
    labels: Annotated[Path, typer.Option("--labels", help="Folder of label maps (PNG) with the images' stems.")],
    classes: ClassesNeeded,
    out: Out,
    image_suffix: Annotated[
        str | None,
        typer.Option("--image-suffix", help="End of the images' names that labels lack, e.g. _leftImg8bit.png."),
    ] = None,
    label_suffix: Annotated[
        str | None,
        typer.Option("--label-suffix", help="End of the label PNGs' names that images lack; other files do not count."),
    ] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Text file with the stem of an image in each line: pack these alone.")
    ] = None,
    ignore: Annotated[
        str, typer.Option("--ignore", metavar="N[,N…]", help="Label ids that do not count, besides 255.")
    ] = "",
    reduce_zero: Annotated[
        bool, typer.Option("--reduce-zero", help="0 does not count and the other ids fall by one.")
    ] = False,
    ids: Annotated[
        str,
        typer.Option("--ids", metavar="N[,N…]", help="Label ids of class 0, 1, …, e.g. 0,255; others do not count."),
    ] = "",
    colours: Annotated[
        Path | None, typer.Option("--colours", help="Labels are colours: file with R G B NAME in each line.")
    ] = None,
    on_error: OnErrorChoice = "raise",
    drop_faulty: DropFaulty = False,
    exif: Exif = "auto",
    decode: Decode = False,
    value_range: ValueRange = "",
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
    jobs: Jobs = None,
) -> None:
    """Pack images with label maps (PNG or another format without loss; grey, palette or colours, 8 or 16 bit)."""
    from vitgraft.data_shards.pack.pairs import Pairing
    from vitgraft.data_shards.pack.semantic import pack_semantic
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_semantic(
            images,
            labels,
            out,
            _class_names(classes),
            ignore=_numbers("--ignore", ignore),
            reduce_zero=reduce_zero,
            ids=_numbers("--ids", ids),
            colours=colours,
            pairing=Pairing(image_suffix, label_suffix, list_file),
            **_options(screen, overwrite, samples_per_shard, jobs, on_error, drop_faulty, exif, decode, value_range),
        )
    _say(manifest, out)


@pack.command(
    epilog="Example: vitgraft shards pack bdd100k --images bdd100k/images/100k/train "
    "--labels bdd100k/labels/det_20/det_train.json --out data/train"
)
def bdd100k(
    images: Annotated[list[Path], typer.Option("--images", help="Folder of images; may be given several times.")],
    labels: Annotated[Path, typer.Option("--labels", help="detection: JSON or folder of JSONs; else folder of masks.")],
    out: Out,
    task: Annotated[
        Literal["detection", "drivable", "semantic"], typer.Option("--task", help="What the labels are.")
    ] = "detection",
    classes: Classes = None,
    on_error: OnErrorChoice = "raise",
    drop_faulty: DropFaulty = False,
    exif: Exif = "auto",
    decode: Decode = False,
    value_range: ValueRange = "",
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
    jobs: Jobs = None,
) -> None:
    """Pack BDD100K: boxes, drivable areas or semantic masks; images and labels meet by their stems."""
    from vitgraft.data_shards.pack.bdd100k import pack_bdd100k
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_bdd100k(
            images,
            labels,
            out,
            task=task,
            classes=None if classes is None else _class_names(classes),
            **_options(screen, overwrite, samples_per_shard, jobs, on_error, drop_faulty, exif, decode, value_range),
        )
    _say(manifest, out)


@pack.command(
    epilog="Example: vitgraft shards pack panoptic --images val2017 --annotations panoptic_val2017.json --out data/val"
)
def panoptic(
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.")],
    annotations: Annotated[Path, typer.Option("--annotations", help="COCO panoptic JSON.")],
    out: Out,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Folder of the PNGs [default: beside the JSON, with its stem].")
    ] = None,
    classes: Classes = None,
    on_error: OnErrorChoice = "raise",
    drop_faulty: DropFaulty = False,
    exif: Exif = "auto",
    decode: Decode = False,
    value_range: ValueRange = "",
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
    jobs: Jobs = None,
) -> None:
    """Pack COCO panoptic as label maps over all categories, things and stuff; the segments are kept."""
    from vitgraft.data_shards.pack.panoptic import pack_panoptic
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        manifest = pack_panoptic(
            images,
            annotations,
            out,
            masks=masks,
            classes=None if classes is None else _class_names(classes),
            **_options(screen, overwrite, samples_per_shard, jobs, on_error, drop_faulty, exif, decode, value_range),
        )
    _say(manifest, out)


@pack.command(
    epilog="Example: vitgraft shards pack imagefolder --images flowers/train --out data/train; "
    "or: vitgraft shards pack imagefolder --arrays cifar10_train.npz --out data/train"
)
def imagefolder(
    out: Out,
    images: Annotated[Path | None, typer.Option("--images", help="Folder with one folder for each class.")] = None,
    arrays: Annotated[
        Path | None, typer.Option("--arrays", help=".npz with images and labels, or .npy with images.")
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help=".npy with labels, beside an .npy of images.")] = None,
    classes: Classes = None,
    on_error: OnErrorChoice = "raise",
    drop_faulty: DropFaulty = False,
    exif: Exif = "auto",
    decode: Decode = False,
    value_range: ValueRange = "",
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
    jobs: Jobs = None,
) -> None:
    """Pack images with one class each: folders of classes, or arrays as CIFAR's."""
    from vitgraft.configs.errors import ConfigError
    from vitgraft.data_shards.pack.imagefolder import pack_arrays, pack_imagefolder
    from vitgraft.launch.ui import Screen

    if (images is None) == (arrays is None):
        raise ConfigError("give either --images FOLDER or --arrays FILE")
    if arrays is None and labels is not None:
        raise ConfigError("--labels belongs to --arrays; folders name the classes of their images")
    names = None if classes is None else _class_names(classes)
    if arrays is not None and (exif != "auto" or decode or value_range):
        raise ConfigError("--exif, --decode and --range are for image files; --arrays hold pixels")
    with Screen() as screen:
        options = _options(screen, overwrite, samples_per_shard, jobs, on_error, drop_faulty, exif, decode, value_range)
        if images is not None:
            manifest = pack_imagefolder(
                images,
                out,
                classes=names,
                **options,
            )
        else:
            assert arrays is not None
            manifest = pack_arrays(
                arrays,
                out,
                labels=labels,
                classes=names,
                **options,
            )
    _say(manifest, out)


@pack.command(epilog="Example: vitgraft shards pack video --list train.csv --root videos --out data/train")
def video(
    list_file: Annotated[
        Path, typer.Option("--list", help="The list: a file; hmdb51 and folders: a folder.", metavar="PATH")
    ],
    out: Out,
    format: Annotated[
        Literal["auto", "list", "kinetics", "ssv2", "ucf101", "hmdb51", "folders"],
        typer.Option("--format", help="auto: by name and header; list: lines of PATH LABEL; folders: CLASS/CLIP."),
    ] = "auto",
    split: Annotated[
        str | None, typer.Option("--split", help="kinetics: train, val or test [default: all]; hmdb51: train or test.")
    ] = None,
    fold: Annotated[int | None, typer.Option("--fold", min=1, max=3, help="hmdb51: which split [default: 1].")] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder of the videos [default: the list's, or the list].")
    ] = None,
    classes: Classes = None,
    reencode: Annotated[
        Literal["none", "gop", "frames"],
        typer.Option("--reencode", help="Encode anew for fast seeking: gop: H.264, many key frames; frames: JPEGs."),
    ] = "none",
    gop: Annotated[
        int | None, typer.Option("--gop", help="With --reencode gop: frames from key to key [default: 8].")
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option("--short-side", help="With --reencode: scale larger clips down to it.", metavar="PIXELS"),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            "--quality", help="gop: x264's CRF, 0 best, 51 worst [default: 18]; frames: JPEG's [default: 90]."
        ),
    ] = None,
    on_error: OnErrorChoice = "raise",
    drop_faulty: DropFaulty = False,
    overwrite: Overwrite = False,
    samples_per_shard: PerShard = 1000,
    jobs: Jobs = None,
) -> None:
    """Pack video clips with one label each (mp4, mov, avi, mkv, webm, mpg and others)."""
    from vitgraft.configs.errors import ConfigError
    from vitgraft.data_shards.pack.reencode import Reencode
    from vitgraft.data_shards.pack.video import pack_video
    from vitgraft.launch.ui import Screen

    if reencode == "none" and (gop, short_side, quality) != (None, None, None):
        raise ConfigError("--gop, --short-side and --quality say how --reencode encodes; pass it, as gop or frames")
    with Screen() as screen:
        manifest = pack_video(
            list_file,
            out,
            format=format,
            split=split,
            fold=fold,
            root=root,
            classes=None if classes is None else _class_names(classes),
            reencode=None if reencode == "none" else Reencode(reencode, gop, short_side, quality),
            **_options(screen, overwrite, samples_per_shard, jobs, on_error, drop_faulty),
        )
    _say(manifest, out)


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
    _say(manifest, out)


@shards.command(
    "index", epilog="Example: vitgraft shards index laion --kind image --classes names.txt --member label=json:breed"
)
def index_shards(
    source: Annotated[str, typer.Argument(help="Folder or URL of tars in WebDataset's format.")],
    kind: Annotated[
        Literal["detection", "semantic", "video", "image"], typer.Option("--kind", help="Kind of samples.")
    ],
    classes: ClassesNeeded,
    member: Annotated[
        list[str] | None,
        typer.Option(
            "--member",
            help="ROLE=NAME,…: members to take for image, video or label; json:FIELD for a field.",
            metavar="",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for indices and manifest [default: beside the tars].")
    ] = None,
    on_error: OnErrorChoice = "raise",
    drop_faulty: DropFaulty = False,
    exif: Exif = "auto",
    decode: Decode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Index again what is indexed already.")] = False,
) -> None:
    """Make tars that others wrote readable as they are: indices and a manifest, no copy."""
    from vitgraft.configs.errors import ConfigError
    from vitgraft.data_shards.foreign import index_tars
    from vitgraft.launch.ui import Screen

    members: dict[str, list[str]] = {}
    for text in member or []:
        role, mark, names = text.partition("=")
        if not mark or role in members:
            raise ConfigError(f"--member {text}: expected ROLE=NAME or ROLE=NAME,NAME, each role once")
        members[role] = names.split(",")
    with Screen() as screen:
        manifest = index_tars(
            source,
            kind,
            _class_names(classes),
            out=out,
            members=members,
            on_error="skip" if drop_faulty else on_error,
            exif=exif,
            decode=decode,
            overwrite=overwrite,
            progress=screen.callback("index"),
            say=screen.note,
        )
    indexed = f"{manifest.samples} samples in {len(manifest.shards)} tars indexed; the data set is {out or source}"
    typer.echo(indexed + _left_out(manifest))


@shards.command("verify", epilog="Example: vitgraft shards verify data/train")
def verify_shards(
    folder: Annotated[str, typer.Argument(help="A packed data set: folder or URL.")], jobs: Jobs = None
) -> None:
    """Hash every shard and decode every sample; exits with 3 when something is damaged."""
    from vitgraft.configs.errors import DataError
    from vitgraft.data_shards.parallel import default_jobs
    from vitgraft.data_shards.report import verify
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        report = verify(folder, screen.callback("verify"), jobs or default_jobs())
    for line in [*report.bad_files, *report.bad_samples.values()]:
        typer.echo(line)
    if not report.ok:
        raise DataError(
            f"{folder}: {len(report.bad_files)} damaged files, {len(report.bad_samples)} damaged samples; "
            f"{report.remedy}"
        )
    typer.echo(f"{folder}: {report.manifest.samples} samples in {len(report.manifest.shards)} shards, all valid")


@shards.command("inspect", epilog="Example: vitgraft shards inspect data/train --draw 16 --out pictures")
def inspect_shards(
    folder: Annotated[str, typer.Argument(help="A packed data set: folder or URL.")],
    draw: Annotated[int, typer.Option("--draw", min=0, help="Draw so many samples with their labels.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("pictures"),
) -> None:
    """Print class counts, sizes and faults, and draw samples with their labels."""
    from vitgraft.data_shards.report import inspect
    from vitgraft.launch.ui import Screen

    with Screen() as screen:
        report = inspect(folder, draw, out, screen.callback("inspect"))
    manifest = report.manifest
    unit = {"detection": "instances", "semantic": "pixels", "video": "clips", "image": "images"}[manifest.kind]
    typer.echo(f"{manifest.kind}: {manifest.samples} samples, fingerprint {manifest.fingerprint[:12]}")
    for name, count in report.class_counts.items():
        typer.echo(f"  {name:24s} {count:>12,} {unit}")
    for (height, width), count in list(report.sizes.items())[:10]:
        typer.echo(f"  {height} x {width}: {count:,} samples")
    typer.echo(f"  without label: {report.unlabelled:,}; unreadable: {len(report.unreadable)}")
    for line in report.unreadable.values():
        typer.echo(f"  {line}")
    if draw:
        fewer = f" of the {draw} asked for" if len(report.pictures) < draw else ""
        typer.echo(f"{len(report.pictures)} pictures{fewer} in {out}")


def _options(
    screen: Screen,
    overwrite: bool,
    samples_per_shard: int,
    jobs: int | None,
    on_error: Literal["raise", "skip"],
    drop_faulty: bool,
    exif: Literal["auto", "apply", "ignore"] = "auto",
    decode: bool = False,
    value_range: str = "",
) -> PackOptions:
    from vitgraft.data_shards.images import parse_range
    from vitgraft.data_shards.pack.items import PackOptions
    from vitgraft.data_shards.parallel import default_jobs

    return PackOptions(
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        jobs=jobs or default_jobs(),
        on_error="skip" if drop_faulty else on_error,
        exif=exif,
        decode=decode,
        values=parse_range(value_range),
        checked=screen.callback("check"),
        progress=screen.callback("pack"),
        say=screen.note,
    )


def _numbers(option: str, text: str) -> list[int]:
    from vitgraft.configs.errors import ConfigError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected integers with commas") from None


def _class_names(text: str) -> list[str]:
    from vitgraft.data_shards.pack.class_lists import read_classes

    return read_classes(text)


def _say(manifest: Manifest, out: Path) -> None:
    packed = f"{manifest.samples} samples of {len(manifest.classes)} classes packed into {out}"
    typer.echo(packed + _left_out(manifest))


def _left_out(manifest: Manifest) -> str:
    skipped = manifest.source.get("skipped", [])
    return f"; {len(skipped)} faults left out, the first: {skipped[0]}" if skipped else ""
