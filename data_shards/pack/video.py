"""Pack a list of videos with their classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from vitgraft.data_shards.decode import VIDEO_EXTENSIONS, probe_video
from vitgraft.data_shards.listing import composed
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.files import check_classes, check_folder, read_bytes
from vitgraft.data_shards.pack.items import PackOptions, Prepared, pack_items
from vitgraft.data_shards.pack.label_report import MISSING, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.pairs import note_passed_over
from vitgraft.data_shards.pack.reencode import Reencode
from vitgraft.data_shards.pack.video_lists import (
    ListFormat,
    Named,
    VideoFinder,
    VideoList,
    all_ids,
    doubt_splits,
    read_video_list,
)


@dataclass(frozen=True)
class Clip:
    """Video file. ``metadata``: in addition to the facts read from the file."""

    path: Path
    metadata: dict[str, Any]
    reencode: Reencode | None

    @property
    def files(self) -> tuple[Path, ...]:
        """See :class:`~vitgraft.data_shards.pack.items.Item`."""
        return (self.path,)

    def prepare(self) -> Prepared:
        """Return the file, unchanged or re-encoded, and its counted facts."""
        where = str(self.path)
        data = read_bytes(self.path)
        if self.reencode is None:
            members, facts = {_member_of(self.path): data}, probe_video(data, where)
        else:
            members, facts = self.reencode.encode(data, where)
        return Prepared(members, self.metadata | facts)


def pack_video(
    list_file: Path,
    out: Path,
    *,
    format: ListFormat = "auto",
    split: str | None = None,
    fold: int | None = None,
    root: Path | None = None,
    classes: list[str] | None = None,
    reencode: Reencode | None = None,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Pack videos; each is decoded once, to count the frames that it really has or to encode them anew.

    Args:
        list_file: a list in one of the formats of :mod:`~vitgraft.data_shards.pack.video_lists`; there stands what it
            must look like. Labels are class names, or ids when all are integers.
        split, fold: which part of the list, for the formats that have parts.
        root: the folder where the videos are; ``None``: that of the list, or the list itself when it is a folder.
        classes: names by class id; ``None``: all that the list knows, sorted (by number when all are integers).
        reencode: how clips are encoded anew; ``None``: they are packed byte for byte.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: a missing or undecodable video, an unknown label, an empty list; names file or line.
        ConfigError: a split or fold that the format does not have.
    """
    listed = read_video_list(list_file, format, split=split, fold=fold)
    folder = (list_file if list_file.is_dir() else list_file.parent) if root is None else root
    check_folder(folder)
    if classes is not None:
        check_classes(classes, str(list_file))
    names = listed.classes if classes is None else classes
    report = LabelReport("clips", names, on_error=options.get("on_error", "raise"))
    if listed.folder is not None:
        note_passed_over(listed.folder, report)
        doubt_splits(folder, names, report)
    videos = _checked(listed, names, VideoFinder(folder, listed.exact, report), report)
    report.close(options.get("say"))
    source: dict[str, Any] = {"packer": "video", "list": str(list_file), "root": str(folder)}
    how = None if reencode is None else reencode.as_source()
    if how is not None:
        source["reencode"] = how
    clips = [Clip(path, {"label": label, "file_name": item.names[0]}, reencode) for item, path, label in videos]
    return pack_items(clips, out, "video", report, source=source, settings=[how], chunk=1, **options)


def _member_of(path: Path) -> str:
    """Return the extension of a file's member; for an unusual one decoders detect the format."""
    extension = path.suffix.lower().removeprefix(".")
    return extension if extension in VIDEO_EXTENSIONS else VIDEO_EXTENSIONS[0]


def _checked(
    listed: VideoList, classes: list[str], finder: VideoFinder, report: LabelReport
) -> list[tuple[Named, Path, int]]:
    """Return each video with its file and class id."""
    by_name = {composed(name): number for number, name in enumerate(classes)}
    numeric = all_ids({video.label for video in listed.videos})
    found = []
    for video in listed.videos:
        with report.collect():
            number = by_name.get(composed(video.label))
            if number is None and numeric and int(video.label) < len(classes):
                number = int(video.label)
            if number is None:
                message = f"{video.where}: label {video.label!r} is none of the {len(classes)} classes; fix it"
                raise LabelFault(message, UNKNOWN)
            path = finder.find(video)
            if path is None:
                raise LabelFault(f"{video.where}: {video.names[0]}: no such video; check the list and --root", MISSING)
            found.append((video, path, number))
            report.counts[number] += 1
            report.samples += 1
    return found
