"""Files of a user's folder: those of the wanted kinds, and those skipped, by reason."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vitgraft.configs.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".sgi", ".qoi", ".jp2", ".j2k", ".avif"),
    }
)
"""Suffixes of images, in lower case; the actual format is found from the content when a file is read."""
VIDEO_SUFFIXES = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe", ".m2v"),
        *(".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".ogm"),
    }
)
"""The same of videos."""
HIDDEN = "hidden files and folders"
OTHER = "other files"
AGAIN = "links to folders that were there before"
_FOREIGN_FOLDERS = ("__MACOSX",)


@dataclass
class Listing:
    """Contents of a folder.

    ``files``: of a wanted kind, sorted by path. ``passed_over``: all others, by reason: hidden ones (``.DS_Store``,
    ``._photo.jpg``, whole hidden folders as one) and those of another kind (``Thumbs.db``, notes).
    """

    files: list[Path] = field(default_factory=list)
    passed_over: dict[str, list[Path]] = field(default_factory=dict)

    def pass_over(self, reason: str, path: Path) -> None:
        """Note a file that does not count."""
        self.passed_over.setdefault(reason, []).append(path)


def list_files(folder: Path, suffixes: Collection[str]) -> Listing:
    """List the files in a folder and those below it; links are followed, but no folder is entered twice.

    Args:
        suffixes: of the wanted files, in small letters with the dot; a file's own may have capitals.

    Raises:
        DataError: no such folder, or one that cannot be read.
    """
    found, wanted = Listing(), frozenset(suffixes)
    entered: set[tuple[int, int]] = set()
    waiting = [folder]
    try:
        while waiting:
            here = waiting.pop()
            facts = os.stat(here)
            if (facts.st_dev, facts.st_ino) in entered:
                found.pass_over(AGAIN, here)
                continue
            entered.add((facts.st_dev, facts.st_ino))
            with os.scandir(here) as entries:
                waiting += _sort_out(here, entries, wanted, found)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or folder}: no such folder; check the path") from None
    except OSError as error:
        where = error.filename or folder
        raise DataError(f"{where}: cannot be listed: {error.strerror}; check the path and its permissions") from None
    found.files.sort()
    for paths in found.passed_over.values():
        paths.sort()
    return found


def composed(name: str) -> str:
    """Return a name with composed letters: macOS writes ``é`` as two characters, where others use one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder of this name is none of the user's: systems leave such files among photos."""
    return name.startswith(".") or name in _FOREIGN_FOLDERS


def _sort_out(here: Path, entries: Iterator[os.DirEntry[str]], wanted: frozenset[str], found: Listing) -> list[Path]:
    """Note the files of a folder; return the folders in it, the last by name first."""
    folders = []
    for entry in entries:
        path = here / entry.name
        if is_hidden(entry.name):
            found.pass_over(HIDDEN, path)
        elif entry.is_dir():
            folders.append(path)
        elif path.suffix.lower() in wanted and entry.is_file():
            found.files.append(path)
        else:
            found.pass_over(OTHER, path)
    return sorted(folders, reverse=True)
