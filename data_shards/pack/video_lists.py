"""Lists of videos in the common formats: the videos and their classes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.listing import VIDEO_SUFFIXES, Listing, composed, is_hidden, list_files
from vitgraft.data_shards.pack.class_lists import without_brackets
from vitgraft.data_shards.pack.files import inside, is_file, read_json, read_text
from vitgraft.data_shards.pack.image_names import FileFinder
from vitgraft.data_shards.pack.label_report import NOTHING_TO_LEARN, LabelReport
from vitgraft.data_shards.pack.other_formats import refuse_other_format

ListFormat = Literal["auto", "list", "kinetics", "ssv2", "ucf101", "hmdb51", "folders"]

KINETICS_SPLITS = {"train": "train", "training": "train", "val": "val", "validate": "val", "validation": "val"}
KINETICS_SPLITS |= {"test": "test", "testing": "test"}
HMDB51_SPLITS = {"train": "1", "test": "2"}
SPLITS = frozenset(("train", "val", "valid", "test", "training", "validation", "testing"))
"""Names of folders that hold classes and are none."""
_HEADINGS = ("label", "labels", "class", "class_name", "category")
_HMDB51_FILE = re.compile(r"^(.+)_test_split(\d+)\.txt$")
_UCF101_FILE = re.compile(r"^(train|test)list\d+\.txt$")


class Named(NamedTuple):
    """One video of a list.

    ``names``: relative paths, or stems of files anywhere below the root; the first that exists is meant. ``label``:
    class name or id as written. ``where``: file and line.
    """

    names: tuple[str, ...]
    label: str
    where: str


class VideoList(NamedTuple):
    """``classes``: every class that the list knows, in order, whether or not a video has it. ``exact``: names are
    paths and nothing else. ``folder``: what lies in it, where the list is a folder."""

    videos: list[Named]
    classes: list[str]
    exact: bool
    folder: Listing | None = None


def read_video_list(
    path: Path, format: ListFormat = "auto", *, split: str | None = None, fold: int | None = None
) -> VideoList:
    """Read a list of any format.

    Args:
        path: a file; for hmdb51 and folders a folder.
        split: kinetics: keep the lines of this split (train, val or test); hmdb51: train (default) or test.
        fold: hmdb51: which of the three splits (default 1).

    Raises:
        DataError: unreadable, empty, or not of this format; names the line.
        ConfigError: a split or fold that the format does not have.
    """
    found = detect(path) if format == "auto" else format
    for option, value, formats in (("--split", split, ("kinetics", "hmdb51")), ("--fold", fold, ("hmdb51",))):
        if value is not None and found not in formats:
            raise ConfigError(f"{option} {value}: lists of format {found} have none; it is for {', '.join(formats)}")
    if found in ("hmdb51", "folders") and not path.is_dir():
        raise DataError(f"{path}: no such folder; format {found} reads a folder")
    if found not in ("hmdb51", "folders") and path.is_dir():
        raise DataError(f"{path}: is a folder; format {found} reads a file")
    match found:
        case "kinetics":
            listed = kinetics(read_text(path), str(path), split)
        case "ssv2":
            listed = ssv2(read_json(path), str(path))
        case "ucf101":
            listed = ucf101(read_text(path), str(path))
        case "hmdb51":
            listed = _hmdb51_folder(path, split or "train", fold or 1)
        case "folders":
            listed = _folders(path)
        case _:
            listed = plain(read_text(path), str(path))
    if not listed.videos:
        raise DataError(f"{path}: the data set is empty: no line names a video; check the list")
    return listed


def detect(path: Path) -> ListFormat:
    """Return the format of a list by its name and first line."""
    if path.is_dir():
        return "hmdb51" if _hmdb51_files(path) else "folders"
    if path.suffix == ".json":
        return "ssv2"
    if _UCF101_FILE.match(path.name):
        return "ucf101"
    refuse_other_format(path)
    text = read_text(path)
    return "kinetics" if "youtube_id" in text[: text.find("\n")].split(",") else "list"


def plain(text: str, where: str) -> VideoList:
    """Parse lines ``PATH LABEL``, separated by the last comma, or without one the last white space; empty lines and
    lines that start with ``#`` are skipped.

    Raises:
        DataError: a line without two parts.
    """
    videos = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, label = _parts(line)
        if number == 1 and label.strip().lower() in _HEADINGS and not PurePosixPath(name).suffix:
            continue
        if not name.strip() or not label.strip():
            raise DataError(f"{where}:{number}: {line[:80]!r}; expected PATH LABEL or PATH,LABEL")
        videos.append(Named((name.strip(),), label.strip(), f"{where}:{number}"))
    return VideoList(videos, sort_labels({video.label for video in videos}), exact=True)


def _parts(line: str) -> tuple[str, str]:
    """Return path and label of a line of a plain list."""
    if '"' in line:
        *front, label = next(csv.reader([line], skipinitialspace=True))
        return ",".join(front), label
    name, label = (line.rsplit(",", 1) if "," in line else [*line.rsplit(None, 1), ""])[:2]
    return name, label


def kinetics(text: str, where: str, split: str | None = None) -> VideoList:
    """Parse a CSV with the columns label, youtube_id, time_start, time_end and split, as the data set publishes it.

    A clip is the file ``ID_START_END`` with six digits each (as the usual downloaders write it), else ``ID``: cut to
    its seconds already. Classes are the sorted labels of the whole file, whatever split is kept.

    Raises:
        DataError: a column is missing, or a line is not as the header says.
    """
    if split is not None and split not in KINETICS_SPLITS:
        raise ConfigError(f"--split {split}: expected train, val or test")
    rows = csv.DictReader(io.StringIO(text), strict=True)
    videos, labels = [], set()
    try:
        missing = {"label", "youtube_id", "time_start", "time_end"} - set(rows.fieldnames or ())
        if missing or (split is not None and "split" not in (rows.fieldnames or ())):
            column = sorted(missing)[0] if missing else "split"
            raise DataError(
                f"{where}: no column {column!r}; expected the header label,youtube_id,time_start,time_end,split "
                "(the files of the test sets without labels cannot be packed)"
            )
        for row in rows:
            line = f"{where}:{rows.line_num}"
            label, video = (row["label"] or "").strip(), (row["youtube_id"] or "").strip()
            if not label or not video:
                raise DataError(f"{line}: no label or youtube_id; expected label,youtube_id,time_start,time_end,split")
            labels.add(label)
            found = KINETICS_SPLITS.get((row.get("split") or "").strip().lower())
            if split is not None and found != KINETICS_SPLITS[split]:
                continue
            start, end = (_seconds(row[key], line) for key in ("time_start", "time_end"))
            videos.append(Named((f"{video}_{start:06d}_{end:06d}", video), label, line))
    except csv.Error as error:
        raise DataError(f"{where}:{rows.line_num + 1}: not CSV ({error}); fix the line") from None
    return VideoList(videos, sort_labels(labels), exact=False)


def _seconds(text: str | None, where: str) -> int:
    try:
        seconds = int(float(text or ""))
    except (ValueError, OverflowError):
        seconds = -1
    if not 0 <= seconds < 1_000_000:
        raise DataError(f"{where}: time {text!r}; expected seconds")
    return seconds


def ssv2(tree: Any, where: str) -> VideoList:
    """Parse Something-Something v2's JSON: a list of {id, template}; a clip is the file ``ID`` of any type.

    Classes are the templates without their brackets, as the labels JSON has them; that file gives their order.

    Raises:
        DataError: not such a list (the one of the test set has no templates).
    """
    if not isinstance(tree, list):
        raise DataError(f"{where}: expected Something-Something's JSON, a list of id and template")
    videos = []
    for number, item in enumerate(tree):
        entry = f"{where}: entry {number}"
        video, template = (item.get("id"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(video, str | int) or not str(video) or not isinstance(template, str) or not template.strip():
            raise DataError(f"{entry}: {str(item)[:80]}; expected id and template (the test set's list has no labels)")
        videos.append(Named((str(video),), without_brackets(template), entry))
    return VideoList(videos, sort_labels({video.label for video in videos}), exact=False)


def ucf101(text: str, where: str) -> VideoList:
    """Parse lines ``CLASS/v_CLASS_gNN_cNN.avi``, optionally followed by the class number; the folder is the class.

    Raises:
        DataError: a line without folder.
    """
    videos = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name = re.sub(r"\s+\d+$", "", line.strip())
        label = PurePosixPath(name).parent.name
        if not label:
            raise DataError(f"{where}:{number}: {line.strip()[:80]!r}; expected CLASS/VIDEO.avi, and maybe a number")
        videos.append(Named((name, PurePosixPath(name).stem), label, f"{where}:{number}"))
    return VideoList(videos, sort_labels({video.label for video in videos}), exact=False)


def hmdb51(texts: Mapping[str, str], where: str, split: str = "train") -> VideoList:
    """Parse lines ``VIDEO.avi N`` of one file for each class, by its name: N is 1 for train, 2 for test, 0 for neither.

    Raises:
        DataError: a line of another form.
    """
    if split not in HMDB51_SPLITS:
        raise ConfigError(f"--split {split}: expected train or test")
    videos = []
    for label in sorted(texts):
        for number, line in enumerate(texts[label].splitlines(), 1):
            if not line.strip():
                continue
            name, _, use = line.strip().rpartition(" ")
            place = f"{where}: {label}:{number}"
            if not name.strip() or use not in ("0", "1", "2"):
                raise DataError(f"{place}: {line.strip()[:80]!r}; expected VIDEO.avi and 0, 1 or 2")
            if use == HMDB51_SPLITS[split]:
                name = name.strip()
                videos.append(Named((f"{label}/{name}", name, PurePosixPath(name).stem), label, place))
    return VideoList(videos, sorted(texts), exact=False)


def doubt_splits(folder: Path, names: Collection[str], report: LabelReport) -> None:
    """Doubt folders of classes that have the names of splits: the classes are most likely below."""
    if len(names) > 1 and SPLITS.issuperset(names):
        wrong = f"{folder}: its folders {', '.join(sorted(names))} are splits of a data set, not classes"
        report.doubt(f"{wrong}; pack each alone, such as {folder / sorted(names)[0]}", NOTHING_TO_LEARN)


def sort_labels(labels: Collection[str]) -> list[str]:
    """Sort labels by number if all are integers, else by name."""
    return sorted(labels, key=int) if all_ids(labels) else sorted(labels)


def all_ids(labels: Collection[str]) -> bool:
    """Tell whether all labels are integers from 0, as class ids are."""
    return all(label.isascii() and label.isdigit() and len(label) < 10 for label in labels)


def _hmdb51_files(folder: Path) -> list[tuple[re.Match[str], Path]]:
    paths = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    return [(match, path) for path in paths if (match := _HMDB51_FILE.match(path.name))]


def _hmdb51_folder(folder: Path, split: str, fold: int) -> VideoList:
    found = _hmdb51_files(folder)
    texts = {match[1]: read_text(path) for match, path in found if int(match[2]) == fold}
    if not texts:
        raise DataError(f"{folder}: no files CLASS_test_split{fold}.txt; check the folder and --fold")
    return hmdb51(texts, str(folder), split)


def _folders(folder: Path) -> VideoList:
    """List folders of one class each, named after it, recursively. Classes are the sorted names."""
    names = {path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)}
    listing = list_files(folder, VIDEO_SUFFIXES)
    videos = []
    for path in listing.files:
        name = path.relative_to(folder)
        if len(name.parts) < 2:
            raise DataError(f"{path}: lies in no folder of a class; expected {folder}/CLASS/{path.name}")
        videos.append(Named((str(name),), name.parts[0], str(path)))
    return VideoList(videos, sort_labels(names), exact=True, folder=listing)


class VideoFinder:
    """Finds the files of a list below ``root``; walks it once, when a name is no path."""

    def __init__(self, root: Path, exact: bool, report: LabelReport) -> None:
        self._root, self._exact = root, exact
        self._otherwise = FileFinder(root, "--root", report, VIDEO_SUFFIXES)
        self._stems: dict[str, list[Path]] | None = None

    def find(self, video: Named) -> Path | None:
        """Return the first of its names that exists, or ``None``.

        Raises:
            DataError: a name leads out of the root, or several files have its stem.
        """
        for name in video.names:
            # A plain list is the user's own and may name absolute paths; a relative one stays below the root.
            own = self._exact and Path(name).is_absolute()
            path = Path(name) if own else inside(self._root, name, video.where)
            if is_file(path):
                return path
        return self._otherwise.find_again(video.names[0], video.where) if self._exact else self._by_stem(video)

    def _by_stem(self, video: Named) -> Path | None:
        if self._stems is None:
            self._stems = {}
            for path in list_files(self._root, VIDEO_SUFFIXES).files:
                self._stems.setdefault(composed(path.stem), []).append(path)
        for name in video.names:
            paths = self._stems.get(composed(name), [])
            if len(paths) > 1:
                raise DataError(f"{video.where}: {paths[0]} and {paths[1]} are both called {name}; remove one")
            if paths:
                return paths[0]
        return None
