"""What is tried with labels, manifests and class lists that were changed at random, and the whole ones."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from vitgraft.data_shards.decode import decode_json
from vitgraft.data_shards.foreign_boxes import ForeignBoxes
from vitgraft.data_shards.manifest import MANIFEST, Manifest, read_manifest
from vitgraft.data_shards.pack.bdd100k import pack_bdd100k
from vitgraft.data_shards.pack.class_lists import read_classes
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.pack.label_report import LabelReport
from vitgraft.data_shards.pack.panoptic import pack_panoptic
from vitgraft.data_shards.report import verify

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 8, 255, 256, 0.5, 1.5, -3.25, 39, 40, 1e308, -1e308, math.nan, math.inf),
    *(2**31, -(2**31), 2**53, 2**62, 2**63, 2**64, 10**30, 10**400, 1e-320, "@LONG@", "@DEEP@"),
    *("", " ", "7", "-1", "1e400", "0x10", "٣", "nan", "a.png", "b.png", "../a.png", "/etc/passwd", "a\0b", "\ud800"),
    *("x" * 5000, "a/" * 3000, "%00", "%2e%2e/a.png", "\\\\host\\a.png", "\n", "\x1b[2J", "car", "none"),
    *([], {}, [[]], [{}], [None], [0], ["7"], [1, 2], [1, 2, 3, 4], [[1, 2, 3, 4, 5, 6]], [[1, 2], [3, 4], [5, 6]]),
    *({"size": [30, 40], "counts": "0"}, {"size": [30, 40], "counts": [1200]}, {"counts": []}, {"id": 1}),
]
CLASSES = [None, None, ["dog"], ["bottle", "dog"], ["x"], ["pedestrian", "car"]]


def changed(tree: Any, generator: random.Random) -> Any:
    """A copy with some values replaced, removed, repeated, moved or wrapped."""
    tree = [copy.deepcopy(tree)]
    for _ in range(generator.choice((1, 1, 1, 2, 3, 8))):
        holder, key = _place(tree, generator)
        match generator.randrange(10):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, list) and holder is not tree:
                del holder[key]
            case 2 if isinstance(holder, list) and holder is not tree:
                holder.append(copy.deepcopy(holder[key]))
            case 3:
                other, place = _place(tree, generator)
                holder[key] = copy.deepcopy(other[place])
            case 4:
                holder[key] = str(holder[key])[:200]
            case 5 if generator.random() < 0.1:
                for _ in range(generator.choice((3, 50))):
                    holder[key] = [holder[key]]
            case 6 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = generator.choice((-holder[key], holder[key] + 1, holder[key] * 1000))
            case _:
                holder[key] = copy.deepcopy(generator.choice(VALUES))
    return tree[0]


def _place(tree: Any, generator: random.Random) -> tuple[Any, Any]:
    """A holder and the key of one of its values, at a random depth."""
    holder, key = tree, 0
    while isinstance(holder[key], dict | list) and holder[key] and generator.random() < 0.85:
        holder = holder[key]
        key = generator.choice(list(holder)) if isinstance(holder, dict) else generator.randrange(len(holder))
    return holder, key


@cache
def workplace() -> Path:
    """A folder of this process with images, panoptic PNGs, masks, and a packed set."""
    root = Path(tempfile.mkdtemp())
    for name in ("images", "panoptic", "set"):
        (root / name).mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), (90, 90, 90)).save(root / "images" / f"{name}.png")
    ids = np.zeros((30, 40, 3), np.uint8)
    ids[:10, :, 0], ids[10:20, :, 0] = 7, 8
    Image.fromarray(ids).save(root / "panoptic" / "a.png")
    shutil.rmtree(root / "set")
    (root / "coco.json").write_text(json.dumps(COCO))
    pack_coco(root / "images", root / "coco.json", root / "set")
    return root


_IMAGES = [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}]
_IMAGES += [{"id": 9, "file_name": "b.png", "width": 40, "height": 30}]
_CATEGORIES = [{"id": 18, "name": "dog", "supercategory": "pets", "isthing": 1}]
_CATEGORIES += [{"id": 44, "name": "bottle", "supercategory": "none", "isthing": 0}]
_BOX: dict[str, Any] = {"image_id": 7, "category_id": 18, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0}
_RLE = {"size": [30, 40], "counts": coco_mask.encode(np.eye(30, 40, dtype=np.uint8, order="F"))["counts"].decode()}
COCO: dict[str, Any] = {
    "images": _IMAGES,
    "annotations": [
        {"id": 1, **_BOX, "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]},
        {"id": 2, **_BOX, "category_id": 44, "segmentation": {"size": [30, 40], "counts": [100, 50, 1050]}},
        {"id": 3, **_BOX, "iscrowd": 1, "segmentation": _RLE},
        {"id": 4, **_BOX, "image_id": 9},
    ],
    "categories": _CATEGORIES,
}
PANOPTIC: dict[str, Any] = {
    "images": _IMAGES,
    "annotations": [
        {
            "image_id": 7,
            "file_name": "a.png",
            "segments_info": [{"id": 7, "category_id": 18, "iscrowd": 0}, {"id": 8, "category_id": 44, "iscrowd": 1}],
        }
    ],
    "categories": _CATEGORIES,
}
BDD100K: list[Any] = [
    {
        "name": "a.jpg",
        "labels": [
            {
                "id": 1,
                "category": "car",
                "box2d": {"x1": 1, "y1": 2, "x2": 30, "y2": 20},
                "attributes": {"crowd": False},
            },
            {"id": 2, "category": "trailer", "box2d": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}},
            {"id": 3, "category": "lane", "poly2d": []},
        ],
    },
    {"name": "b.jpg", "labels": None},
]


def try_labels(data: bytes, generator: random.Random) -> None:
    """Pack labels that were changed, or whose bytes were damaged; what is packed is sound."""
    root = workplace()
    tree, pack = generator.choice(
        ((COCO, _pack_coco), (COCO, _pack_coco), (PANOPTIC, _pack_panoptic), (BDD100K, _pack_bdd))
    )
    text = _dump(changed(tree, generator)) if generator.random() < 0.9 else data
    (root / "panoptic.json").write_bytes(text)
    options: dict[str, Any] = {"on_error": generator.choice(("raise", "skip")), "overwrite": True}
    told: list[str] = []
    shutil.rmtree(root / "out", ignore_errors=True)
    try:
        pack(root, generator, options | {"classes": generator.choice(CLASSES), "say": told.append})
    finally:
        assert all(line.isprintable() for line in told), told
    assert verify(root / "out").ok


def _pack_coco(root: Path, generator: random.Random, options: dict[str, Any]) -> Manifest:
    crowds = generator.choice((None, "keep", "objects"))
    return pack_coco(root / "images", root / "panoptic.json", root / "out", crowds=crowds, **options)


def _pack_panoptic(root: Path, generator: random.Random, options: dict[str, Any]) -> Manifest:
    return pack_panoptic(root / "images", root / "panoptic.json", root / "out", **options)


def _pack_bdd(root: Path, generator: random.Random, options: dict[str, Any]) -> Manifest:
    return pack_bdd100k([root / "images"], root / "panoptic.json", root / "out", **options)


def try_foreign_boxes(data: bytes, generator: random.Random) -> None:
    """Read the annotations of a tar's sample."""
    tree = {"annotations": [a | {"class": generator.choice((0, "dog", "1"))} for a in COCO["annotations"]]}
    text = _dump(changed(tree, generator)) if generator.random() < 0.9 else data
    boxes = ForeignBoxes(LabelReport("instances", ["dog", "cat"], on_error=generator.choice(("raise", "skip"))))
    boxes.count(boxes.read(text, (30, 40), "x"))
    boxes.close()
    boxes.report.lines()
    decode_json(text, "x")
    boxes.report.close()


def try_manifest(data: bytes, generator: random.Random) -> None:
    """Read a data set whose manifest was changed."""
    root = workplace()
    folder = root / "changed"
    if not folder.is_dir():
        shutil.copytree(root / "set", folder)
    tree = json.loads((root / "set" / MANIFEST).read_text())
    (folder / MANIFEST).write_bytes(_dump(changed(tree, generator)) if generator.random() < 0.8 else data)
    read_manifest(folder)


def try_class_list(data: bytes, generator: random.Random) -> None:
    """Read a class list of any kind."""
    path = workplace() / generator.choice(("names.txt", "names.json", "classInd.txt", "data.yaml", "a.xml"))
    if path.suffix == ".json":
        data = _dump(changed(generator.choice((["a", "b"], {"[a] b": 0, "c": "1"})), generator))
    path.write_bytes(data)
    names = read_classes(str(path))
    assert names
    assert all(isinstance(name, str) and name.strip() for name in names)


def _dump(tree: Any) -> bytes:
    text = json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    text = text.replace(b'"@LONG@"', b"9" * 5000).replace(b'"@DEEP@"', b"[" * 100_000 + b"]" * 100_000)
    return text if len(text) < 1 << 20 else text[: 1 << 20]


def originals() -> dict[Callable[[bytes, random.Random], None], list[bytes]]:
    """Whole inputs, whose bytes are damaged, for each of the above."""
    texts = [_dump(tree) for tree in (COCO, PANOPTIC, BDD100K)]
    names = [
        b"dog\ncat\n",
        b"1 dog\n2 cat\n",
        b"names: [a, b]\nnc: 2\n",
        b"<annotation></annotation>",
        b"\xef\xbb\xbfa\n",
    ]
    return {
        try_labels: texts,
        try_foreign_boxes: [_dump({"annotations": COCO["annotations"]})],
        try_manifest: [(workplace() / "set" / MANIFEST).read_bytes()],
        try_class_list: names,
    }
