"""From entries to batches: reading, decoding and transforming, a pure function of (data, recipe, entries)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.hashing import seed_of
from vitgraft.configs.schema.data import DataConfig
from vitgraft.data_shards.batch import Batch, Entry, Truth
from vitgraft.data_shards.decode import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    check_annotations,
    decode_frames,
    decode_image,
    decode_json,
    decode_label,
    decode_masks,
    probe_video,
    sample_frames,
)
from vitgraft.data_shards.manifest import IGNORE, Kind, read_manifest
from vitgraft.data_shards.plan import EpochPlan, MicroBatch
from vitgraft.data_shards.sources import resolve_source
from vitgraft.data_shards.stream import RawSample, ShardReader
from vitgraft.data_shards.transforms import Prepared, Sample, Transforms, seeded


@dataclass
class EvalItem:
    """A batch of evaluation and the samples in it that could not be read: (sample, one-line reason)."""

    batch: Batch
    errors: list[tuple[int, str]] = field(default_factory=list)


class PackedDataset:
    """A packed data set that makes whole batches.

    Args:
        source: the folder, or ``digits:KIND/SPLIT``.
        config: the recipe's data section.
        kind: what the model's head needs; another kind of data set is refused.
        seed: the run's seed, from which all augmentation comes.
        train: training transforms and targets; otherwise evaluation's, with truths.

    Raises:
        DataError: missing or damaged data set.
        ConfigError: a data set of another kind.
    """

    def __init__(self, source: Path | str, config: DataConfig, kind: Kind, seed: int = 0, train: bool = True) -> None:
        folder = resolve_source(str(source))
        self.manifest = read_manifest(folder)
        if self.manifest.kind != kind:
            raise ConfigError(
                f"{folder}: holds {self.manifest.kind} data, the model's head needs {kind}; change data.*.path or head"
            )
        self.folder, self.config, self.kind, self.seed, self.train = folder, config, kind, seed, train
        self.reader = ShardReader(folder, self.manifest)
        self.transforms = Transforms(config)

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> tuple[Any, ...]:
        # The transforms hold closures; they are made again from the recipe.
        return self.reader, self.config, self.kind, self.seed, self.train

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.reader, self.config, self.kind, self.seed, self.train = state
        self.folder, self.manifest = self.reader.folder, self.reader.manifest
        self.transforms = Transforms(self.config)

    def plan(self, epoch: int) -> EpochPlan:
        """The order of one epoch of training."""
        manifest, repeats = self.manifest, self.config.train.repeats
        return EpochPlan(manifest.fingerprint, manifest.shard_sizes, self.seed, epoch, repeats)

    @property
    def epoch_size(self) -> int:
        """Entries of an epoch."""
        return len(self) * self.config.train.repeats

    def train_batch(self, entries: Sequence[Entry]) -> Batch:
        """The batch of these entries; a zero-weight filler where there are none.

        Raises:
            DataError: a sample cannot be read.
        """
        if not entries:
            return self.filler()
        placed, sizes = [], []
        for entry in entries:
            # Everything random comes from the entry, so neither workers nor restarts can change it.
            with seeded(seed_of("augment", self.seed, entry.epoch, entry.sample, entry.repetition)):
                raw = self.reader.read(entry.sample)
                sample = self.transforms.train(self._load(raw, self._metadata(raw)))
            placed.append(self.transforms.place(sample))
            sizes.append(sample.size)
        targets = self._targets(placed)
        images = torch.stack([sample.image for sample in placed])
        weights = torch.ones(len(placed))
        return Batch(images, torch.tensor(sizes), weights, targets, list(entries))

    def filler(self) -> Batch:
        """One image (or clip) of zeros at weight zero, with empty targets, for a rank without entries."""
        height, width = self.transforms.canvas
        sample = Sample(self._blank())
        if self.kind == "detection":
            sample.boxes, sample.labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
            sample.masks = torch.zeros(0, height, width, dtype=torch.uint8)
        elif self.kind == "semantic":
            sample.label_map = torch.full((height, width), IGNORE)
        else:
            sample.labels = torch.zeros((), dtype=torch.int64)
        sizes = torch.tensor([[height, width]])
        return Batch(sample.image[None], sizes, torch.zeros(1), self._targets([sample]))

    def eval_batch(self, samples: Sequence[int]) -> EvalItem:
        """The batch of these samples with truths and without targets.

        A sample that cannot be read keeps its place: zero image, weight 0, and its truth where the label can be read
        (``value`` is ``None`` where not).
        """
        images, sizes, weights, truths = [], [], [], []
        errors: list[tuple[int, str]] = []
        for number in samples:
            truth = Truth(self.reader.key(number), self.transforms.canvas, None)
            prepared: Prepared | None = None
            try:
                raw = self.reader.read(number)
                metadata = self._metadata(raw)
                truth = self._truth(raw, metadata)
                prepared = self.transforms.prepare(self._pixels(raw, metadata))
            except DataError as error:
                errors.append((number, str(error)))
            images.append(self._blank() if prepared is None else prepared.canvas)
            sizes.append(self.transforms.canvas if prepared is None else prepared.size)
            weights.append(0.0 if prepared is None else 1.0)
            truths.append(truth)
        batch = Batch(torch.stack(images), torch.tensor(sizes), torch.tensor(weights), None, [], truths)
        return EvalItem(batch, errors)

    def produce(self, index: MicroBatch | Sequence[int]) -> Batch | EvalItem:
        """What a loader process is asked for: a micro-batch of training or a list of samples of evaluation."""
        return self.train_batch(index.entries) if isinstance(index, MicroBatch) else self.eval_batch(index)

    def _blank(self) -> Tensor:
        height, width = self.transforms.canvas
        shape = (3, self.config.clip.frames, height, width) if self.kind == "video" else (3, height, width)
        return torch.zeros(shape)

    def _metadata(self, raw: RawSample) -> dict[str, Any]:
        metadata = decode_json(raw.first(("json",)), raw.where)
        label, classes = metadata.get("label"), len(self.manifest.classes)
        if self.kind == "video" and not (isinstance(label, int) and 0 <= label < classes):
            raise DataError(f"{raw.where}: label {label!r} is not one of the {classes} classes; pack again")
        return metadata

    def _pixels(self, raw: RawSample, metadata: dict[str, Any]) -> Tensor:
        """The stored image (3, H, W), or the clip (T, 3, H, W) with frames drawn as training or evaluation does."""
        where = f"{raw.where} ({metadata.get('file_name')})"
        if self.kind == "video":
            frames = metadata.get("frames")
            if not isinstance(frames, int) or frames < 1:
                raise DataError(f"{where}: {frames!r} frames; pack again")
            indices = sample_frames(frames, self.config.clip, self.train)
            return decode_frames(raw.first(VIDEO_EXTENSIONS), indices, where)
        return decode_image(raw.first(IMAGE_EXTENSIONS), where)

    def _label_map(self, raw: RawSample) -> Tensor:
        label = decode_label(raw.first(("label.png",)), raw.where)
        wrong = label[(label != IGNORE) & ((label < 0) | (label >= len(self.manifest.classes)))]
        if len(wrong):
            raise DataError(f"{raw.where}: class id {int(wrong[0])} of {len(self.manifest.classes)}; pack again")
        return label.to(torch.uint8)

    def _load(self, raw: RawSample, metadata: dict[str, Any]) -> Sample:
        """Decoded for training. Crowd regions are no training targets."""
        sample = Sample(self._pixels(raw, metadata))
        if self.kind == "video":
            sample.labels = torch.tensor(metadata["label"])
        elif self.kind == "semantic":
            sample.label_map = self._label_map(raw)
            if sample.label_map.shape != sample.image.shape[1:]:
                raise DataError(f"{raw.where}: label map and image differ in size; pack again")
        else:
            items = check_annotations(metadata, len(self.manifest.classes), raw.where)
            if (metadata["height"], metadata["width"]) != sample.size:
                raise DataError(f"{raw.where}: image is {sample.size}, its metadata says otherwise; pack again")
            items = [item for item in items if not item.get("iscrowd")]
            boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float32).reshape(-1, 4)
            sample.boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
            sample.labels = torch.tensor([item["class"] for item in items], dtype=torch.int64)
            sample.masks = decode_masks(items, sample.size, raw.where)
        return sample

    def _truth(self, raw: RawSample, metadata: dict[str, Any]) -> Truth:
        if self.kind == "semantic":
            label = self._label_map(raw).numpy()
            return Truth(raw.key, (label.shape[0], label.shape[1]), np.ascontiguousarray(label))
        try:
            size = int(metadata["height"]), int(metadata["width"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{raw.where}: metadata lacks height and width; pack again") from None
        if self.kind == "video":
            return Truth(raw.key, size, metadata["label"])
        return Truth(raw.key, size, check_annotations(metadata, len(self.manifest.classes), raw.where))

    def _targets(self, placed: Sequence[Sample]) -> Any:
        if self.kind == "detection":
            return [{"boxes": s.boxes, "labels": s.labels, "masks": s.masks} for s in placed]
        attribute = "label_map" if self.kind == "semantic" else "labels"
        return torch.stack([getattr(sample, attribute) for sample in placed])


def load_image(path: Path | str) -> Tensor:
    """A loose image file (jpg, png, webp): (3, H, W) uint8 RGB.

    Raises:
        DataError: missing, broken or too large.
    """
    return decode_image(Path(path), str(path))


def prepare_image(image: Tensor, config: DataConfig) -> Prepared:
    """The evaluation transform of an image (3, h, w) uint8."""
    return Transforms(config).prepare(image)


def prepare_clip(path: Path | str, config: DataConfig) -> Prepared:
    """The evaluation transform of a loose video file: the clip that evaluation would take, on the canvas.

    Raises:
        DataError: missing, broken or too large.
    """
    path = Path(path)
    frames = probe_video(path, str(path))["frames"]
    indices = sample_frames(frames, config.clip, train=False)
    return Transforms(config).prepare(decode_frames(path, indices, str(path)))
