"""Pack a list of videos with their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import VIDEO_EXTENSIONS, probe_video
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.files import check_classes, check_folder, read_bytes
from vitgraft.data_shards.pack.label_report import MISSING, UNKNOWN, LabelFault, LabelReport, Say
from vitgraft.data_shards.pack.video_lists import (
    ListFormat,
    Named,
    VideoFinder,
    VideoList,
    all_ids,
    is_video,
    read_video_list,
)
from vitgraft.data_shards.pack.writer import DatasetWriter, Progress


def pack_video(
    list_file: Path,
    out: Path,
    *,
    format: ListFormat = "auto",
    split: str | None = None,
    fold: int | None = None,
    root: Path | None = None,
    classes: list[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Manifest:
    """Pack videos as they are; each is decoded once to count the frames that it really has.

    Args:
        list_file: a list in one of the formats of :mod:`~vitgraft.data_shards.pack.video_lists`; there stands what it
            must look like. Labels are class names, or ids when all are integers.
        split, fold: which part of the list, for the formats that have parts.
        root: the folder where the videos are; ``None``: that of the list, or the list itself when it is a folder.
        classes: names by class id; ``None``: all that the list knows, sorted (by number when all are integers).
        on_error: ``skip`` leaves out videos that are missing or cannot be decoded and lists them in the manifest's
            ``source``.
        say: told the report on the labels, line by line, before anything is written.

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
    report = LabelReport("clips", names)
    videos = _checked(listed, names, VideoFinder(folder, listed.exact), on_error, report)
    report.close(say)
    skipped = [f"{name}: no such video" for name in report.left_out.get("missing videos", [])]
    source: dict[str, Any] = {"packer": "video", "list": str(list_file), "root": str(folder), "skipped": skipped}
    writer = DatasetWriter(
        out,
        "video",
        names,
        source={**source, "label_report": report.as_source()},
        total=len(videos),
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )
    with writer:
        for item, path, label in videos:
            data = read_bytes(path)
            try:
                facts = probe_video(data, str(path))
            except DataError as error:
                if on_error == "raise":
                    raise
                skipped.append(str(error))
                continue
            extension = path.suffix.lower().removeprefix(".")
            writer.add({extension: data}, {"label": label, "file_name": item.names[0], **facts})
    return writer.result()


def _checked(
    listed: VideoList, classes: list[str], finder: VideoFinder, on_error: Literal["raise", "skip"], report: LabelReport
) -> list[tuple[Named, Path, int]]:
    """Each video with its file and class id."""
    by_name = {name: number for number, name in enumerate(classes)}
    numeric = all_ids({video.label for video in listed.videos})
    found = []
    for video in listed.videos:
        with report.collect():
            number = by_name.get(video.label)
            if number is None and numeric and int(video.label) < len(classes):
                number = int(video.label)
            if number is None:
                message = f"{video.where}: label {video.label!r} is none of the {len(classes)} classes; fix it"
                raise LabelFault(message, UNKNOWN)
            path = finder.find(video)
            if path is None and on_error == "skip":
                report.leave_out("missing videos", video.names[0])
                continue
            if path is None:
                raise LabelFault(f"{video.where}: {video.names[0]}: no such video; check the list and --root", MISSING)
            if not is_video(path):
                expected = ", ".join(VIDEO_EXTENSIONS)
                raise LabelFault(f"{video.where}: {path}: expected a video of type {expected}; convert it")
            found.append((video, path, number))
            report.counts[number] += 1
            report.samples += 1
    return found
