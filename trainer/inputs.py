"""Inputs of ``predict``: the images or clips among files and folders, and the names of their outputs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vitgraft.configs.errors import ConfigError, DataError, printable
from vitgraft.configs.files import open_regular
from vitgraft.configs.outputs import keep_inputs
from vitgraft.configs.schema.model import Task
from vitgraft.data_shards.images import read_header
from vitgraft.data_shards.listing import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_files
from vitgraft.data_shards.pictures import is_own_picture

JSON_BEGIN = '{\n "input": '
"""First characters of a prediction's JSON."""
_UNMARKED = frozenset({"TGA", "PCX"})
"""Formats that much else may look like: their files are known by their names alone."""
_STILL = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"jp2 ", b"jpx ", b"crx ")
"""Brands of image files (HEIF, AVIF, JPEG 2000, CR3) with an MP4-like header."""


@dataclass(frozen=True)
class Input:
    """File to predict on. ``name``: of its outputs below --out, without suffix; may have folders."""

    path: Path
    name: str


@dataclass
class Inputs:
    """``passed_over``: files of the folders that are of no wanted kind; hidden ones are among them. ``without``:
    folders in which there is none that is."""

    files: list[Input] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)
    without: list[Path] = field(default_factory=list)


def find_inputs(given: list[Path], out: Path, task: Task) -> Inputs:
    """Return the given files, and those of the wanted kind in folders, recursively; ``out`` is not entered.

    A file of a folder is of the wanted kind by its name or by its content. One that is named itself is taken as it is.
    What is written of them is called as they are, below their folder; files that would share a name keep their suffix
    in it, and folders that would, their path.

    Raises:
        DataError: there is no such file, or nothing to predict on.
        ConfigError: ``out`` is one of the folders.
    """
    found = Inputs()
    named: list[tuple[Path, Path]] = []  # with the path below what was given
    kind = "video" if task == "video" else "image"
    for path in dict.fromkeys(given):
        if not path.is_dir():
            _check_file(path)
            named.append((path, Path(path.name)))
            continue
        if out.exists() and out.samefile(path):
            raise ConfigError(f"--out {out}: is the folder of the inputs; choose another, it may be inside")
        files, others = _listed(path, out, kind)
        found.passed_over += others
        found.without += [] if files else [path]
        named += [(file, file.relative_to(path)) for file in files]
    if not named:
        _refuse_nothing(found, kind)
    absolute = {Path(os.path.abspath(path)): (path, below) for path, below in named}
    folders = {(below.with_suffix(""), full.parent) for full, (_, below) in absolute.items()}
    if len({stem for stem, _ in folders}) < len(folders):
        # Two folders have a file of the same name: all are called by their paths from the folder above both.
        above = Path(os.path.commonpath([full.parent for full in absolute]))
        absolute = {full: (path, full.relative_to(above)) for full, (path, _) in absolute.items()}
    named = list(absolute.values())
    names = _names([below for _, below in named])
    found.files = [Input(path, name) for (path, _), name in zip(named, names, strict=True)]
    return found


def outputs_of(name: str, out: Path) -> tuple[Path, Path, Path]:
    """Return the paths of the JSON, picture and label map of a name."""
    return out / f"{name}.json", out / f"{name}.png", out / f"{name}.labels.png"


def check_outputs(inputs: list[Input], out: Path) -> None:
    """Check that only earlier predictions are overwritten.

    Raises:
        ConfigError: an output is an input, or a file that vitgraft did not write, or ``out`` is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file; name a folder, which may be new")
    outputs = [path for given in inputs for path in outputs_of(given.name, out)]
    keep_inputs(outputs, (given.path for given in inputs), f"--out {out}")
    for given in inputs:
        json, *pictures = outputs_of(given.name, out)
        ours = _is_our_json(json)
        foreign = [json] if json.exists() and not ours else []
        # Pictures of earlier versions do not say whose they are.
        foreign += [path for path in pictures if path.exists() and not ours and not is_own_picture(path)]
        if foreign:
            raise ConfigError(
                f"--out {out}: {foreign[0]} exists and is no prediction of vitgraft; choose another folder"
            )


def _check_file(path: Path) -> None:
    try:
        os.close(open_regular(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give images, clips or folders of them") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}; give images, clips or folders of them") from None


def _listed(folder: Path, out: Path, kind: str) -> tuple[list[Path], list[Path]]:
    """Return the files of the kind, and all others."""
    listing = list_files(folder, VIDEO_SUFFIXES if kind == "video" else IMAGE_SUFFIXES)
    files, others = listing.files, [path for paths in listing.passed_over.values() for path in paths]
    inside = out.resolve()
    if inside.is_relative_to(folder.resolve()):
        files, others = ([p for p in paths if not p.resolve().is_relative_to(inside)] for paths in (files, others))
    hidden = {path for path in others if any(part.startswith(".") for part in path.relative_to(folder).parts)}
    is_wanted = _is_video if kind == "video" else _is_image
    more = {path for path in others if path not in hidden and path.is_file() and is_wanted(path)}
    return sorted([*files, *more]), sorted(path for path in others if path not in more)


def _is_image(path: Path) -> bool:
    try:
        return read_header(path, str(path)).format not in _UNMARKED
    except DataError:
        return False


def _is_video(path: Path) -> bool:
    try:
        descriptor = open_regular(path)
    except OSError:
        return False
    try:
        head = os.read(descriptor, 12)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    starts = (b"\x1aE\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"FLV\x01", b"0&\xb2u", b"OggS")
    mp4 = head[4:8] == b"ftyp" and head[8:12] not in _STILL
    return mp4 or head.startswith(starts) or (head.startswith(b"RIFF") and head[8:12] == b"AVI ")


def _names(below: list[Path]) -> list[str]:
    """Return a name for each path: without its suffix where output names stay unique, else with it."""
    names = [str(path.with_suffix("")) for path in below]
    while True:
        made = Counter(str(path) for name in names for path in outputs_of(name, Path()))
        longer = [
            str(path) if any(made[str(output)] > 1 for output in outputs_of(name, Path())) else name
            for path, name in zip(below, names, strict=True)
        ]
        if longer == names:
            return names
        names = longer


def _refuse_nothing(found: Inputs, kind: str) -> None:
    folder, others = found.without[0], found.passed_over
    if not others:
        raise DataError(f"{folder}: an empty folder; give {kind}s or folders of them")
    raise DataError(f"{folder}: no {kind} in it; {summary(others)}; give {kind}s or folders of them")


def summary(paths: Iterable[Path], most: int = 5) -> str:
    """Return the number of skipped files and the names of the first ``most``, as text."""
    names = [path.name for path in paths]
    shown = ", ".join(printable(name) for name in names[:most])
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"{files} passed over: {shown}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_our_json(path: Path) -> bool:
    try:
        descriptor = open_regular(path)
    except OSError:
        return False
    try:
        return os.read(descriptor, len(JSON_BEGIN)) == JSON_BEGIN.encode()
    except OSError:
        return False
    finally:
        os.close(descriptor)
