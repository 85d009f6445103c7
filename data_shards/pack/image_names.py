"""Finding the images that a labels file names: by POSIX or Windows path, or by the file name alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from vitgraft.data_shards.listing import IMAGE_SUFFIXES, composed, list_files
from vitgraft.data_shards.pack.files import is_file
from vitgraft.data_shards.pack.label_report import MISSING, LabelFault, LabelReport

OTHERWISE = "found by another name"
_DEEPEST = 32
"""Folders of a listed name that are tried."""
_SLASHES = (("", ""), ("\\", "/"))


class FileFinder:
    """Finds files below a folder; lists it once, when a name is no path in it.

    Args:
        folder: nothing outside it is ever found.
        option: names the folder in messages, such as ``--images``.
        suffixes: of the files that are found by their bare name.
        report: is told of files that were found by another name than the listed one.
    """

    def __init__(
        self, folder: Path, option: str, report: LabelReport, suffixes: Collection[str] = IMAGE_SUFFIXES
    ) -> None:
        self._folder, self._option, self._report, self._suffixes = folder, option, report, suffixes
        self._by_name: dict[str, list[Path]] | None = None
        self._taken: dict[Path, str] = {}

    def find(self, name: Any, where: str) -> Path:
        """Return the file that is meant: ``folder/name``; that with backslashes read as slashes, or %20 as a space;
        that without the folders in front, as far as needed; else the only file of that name below the folder.

        Raises:
            LabelFault: no name, no such file, more than one that could be meant, or one that was found before.
        """
        if not isinstance(name, str) or not name:
            raise LabelFault(f"{where}: file name {str(name)[:80]!r}; expected a path relative to {self._folder}")
        path = self._located(name, where)
        if path is None:
            bare = PurePosixPath(_spellings(name)[-1]).name[:200]
            message = f"{self._folder / bare}: no such file, though {where} lists {name[:200]!r}"
            raise LabelFault(f"{message}; check {self._option}", MISSING)
        return self._taken_once(path, name, where)

    def find_again(self, name: str, where: str) -> Path | None:
        """Return the file as :meth:`find`, which may be listed more than once; ``None``: there is none."""
        path = self._located(name, where)
        if path is not None:
            self._tell(path, name)
        return path

    def _located(self, name: str, where: str) -> Path | None:
        spellings = _spellings(name)
        for text in spellings:
            parts = PurePosixPath(text).parts[-_DEEPEST:]
            # What is looked up stays in the folder, whatever the name says.
            inner = max((number + 1 for number, part in enumerate(parts) if part in ("/", "..")), default=0)
            for first in range(inner, len(parts)):
                path = self._folder.joinpath(*parts[first:])
                if is_file(path):
                    return path
        paths = list(dict.fromkeys(path for text in spellings for path in self._called(PurePosixPath(text).name)))
        if len(paths) == 1:
            return paths[0]
        if paths:
            both = f"{paths[0]} and {paths[1]} could both be {name[:200]!r}"
            raise LabelFault(f"{where}: {both}; list the path below {self._option}", MISSING)
        return None

    def _taken_once(self, path: Path, name: str, where: str) -> Path:
        first = self._taken.get(path)
        if first == name:  # each entry would have some of the labels
            raise LabelFault(f"{where}: {name[:200]!r} is listed before; make one entry of both")
        self._taken[path] = name
        if first is not None:  # the folders in front told them apart
            both = f"{name[:200]!r} and {first[:200]!r} both come down to {path}"
            raise LabelFault(f"{where}: {both}; list the paths below {self._option}", MISSING)
        self._tell(path, name)
        return path

    def _tell(self, path: Path, name: str) -> None:
        if str(path) != str(self._folder / name):
            self._report.repair(OTHERWISE, f"{name} as {path.relative_to(self._folder)}")

    def _called(self, name: str) -> list[Path]:
        """Return the files of this name; where there is none, those that differ from it in capitals, or in how letters
        with accents are composed, alone."""
        if self._by_name is None:
            self._by_name = {}
            for path in list_files(self._folder, self._suffixes).files:
                self._by_name.setdefault(composed(path.name).casefold(), []).append(path)
        paths = self._by_name.get(composed(name).casefold(), [])
        return [path for path in paths if composed(path.name) == composed(name)] or paths


def _spellings(name: str) -> list[str]:
    """Return a listed name as this system would write it, in order of preference."""
    return list(dict.fromkeys(text.replace(*pair) for pair in _SLASHES for text in (name, unquote(name))))
