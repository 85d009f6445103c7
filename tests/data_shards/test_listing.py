"""What counts in a folder that somebody else filled, and what is passed over and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.listing import AGAIN, HIDDEN, IMAGE_SUFFIXES, OTHER, list_files


def names(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def test_images_of_every_suffix_and_what_systems_leave_among_them(tmp_path: Path) -> None:
    for name in ("b/x.JPG", "a.tif", "a/y.bmp", "a/z.JPEG", "Thumbs.db", "a/notes.txt", ".DS_Store", "a/._y.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for folder in (".thumbs", "__MACOSX"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "y.bmp").write_bytes(b"")
    (tmp_path / "a" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.png")
    found = list_files(tmp_path, IMAGE_SUFFIXES)
    assert names(found.files, tmp_path) == ["a/y.bmp", "a/z.JPEG", "a.tif", "b/x.JPG"]
    assert {reason: names(paths, tmp_path) for reason, paths in found.passed_over.items()} == {
        HIDDEN: [".DS_Store", ".thumbs", "__MACOSX", "a/._y.bmp"],
        OTHER: ["Thumbs.db", "a/notes.txt", "a/pipe.png"],
    }


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "one.png").write_bytes(b"")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "up").symlink_to(folder)
    # Each folder twice in the one before: more than a million ways to the last.
    for number in range(20):
        (folder / f"d{number}").mkdir()
        (folder / f"d{number}" / "a").symlink_to(folder / f"d{number + 1}")
        (folder / f"d{number}" / "b").symlink_to(folder / f"d{number + 1}")
    (folder / "d20").mkdir()
    (folder / "d20" / "two.png").write_bytes(b"")
    found = list_files(folder, IMAGE_SUFFIXES)
    assert [path.name for path in found.files] == ["one.png", "two.png"]
    assert names(found.files, folder)[0] == "cat/one.png"
    assert folder / "cat" / "up" in found.passed_over[AGAIN]


def test_what_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; check the path"):
        list_files(tmp_path / "nowhere", IMAGE_SUFFIXES)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file: cannot be listed: Not a directory"):
        list_files(tmp_path / "file", IMAGE_SUFFIXES)
