"""What was packed of real data verifies, and whoever waits for that or for statistics sees how far it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.pack.semantic import pack_semantic
from vitgraft.data_shards.report import inspect, verify


def ade20k(root: Path, out: Path) -> Manifest:
    folder, classes = root / "ade20k_sample", [f"class{number}" for number in range(150)]
    return pack_semantic(folder / "images", folder / "annotations", out, classes, reduce_zero=True)


def palette(root: Path, out: Path) -> Manifest:
    folder, labels = root / "seg_samples_small" / "palette_256x128", out.with_name("labels")
    labels.mkdir()
    for image in (folder / "imgs").iterdir():
        label = image.name.replace("_img.jpg", "_gt.png")
        shutil.copy(folder / "gts" / label, labels / f"{image.stem}.png")
    return pack_semantic(folder / "imgs", labels, out, ["a", "b", "c", "d"])


def coco_val(root: Path, out: Path) -> Manifest:
    folder = root / "coco_tiny"
    return pack_coco(folder / "images" / "val2017", folder / "annotations" / "instances_val2017.json", out)


@pytest.mark.parametrize(("pack", "samples"), [(ade20k, 3), (palette, 5), (coco_val, 6)])
def test_real_data_verifies(
    pack: Callable[[Path, Path], Manifest], samples: int, test_data: Path, tmp_path: Path
) -> None:
    assert pack(test_data, tmp_path / "set").samples == samples
    report = verify(tmp_path / "set")
    assert (report.bad_files, report.bad_samples) == ([], {})
    assert sum(inspect(tmp_path / "set").sizes.values()) == samples


def test_progress_counts_files_and_samples_damaged_or_not(packed: dict[str, Path], tmp_path: Path) -> None:
    """Verifying hashes three shards and their indices, then decodes twenty-two samples; statistics read the latter."""
    folder = Path(shutil.copytree(packed["semantic"], tmp_path / "set"))
    damage_the_last(folder)
    seen: list[tuple[int, int]] = []
    report = verify(folder, lambda done, total: seen.append((done, total)))
    assert (len(report.bad_files), len(report.bad_samples)) == (1, 1)
    assert seen == [(number + 1, 28) for number in range(28)]
    seen.clear()
    assert len(inspect(folder, progress=lambda done, total: seen.append((done, total))).unreadable) == 1
    assert seen == [(number + 1, 22) for number in range(22)]


def damage_the_last(folder: Path) -> None:
    """Nothing but 0xff where the last sample was."""
    shard = read_manifest(folder).shards[2]
    offsets = np.fromfile(folder / shard.index_name, dtype="<u8")
    with (folder / shard.name).open("r+b") as stream:
        stream.seek(int(offsets[-2]))
        stream.write(b"\xff" * int(offsets[-1] - offsets[-2]))
