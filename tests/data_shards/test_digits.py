"""The built-in data set: fair, reproducible, and packed once however many ask for it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards import sources
from vitgraft.data_shards.decode import decode_frames, decode_label
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack.digits import pack_digits, scans_of
from vitgraft.data_shards.pack.scenes import MOTIONS, digit_alpha, moving_digit, padded_scan, scene
from vitgraft.data_shards.sources import ensure_digits, resolve_source
from vitgraft.data_shards.stream import ShardReader


def read(folder: Path) -> list[tuple[dict[str, bytes], dict[str, Any]]]:
    reader = ShardReader(folder, read_manifest(folder))
    members = [reader.read(i).members for i in range(len(reader))]
    return [(each, json.loads(each["json"])) for each in members]


def test_train_and_val_share_no_scan() -> None:
    from sklearn.datasets import load_digits

    everything = Counter(image.tobytes() for image in load_digits().images.astype(np.float64))
    train = Counter(image.tobytes() for image in scans_of("train")[0])
    val = Counter(image.tobytes() for image in scans_of("val")[0])
    assert train + val == everything
    assert sum(train.values()) == 1437
    assert set(scans_of("val")[1].tolist()) == set(range(10))


@pytest.mark.parametrize("kind", ["detection", "semantic", "video"])
def test_same_seed_same_bytes(kind: Any, tmp_path: Path) -> None:
    one = pack_digits(kind, "train", tmp_path / "one", samples=6)
    two = pack_digits(kind, "train", tmp_path / "two", samples=6)
    other = pack_digits(kind, "train", tmp_path / "other", samples=6, seed=1)
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_masks_are_disjoint_tight_and_mostly_visible(packed: dict[str, Path]) -> None:
    numbers = []
    for _, metadata in read(packed["detection"]):
        masks = [coco_mask.decode(a["segmentation"]) for a in metadata["annotations"]]
        numbers.append(len(masks))
        assert int(np.sum(masks, axis=0).max()) == 1
        for mask, annotation in zip(masks, metadata["annotations"], strict=True):
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum() >= 10
    assert min(numbers) >= 1
    assert max(numbers) <= 8


def test_covered_digits_stay_at_least_half_visible() -> None:
    scans, labels = scans_of("val")
    images = [padded_scan(scan) for scan in scans]
    covered = 0
    for seed in range(30):
        _, digits = scene(np.random.RandomState(seed), images, labels)
        assert all(digit.visible.any() for digit in digits)
        # What a digit had before others covered it: its visible part plus what later ones may have taken.
        for index, digit in enumerate(digits):
            later = [other.visible for other in digits[index + 1 :]]
            covered += bool(later) and bool((np.logical_or.reduce(later) & _grown(digit.visible)).any())
    assert covered > 10


def _grown(mask: np.ndarray) -> np.ndarray:
    return mask | np.roll(mask, 1, 0) | np.roll(mask, -1, 0) | np.roll(mask, 1, 1) | np.roll(mask, -1, 1)


def test_semantic_scenes_are_the_detection_scenes(packed: dict[str, Path]) -> None:
    assert read_manifest(packed["semantic"]).classes == ["background", *map(str, range(10))]
    for (a, scene_data), (b, _) in zip(read(packed["detection"]), read(packed["semantic"]), strict=True):
        assert a["jpg"] == b["jpg"]
        expected = np.zeros((128, 128), dtype=np.int32)
        for annotation in scene_data["annotations"]:
            expected[coco_mask.decode(annotation["segmentation"]) > 0] = annotation["class"] + 1
        assert np.array_equal(decode_label(b["label.png"], "x").numpy(), expected)


def test_digits_stand_out_from_what_is_behind_them(packed: dict[str, Path]) -> None:
    """A pixel inside a digit differs in brightness from the median of the pixels around the digit."""
    import io

    differences = []
    for members, metadata in read(packed["detection"]):
        grey = np.asarray(Image.open(io.BytesIO(members["jpg"])).convert("L")).astype(float)
        for annotation in metadata["annotations"]:
            mask = coco_mask.decode(annotation["segmentation"]) > 0
            ring = _grown(_grown(_grown(mask))) & ~_grown(mask)
            differences.append(abs(np.median(grey[mask]) - np.median(grey[ring])))
    assert np.median(differences) > 50


def test_turning_as_pillow_turns() -> None:
    scan = padded_scan(scans_of("val")[0][0])
    upright = digit_alpha(scan, 64, (32, 32), 32, 0)
    turned = digit_alpha(scan, 64, (32, 32), 32, 90)
    assert np.abs(turned - np.rot90(upright)).mean() < 0.01
    assert np.abs(upright - np.rot90(upright)).mean() > 0.05


def test_motions_move_as_they_say() -> None:
    """Measured on the frames: the centre of what moves (on the wrapped picture) and its extent."""
    scan = padded_scan(scans_of("train")[0][3])
    for motion, step in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items():
        for seed in range(5):
            frames = np.stack(moving_digit(np.random.RandomState(seed), scan, motion)).astype(float)
            # The right shift between successive frames explains the movement: it is the one with the best fit.
            moving = np.abs(frames - np.median(frames, axis=0)).sum(-1)
            best = _best_shift(moving[4], moving[5])
            assert np.sign(best).tolist() == list(step), (motion, seed)


def _best_shift(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    shifts = [(x, y) for x in range(-7, 8) for y in range(-7, 8) if x == 0 or y == 0]
    return max(shifts, key=lambda s: float((np.roll(before, (s[1], s[0]), (0, 1)) * after).sum()))


def test_growing_and_shrinking_mirror_each_other() -> None:
    scan = padded_scan(scans_of("train")[0][3])
    for seed in range(3):
        grow = moving_digit(np.random.RandomState(seed), scan, "growing")
        shrink = moving_digit(np.random.RandomState(seed), scan, "shrinking")
        assert all(np.array_equal(a, b) for a, b in zip(grow, reversed(shrink), strict=True))


def test_motions_are_balanced_and_decode_as_drawn(tmp_path: Path) -> None:
    manifest = pack_digits("video", "train", tmp_path / "set", samples=32)
    samples = read(tmp_path / "set")
    assert manifest.classes == MOTIONS
    assert Counter(metadata["label"] for _, metadata in samples) == dict.fromkeys(range(8), 4)
    assert [metadata["label"] for _, metadata in samples[:8]] != list(range(8))
    members, metadata = samples[0]
    assert metadata["frames"] == 12
    assert decode_frames(members["mp4"], range(12), "x").shape == (12, 3, 64, 64)


def test_encoding_loses_little() -> None:
    from vitgraft.data_shards.pack.digits import encode_clip

    drawn = moving_digit(np.random.RandomState(0), padded_scan(scans_of("train")[0][3]), "left")
    decoded = decode_frames(encode_clip(drawn, 12), range(12), "x").permute(0, 2, 3, 1).numpy()
    assert np.abs(decoded.astype(float) - np.stack(drawn)).mean() < 8


@pytest.mark.parametrize("uri", ["digits:", "digits:detection", "digits:detection/test", "digits:boxes/train", "digit"])
def test_unknown_built_in_sets(uri: str) -> None:
    with pytest.raises(ConfigError, match="digits:detection/train, digits:detection/val"):
        ensure_digits(uri)


def test_plain_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert resolve_source("data/set") == Path("data/set")
    assert resolve_source("~/set") == Path("/somewhere/set")


def test_missing_scikit_learn_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'vitgraft\[demo\]'"):
        pack_digits("detection", "val", tmp_path / "set")


ENSURE = """
import sys
from vitgraft.data_shards import sources
from vitgraft.data_shards.pack import digits
digits.DEFAULT_SAMPLES["video", "val"] = 20
packed = []
original = digits.pack_digits
digits.pack_digits = lambda *args, **options: (packed.append(1), original(*args, **options))
print(sources.resolve_source("digits:video/val"), len(packed))
"""


@pytest.mark.slow
def test_two_processes_at_once_pack_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITGRAFT_CACHE", str(tmp_path))
    command = [sys.executable, "-c", ENSURE]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate()[0].split() for process in both)
    folder = tmp_path / "digits-v1" / "video-val"
    assert answers == [[str(folder), "0"], [str(folder), "1"]]
    assert read_manifest(folder).samples == 20
    # A damaged cache is made again instead of failing for ever.
    (folder / "shard-000000.tar").write_bytes(b"")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1] == "1"
    assert read_manifest(folder).samples == 20


def test_built_in_data_that_somebody_else_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITGRAFT_CACHE", str(tmp_path))
    folder = ensure_digits("digits:video/val")
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text())
    before = (folder / "manifest.json").stat().st_mtime_ns
    ensure_digits("digits:video/val")
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    # All could have exchanged its samples.
    folder.chmod(0o777)
    ensure_digits("digits:video/val")
    assert (folder / "manifest.json").stat().st_mtime_ns != before
    folder.parent.chmod(0o777)
    with pytest.raises(DataError, match=r"digits-v1: not this user's own, or writable by all; chmod o-w or set VITG"):
        ensure_digits("digits:video/val")


def test_the_lock_of_built_in_data_is_not_followed_nor_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITGRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(sources, "TELL_SECONDS", 0.1)
    lock, target = tmp_path / "digits-v1" / "video-val.lock", tmp_path / "precious"
    lock.parent.mkdir()
    target.write_text("mine")
    lock.symlink_to(target)
    with pytest.raises(DataError, match=r"video-val\.lock: cannot be written"):
        ensure_digits("digits:video/val")
    assert target.read_text() == "mine"
    lock.unlink()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=rf"video-val\.lock: locked by process {os.getpid()} "):
            ensure_digits("digits:video/val")
