"""Verify and inspect a packed data set."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitgraft.configs.errors import DataError
from vitgraft.configs.hashing import sha256_file
from vitgraft.configs.schema.data import CacheConfig
from vitgraft.data_shards.decode import (
    check_annotations,
    decode_json,
    decode_label,
    decode_masks,
    probe_video,
    shown,
    stated_label,
    stated_size,
)
from vitgraft.data_shards.frame_stack import FrameStack
from vitgraft.data_shards.frames import ImageFrames, clip_of
from vitgraft.data_shards.images import IMAGE_EXTENSIONS, decode_image, orientation_of, oriented_size, read_header
from vitgraft.data_shards.manifest import CLASSED, IGNORE, Manifest, read_manifest
from vitgraft.data_shards.parallel import outcomes
from vitgraft.data_shards.pictures import write_picture
from vitgraft.data_shards.remote import UnreachableError
from vitgraft.data_shards.sources import open_cache, resolve_source
from vitgraft.data_shards.stream import RawSample, ShardReader

Progress = Callable[[int, int], None]

_CHECKED_AT_ONCE = 16


@dataclass
class VerifyReport:
    """Result of :func:`verify`.

    ``bad_files``: a line for each shard or index whose bytes changed. ``bad_samples``: reasons by key.
    """

    folder: Path | str
    manifest: Manifest
    bad_files: list[str] = field(default_factory=list)
    bad_samples: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No damage at all."""
        return not self.bad_files and not self.bad_samples

    @property
    def remedy(self) -> str:
        """Remedy of the damage: another copy, unless the data was damaged before packing."""
        if self.bad_files:
            return "copy it again or pack again"
        same = "the shards are as they were written, so these were damaged before"
        if self.manifest.foreign is not None:
            return f"{same}: index again with --decode --drop-faulty, or train with data.on_error: {{skip: N}}"
        return (
            f"{same}: replace their files and pack again, or pack with --decode --drop-faulty, which leaves them out, "
            "or train with data.on_error: {skip: N}"
        )


def verify(folder: Path | str, progress: Progress | None = None, jobs: int = 1) -> VerifyReport:
    """Hash every file against the manifest and decode every sample, in ``jobs`` processes.

    Args:
        progress: called with the files and samples that are done, and how many there are in all.

    Raises:
        DataError: there is no readable manifest, or a file is missing or of another size.
    """
    folder = resolve_source(str(folder))
    manifest = read_manifest(folder)
    report = VerifyReport(folder, manifest)
    stated: list[tuple[Path, str]] = []
    tars = manifest.tars(folder)
    for shard in manifest.shards:
        # What is behind a URL is hashed when it is fetched.
        stated += [(tars / shard.name, shard.sha256)] if isinstance(tars, Path) else []
        stated += [(folder / shard.index_name, shard.index_sha256)] if isinstance(folder, Path) else []
    total = len(stated) + manifest.samples
    with contextlib.closing(outcomes(_hash, [path for path, _ in stated], jobs)) as hashes:
        for number, ((path, expected), outcome) in enumerate(zip(stated, hashes, strict=True)):
            if (found := outcome.get()) != expected:
                report.bad_files.append(f"{path}: SHA-256 {found[:12]}, expected {expected[:12]}")
            if progress is not None:
                progress(number + 1, total)
    reader = ShardReader(folder, manifest, open_cache(CacheConfig()))
    with contextlib.closing(outcomes(partial(_check_of, reader), range(len(reader)), jobs, _CHECKED_AT_ONCE)) as checks:
        for sample, check in enumerate(checks):
            if (reason := check.get()) is not None:
                report.bad_samples[reader.key(sample)] = reason
            if progress is not None:
                progress(len(stated) + sample + 1, total)
    reader.close()
    return report


def _check_of(reader: ShardReader, sample: int) -> str | None:
    """Return the fault of a sample; ``None``: it is good."""
    try:
        check_sample(reader.read(sample), reader.manifest)
    except UnreachableError:
        raise
    except DataError as error:
        return str(error)
    return None


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        return f"unreadable ({error.strerror})"


def check_sample(raw: RawSample, manifest: Manifest) -> dict[str, Any]:
    """Decode everything in a sample; returns its metadata.

    Raises:
        DataError: something in it is damaged or does not fit together.
    """
    metadata = decode_json(raw.first(("json",)), raw.where)
    expected = metadata.get("height"), metadata.get("width")
    if manifest.kind == "video":
        clip = clip_of(raw, metadata)
        facts = probe_video(clip, raw.where)
        if isinstance(clip, ImageFrames):
            # They were counted by name alone.
            for number in range(clip.length):
                clip.fill(FrameStack([0, number], raw.where))
        if facts["frames"] != metadata.get("frames"):
            raise DataError(
                f"{raw.where}: {facts['frames']} frames, expected {shown(metadata.get('frames'))}; pack again"
            )
        found = (facts["height"], facts["width"])
    else:
        orientation = orientation_of(metadata, raw.where)
        image = decode_image(raw.first(IMAGE_EXTENSIONS), raw.where, orientation)
        found = (image.shape[1], image.shape[2])
    if found != expected:
        raise DataError(f"{raw.where}: (height, width) {found}, metadata says {shown(expected)}; pack again")
    if manifest.kind in CLASSED:
        stated_label(metadata, len(manifest.classes), raw.where)
    elif manifest.kind == "detection":
        annotations = check_annotations(metadata, len(manifest.classes), raw.where)
        decode_masks(annotations, (found[0], found[1]), raw.where)
    elif manifest.kind == "semantic":
        label_map = decode_label(raw.first(("label.png",)), raw.where)
        wrong = (label_map != IGNORE) & (label_map >= len(manifest.classes))
        if tuple(label_map.shape) != found or bool(wrong.any()):
            raise DataError(f"{raw.where}: label map of another size or with an unknown class id; pack again")
    return metadata


@dataclass
class InspectReport:
    """Statistics of a data set.

    ``class_counts``: detection: instances; semantic: pixels; video: clips; image: images, by class name. ``sizes``: how
    many images have each (height, width). ``unlabelled``: detection: images without annotations; semantic: ignored
    pixels. ``unreadable``: samples left out of the statistics.
    """

    manifest: Manifest
    class_counts: dict[str, int]
    sizes: dict[tuple[int, int], int]
    unlabelled: int
    unreadable: dict[str, str]
    pictures: list[Path]


def inspect(
    folder: Path | str, draw: int = 0, out: Path | None = None, progress: Progress | None = None
) -> InspectReport:
    """Count classes and sizes; draw the first ``draw`` readable samples with their labels as PNGs into ``out``.

    Raises:
        DataError: there is no readable manifest.
        ConfigError: ``out`` cannot be written, or holds other files of these names.
    """
    from vitgraft.data_shards.draw import draw_sample

    folder = resolve_source(str(folder))
    manifest = read_manifest(folder)
    counts: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    unlabelled = 0
    unreadable: dict[str, str] = {}
    pictures: list[Path] = []
    reader = ShardReader(folder, manifest, open_cache(CacheConfig()))
    for sample in range(len(reader)):
        try:
            raw = reader.read(sample)
            found, size, without = _statistics(raw, manifest)
            if len(pictures) < draw and out is not None:
                write_picture(out / f"{raw.key}.png", draw_sample(raw, manifest), f"--out {out}")
                pictures.append(out / f"{raw.key}.png")
        except UnreachableError:
            raise
        except DataError as error:
            unreadable[reader.key(sample)] = str(error)
        else:
            counts.update(found)
            sizes[size] += 1
            unlabelled += without
        if progress is not None:
            progress(sample + 1, len(reader))
    reader.close()
    named = {name: counts[number] for number, name in enumerate(manifest.classes)}
    return InspectReport(manifest, named, dict(sizes.most_common()), unlabelled, unreadable, pictures)


def _statistics(raw: RawSample, manifest: Manifest) -> tuple[Counter[int], tuple[int, int], int]:
    """Return counts by class id, (height, width), and the unlabelled count of one sample."""
    metadata = decode_json(raw.first(("json",)), raw.where)
    if manifest.kind == "detection":
        annotations = check_annotations(metadata, len(manifest.classes), raw.where)
        stored = read_header(raw.first(IMAGE_EXTENSIONS), raw.where).size
        size = oriented_size(stored, orientation_of(metadata, raw.where))
        return Counter(int(item["class"]) for item in annotations), size, int(not annotations)
    if manifest.kind == "semantic":
        label = decode_label(raw.first(("label.png",)), raw.where)
        values, numbers = torch.unique(label, return_counts=True)
        found = Counter(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
        return found, (label.shape[0], label.shape[1]), found.pop(IGNORE, 0)
    number = stated_label(metadata, len(manifest.classes), raw.where)
    return Counter([number]), stated_size(metadata, raw.where), 0
