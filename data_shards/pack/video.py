"""Pack a list of videos with their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import VIDEO_EXTENSIONS, probe_video
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.files import check_classes, inside, read_bytes, read_text
from vitgraft.data_shards.pack.writer import DatasetWriter, Progress


class ListedVideo(NamedTuple):
    """One line of the list: the name as written, its file, and its class name or id as written."""

    name: str
    path: Path
    label: str
    line: int


def pack_video(
    list_file: Path,
    out: Path,
    *,
    root: Path | None = None,
    classes: list[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
) -> Manifest:
    """Pack videos as they are; each is decoded once to count the frames that it really has.

    Args:
        list_file: lines ``PATH LABEL``, separated by the last comma, or without one the last white space; empty lines
            and lines that start with ``#`` are passed over. LABEL is a class name, or an id when all are integers.
        root: the folder to which paths are relative; ``None``: that of the list.
        classes: names by class id; ``None``: the distinct labels, sorted (by number when all are integers).
        on_error: ``skip`` leaves out videos that cannot be decoded and lists them in the manifest's ``source``.

    Raises:
        DataError: a missing or undecodable video, an unknown label, an empty list; names file or line.
    """
    folder = list_file.parent if root is None else root
    listed = read_list(list_file, folder)
    names, ids = _classes(listed, classes, str(list_file))
    for item in listed:
        if not item.path.is_file():
            raise DataError(f"{list_file}:{item.line}: {item.path}: no such video; check the list and --root")
        if item.path.suffix.lower().removeprefix(".") not in VIDEO_EXTENSIONS:
            expected = ", ".join(VIDEO_EXTENSIONS)
            raise DataError(f"{list_file}:{item.line}: {item.path}: expected a video of type {expected}; convert it")
    skipped: list[str] = []
    source: dict[str, Any] = {"packer": "video", "list": str(list_file), "root": str(folder), "skipped": skipped}
    writer = DatasetWriter(
        out,
        "video",
        names,
        source=source,
        total=len(listed),
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )
    with writer:
        for item in listed:
            data = read_bytes(item.path)
            try:
                facts = probe_video(data, str(item.path))
            except DataError as error:
                if on_error == "raise":
                    raise
                skipped.append(str(error))
                continue
            extension = item.path.suffix.lower().removeprefix(".")
            writer.add({extension: data}, {"label": ids[item.label], "file_name": item.name, **facts})
    return writer.result()


def read_list(list_file: Path, folder: Path) -> list[ListedVideo]:
    """The lines of a list.

    Raises:
        DataError: unreadable, empty, or a line without two parts.
    """
    listed: list[ListedVideo] = []
    for number, text in enumerate(read_text(list_file).splitlines(), 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        name, label = (text.rsplit(",", 1) if "," in text else [*text.rsplit(None, 1), ""])[:2]
        if not name.strip() or not label.strip():
            raise DataError(f"{list_file}:{number}: {text[:80]!r}; expected PATH LABEL or PATH,LABEL")
        path = Path(name.strip())
        # The list is the user's own: it may name absolute paths, but a relative one stays below the root.
        path = path if path.is_absolute() else inside(folder, name.strip(), f"{list_file}:{number}")
        listed.append(ListedVideo(name.strip(), path, label.strip(), number))
    if not listed:
        raise DataError(f"{list_file}: the data set is empty: no line names a video; check the list")
    return listed


def _classes(listed: list[ListedVideo], classes: list[str] | None, where: str) -> tuple[list[str], dict[str, int]]:
    """Class names, and the class id of each label as it is written in the list."""
    labels = {item.label for item in listed}
    numeric = all(label.isascii() and label.isdigit() for label in labels)
    if classes is None:
        names = sorted(labels, key=int) if numeric else sorted(labels)
        return names, {name: number for number, name in enumerate(names)}
    check_classes(classes, where)
    by_name = {name: number for number, name in enumerate(classes)}
    ids: dict[str, int] = {}
    for item in listed:
        if item.label in by_name:
            ids[item.label] = by_name[item.label]
        elif numeric and int(item.label) < len(classes):
            ids[item.label] = int(item.label)
        else:
            raise DataError(f"{where}:{item.line}: label {item.label!r} is none of the {len(classes)} classes; fix it")
    return list(classes), ids
