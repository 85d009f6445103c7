"""Recognition of label formats that no packer reads, and the remedy for each."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vitgraft.configs.errors import DataError

_LOOKED_AT = 2000
"""Files of a folder; its labels are among the first."""
_HEAD = 4096
_YOLO_LINE = re.compile(rb"\s*\d+(\s+-?\d*\.?\d+([eE][+-]?\d+)?){4,}\s*$")
_YOLO_LISTS = {".yaml", ".yml"}
_CONVERT = (
    "convert them to COCO JSON, e.g. by the package supervision: DetectionDataset.from_{}(...).as_coco(...), and pack "
    "that with vitgraft shards pack coco"
)


def refuse_other_format(labels: Path) -> None:
    """Raise DataError for Pascal VOC's XML and YOLO's labels or data.yaml, given as a file or as a folder of such."""
    for path in [labels] if not os.path.isdir(labels) else itertools.islice(_below(labels), _LOOKED_AT):
        if path.suffix.lower() == ".xml" and b"<annotation" in _head(path):
            raise DataError(f"{path}: labels of Pascal VOC (XML), which are not read; {_CONVERT.format('pascal_voc')}")
        if path.suffix.lower() in _YOLO_LISTS and re.search(rb"^\s*(names|nc)\s*:", _head(path), re.MULTILINE):
            raise DataError(f"{path}: data.yaml of YOLO, whose labels are not read; {_CONVERT.format('yolo')}")
        if path.suffix.lower() == ".txt" and _YOLO_LINE.match(_head(path).partition(b"\n")[0]):
            raise DataError(f"{path}: labels of YOLO, which are not read; {_CONVERT.format('yolo')}")


def _below(folder: Path) -> Iterator[Path]:
    for above, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(above, name) for name in sorted(names) if not name.startswith("."))


def _head(path: Path) -> bytes:
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            with path.open("rb") as stream:
                return stream.read(_HEAD)
    return b""
