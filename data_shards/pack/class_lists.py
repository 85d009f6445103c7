"""Class names in order: from a file, a comma-separated list, or another packed data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.manifest import MANIFEST, read_manifest
from vitgraft.data_shards.pack.files import check_classes, is_file, read_json, read_text
from vitgraft.data_shards.pack.other_formats import refuse_other_format
from vitgraft.data_shards.remote import is_url

_FILE_ENDINGS = {".txt", ".json", ".names", ".csv", ".yaml", ".yml", ".xml"}


def read_classes(text: str) -> list[str]:
    """Read what ``--classes`` names.

    Args:
        text: a file with one name in each line; UCF101's classInd.txt; a JSON list, or Something-Something's labels
            (name: number); the folder or URL of a packed data set, whose classes are meant; or names with commas.

    Raises:
        DataError: a file that cannot be read, or names that are not distinct.
        ConfigError: a file or folder that is not there, or a folder that holds no data set.
    """
    path = Path(text)
    if is_url(text):
        return read_manifest(text).classes
    # Not Path.is_dir: of many names with commas it raises, as of a file name that is too long.
    if os.path.isdir(path):
        if not is_file(path / MANIFEST):
            raise ConfigError(f"--classes {text}: no packed data set; name one, a file of names, or names with commas")
        return read_manifest(path).classes
    if os.path.exists(path):
        names = _read_file(path, text)
    elif "," not in text and (path.suffix.lower() in _FILE_ENDINGS or os.sep in text):
        raise ConfigError(f"--classes {text}: no such file or folder; check the path, or give names with commas")
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
    check_classes(names, f"--classes {text}")
    return names


def _read_file(path: Path, text: str) -> list[str]:
    refuse_other_format(path)
    if path.suffix.lower() == ".json":
        return _of_json(read_json(path), text)
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if path.name != "classInd.txt":
        return lines
    numbered = [line.split(None, 1) for line in lines]
    if [parts[0] for parts in numbered if len(parts) == 2] != [str(i) for i in range(1, len(lines) + 1)]:
        raise DataError(f"{path}: expected lines NUMBER NAME, numbered from 1")
    return [parts[1] for parts in numbered]


def _of_json(tree: Any, where: str) -> list[str]:
    if isinstance(tree, list) and all(isinstance(name, str) for name in tree):
        return list(tree)
    if isinstance(tree, dict) and sorted(map(str, tree.values())) == sorted(map(str, range(len(tree)))):
        return [without_brackets(name) for name in sorted(tree, key=lambda name: int(tree[name]))]
    raise DataError(f"--classes {where}: expected a JSON list of names, or an object name: number, numbered from 0")


def without_brackets(template: str) -> str:
    """Return a template of Something-Something as its labels JSON has it."""
    return template.replace("[", "").replace("]", "").strip()
