"""Small packed data sets, and recipes that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.pack.digits import pack_digits

Configure = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twenty-two digits scenes or clips of each kind, in shards of ten; never changed by a test."""
    root = tmp_path_factory.mktemp("packed")
    for kind in ("detection", "semantic", "video"):
        pack_digits(kind, "val", root / kind, samples=22, samples_per_shard=10)  # type: ignore[arg-type]
    return {kind: root / kind for kind in ("detection", "semantic", "video")}


@pytest.fixture(scope="session")
def configure() -> Configure:
    """A data section that reads a folder; keyword arguments change its keys."""

    def make(folder: Path, **changes: Any) -> DataConfig:
        clip = {"frames": 4, "sampling": "dense", "stride": 2}
        tree = {"train": {"path": str(folder)}, "image_size": [96, 96], "workers": 0, "clip": clip}
        return DataConfig.model_validate(tree | changes)

    return make


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with images/a.png, images/b.png (40x30), and a valid instances tree that is not yet written."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((30, 40, 3), 90, dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    images = [{"id": i, "file_name": f"{n}.png", "width": 40, "height": 30} for i, n in ((7, "a"), (9, "b"))]
    box = {"id": 1, "image_id": 7, "category_id": 18, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0}
    box["segmentation"] = [[2, 3, 12, 3, 12, 11, 2, 11]]
    categories = [{"id": 44, "name": "bottle"}, {"id": 18, "name": "dog"}]
    return tmp_path, {"images": images, "annotations": [box], "categories": categories}


@pytest.fixture
def write_coco() -> Callable[[Path, Any], Path]:
    """Writes an instances tree beside the images."""

    def write(folder: Path, tree: Any) -> Path:
        path = folder / "instances.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return path

    return write
