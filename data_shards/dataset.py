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
from vitgraft.configs.schema.data import DataConfig, SourceConfig, ViewsConfig
from vitgraft.data_shards.batch import NOT_FINITE, Batch, Entry, Skipped, Truth
from vitgraft.data_shards.decode import (
    check_annotations,
    decode_frames,
    decode_json,
    decode_label,
    decode_masks,
    decode_resized,
    probe_video,
    sample_frames,
    shown,
    stated_frames,
    stated_label,
    stated_size,
)
from vitgraft.data_shards.frames import clip_of
from vitgraft.data_shards.geometry import Sample, covering, drop_vanished
from vitgraft.data_shards.images import IMAGE_EXTENSIONS, decode_image, orientation_of
from vitgraft.data_shards.manifest import CLASSED, IGNORE, Kind, read_manifest
from vitgraft.data_shards.mixing import partner_of
from vitgraft.data_shards.mixture import (
    MixtureReader,
    Part,
    check_mixture,
    mixture_entries,
    mixture_fingerprint,
    plan_epoch,
)
from vitgraft.data_shards.plan import MicroBatch, Plan
from vitgraft.data_shards.prefetch import check_room
from vitgraft.data_shards.remote import UnreachableError
from vitgraft.data_shards.sources import open_cache, resolve_source
from vitgraft.data_shards.stream import RawSample, ShardReader
from vitgraft.data_shards.transforms import Prepared, Transforms, seeded
from vitgraft.data_shards.views import clips_of, crops_of


@dataclass
class EvalItem:
    """A batch of evaluation and the samples in it that could not be read: (sample, one-line reason)."""

    batch: Batch
    errors: list[tuple[int, str]] = field(default_factory=list)


class PackedDataset:
    """A packed data set, or a mixture of several, that makes whole batches.

    ``manifest``: of the data set; of a mixture's first, with whose kind and classes all others agree. ``left_out``:
    entries (epoch, position) that training leaves out unread; set it before the first batch is asked for.

    Args:
        source: the folder, a URL, ``digits:KIND/SPLIT``, or the sources of a mixture (the recipe's ``data.train``).
        config: the recipe's data section.
        kind: what the model's head needs; another kind of data set is refused.
        seed: the run's seed, from which all augmentation comes.
        train: training transforms and targets; otherwise evaluation's, with truths.
        views: of each video in evaluation; ``None``: one, which is resized to fit the canvas.
        targets: in evaluation too, for the losses; of videos one for all views.

    Raises:
        DataError: missing or damaged data set.
        ConfigError: a data set of another kind, or data sets that cannot be mixed.
    """

    def __init__(
        self,
        source: Path | str | Sequence[SourceConfig],
        config: DataConfig,
        kind: Kind,
        seed: int = 0,
        train: bool = True,
        views: ViewsConfig | None = None,
        targets: bool = False,
    ) -> None:
        if isinstance(source, Path | str):
            sources = [(str(source), config.train[0].visits)]
        else:
            sources = [(part.path, part.visits) for part in source]
        folders = [resolve_source(path) for path, _ in sources]
        manifests = [read_manifest(folder) for folder in folders]
        for folder, manifest in zip(folders, manifests, strict=True):
            if manifest.kind != kind:
                raise ConfigError(
                    f"{folder}: holds {manifest.kind} data, the model's head needs {kind}; change data.*.path or head"
                )
        self.config, self.kind, self.seed, self.train, self.views = config, kind, seed, train, views
        self.targets = targets
        self.left_out: frozenset[tuple[int, int]] = frozenset()
        self.parts = [
            Part(manifest.fingerprint, manifest.shard_sizes, visits)
            for manifest, (_, visits) in zip(manifests, sources, strict=True)
        ]
        if train:
            check_mixture([path for path, _ in sources], manifests, [visits for _, visits in sources])
        cache = open_cache(config.cache)
        self.readers = [ShardReader(*pair, cache) for pair in zip(folders, manifests, strict=True)]
        if train:
            check_room(self.readers)
        self._open()

    def _open(self) -> None:
        self.folder, self.manifest = self.readers[0].folder, self.readers[0].manifest
        self.reader = self.readers[0] if len(self.readers) == 1 else MixtureReader(self.readers)
        # The transforms hold closures, so they are not pickled but made again from the recipe.
        self.transforms = Transforms(self.config)
        self._plan: Plan | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getstate__(self) -> tuple[Any, ...]:
        asked = self.train, self.views, self.targets, self.left_out
        return self.readers, self.parts, self.config, self.kind, self.seed, asked

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.readers, self.parts, self.config, self.kind, self.seed, asked = state
        self.train, self.views, self.targets, self.left_out = asked
        self._open()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the samples and their numbering, over all sources."""
        return mixture_fingerprint([reader.manifest.fingerprint for reader in self.readers])

    def plan(self, epoch: int) -> Plan:
        """Return the order of one epoch of training."""
        return plan_epoch(self.parts, self.seed, epoch)

    @property
    def epoch_size(self) -> int:
        """Entries of an epoch."""
        return mixture_entries(self.parts)

    @property
    def paired(self) -> bool:
        """Tell whether entries are mixed with their partners in the plan."""
        return self.transforms.pastes or self.transforms.mixes

    def train_batch(self, entries: Sequence[Entry], images: Tensor | None = None) -> Batch:
        """Return the batch of these entries; a zero-weight filler where there are none.

        Args:
            images: where to write the images, with a row for each; ``None``: in new memory.

        Raises:
            DataError: a sample cannot be read and ``data.on_error`` says stop, or it cannot be fetched.
        """
        images = torch.empty(self.images_shape(entries)) if images is None else images
        if not entries:
            return self._filler(images)
        placed, sizes, weights = [], [], []
        skipped: list[Skipped] = []
        made: dict[Entry, Sample] = {}
        # Each image is written where it will lie: stacking them at the end would copy them once more.
        for entry, place in zip(entries, images, strict=True):
            reason: str | None = NOT_FINITE if self._is_left_out(entry) else None
            try:
                if reason is None:
                    sample, size = self._finished(entry, made, place)
            except UnreachableError:
                raise
            except DataError as error:
                if self.config.on_error == "stop":
                    raise
                reason = str(error)
            if reason is not None:
                skipped.append(Skipped(entry, self.reader.key(entry.sample), reason))
                sample, size = self._nothing(), self.transforms.canvas
            weights.append(0.0 if reason is not None else 1.0)
            if sample.image is not place:
                place.copy_(sample.image)
            placed.append(sample)
            sizes.append(size)
        targets = self._targets(placed)
        return Batch(images, torch.tensor(sizes), torch.tensor(weights), targets, list(entries), skipped=skipped)

    def _finished(self, entry: Entry, made: dict[Entry, Sample], place: Tensor) -> tuple[Sample, tuple[int, int]]:
        """Return an entry on the canvas, mixed with its partner where the recipe says so, and its valid size.

        Args:
            made: the batch's samples so far, before they met their partners.
            place: where the image may be written; of another's memory is what was mixed.
        """
        sample = self._augmented(entry, made)
        if self.transforms.pastes:
            with seeded(self._seed("paste", entry)):
                sample = self.transforms.paste(sample, self._mate(entry, made))
        placed = self.transforms.place(sample, place)
        if not self.transforms.mixes:
            return placed, sample.size

        def partner() -> Sample:
            return self.transforms.place(self._mate(entry, made))

        with seeded(self._seed("mix", entry)):
            placed = self.transforms.mix(placed, partner, len(self.manifest.classes))
        # Of two images on the canvas neither's own size is that of the mixture.
        return placed, self.transforms.canvas

    def _augmented(self, entry: Entry, made: dict[Entry, Sample]) -> Sample:
        """Return an entry augmented, before it is mixed with its partner; still uint8."""
        if entry in made:
            return made[entry]
        # Everything random comes from the entry, so neither workers nor restarts can change it.
        with seeded(self._seed("augment", entry)):
            raw = self.reader.read(entry.sample)
            sample = self.transforms.train(self._load(raw, self._metadata(raw)))
        if self.paired:
            made[entry] = sample
        return sample

    def _mate(self, entry: Entry, made: dict[Entry, Sample]) -> Sample:
        """Return the partner of an entry, augmented."""
        partner = self._partner(entry)
        try:
            return self._augmented(entry if self._is_left_out(partner) else partner, made)
        except UnreachableError:
            raise
        except DataError:
            if self.config.on_error == "stop":
                raise
            # The partner's own entry is the one that is skipped. Mixed with itself a sample stays what it is.
            return self._augmented(entry, made)

    def _is_left_out(self, entry: Entry) -> bool:
        return (entry.epoch, entry.position) in self.left_out

    def _seed(self, purpose: str, entry: Entry) -> int:
        return seed_of(purpose, self.seed, entry.epoch, entry.sample, entry.repetition)

    def _partner(self, entry: Entry) -> Entry:
        if self._plan is None or self._plan.epoch != entry.epoch:
            self._plan = self.plan(entry.epoch)
        return partner_of(entry.position, self._plan)

    def _filler(self, images: Tensor) -> Batch:
        """Return one image (or clip) of zeros at weight zero, with empty targets, for a rank without entries."""
        sizes = torch.tensor([self.transforms.canvas])
        return Batch(images.zero_(), sizes, torch.zeros(1), self._targets([self._nothing()]))

    def _nothing(self) -> Sample:
        """Return zeros with empty targets on the canvas, to be given weight zero."""
        height, width = self.transforms.canvas
        sample = Sample(self._blank())
        if self.kind == "detection":
            sample.boxes, sample.labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
            sample.masks = torch.zeros(0, height, width, dtype=torch.uint8)
        elif self.kind == "semantic":
            sample.label_map = torch.full((height, width), IGNORE)
        else:
            sample.labels = torch.zeros((), dtype=torch.int64)
            if self.train and self.transforms.mixes:
                sample.labels = torch.zeros(len(self.manifest.classes))
        return sample

    def eval_batch(self, samples: Sequence[int], images: Tensor | None = None) -> EvalItem:
        """Return the batch of these samples with truths, and with targets where they were asked for.

        A sample that cannot be read keeps its place: zero image, weight 0, and its truth where the label can be read
        (``value`` is ``None`` where not). With views, ``images`` and ``sizes`` hold all those of the first video, then
        all of the second, and so on; ``weights`` and ``truths`` one for each video.
        """
        images = torch.empty(self.images_shape(samples)) if images is None else images
        sizes: list[tuple[int, int]] = []
        weights, truths = [], []
        unread = [Prepared(self._blank(), self.transforms.canvas, (1.0, 1.0))] * self._views
        errors: list[tuple[int, str]] = []
        placed: list[Sample] = []
        for number in samples:
            target = self._nothing() if self.targets else None
            truth = Truth(self.reader.key(number), self.transforms.canvas, None)
            prepared = unread
            try:
                raw = self.reader.read(number)
                metadata = self._metadata(raw)
                truth = self._truth(raw, metadata)
                if self.targets:
                    prepared, target = self._prepared_with_target(raw, metadata)
                else:
                    prepared = self._prepared(raw, metadata)
            except UnreachableError:
                # No fault of the sample: a figure without it would be wrong.
                raise
            except DataError as error:
                errors.append((number, str(error)))
            for view in prepared:
                images[len(sizes)] = view.canvas
                sizes.append(view.size)
            weights.append(0.0 if prepared is unread else 1.0)
            truths.append(truth)
            placed += [] if target is None else [target]
        targets = self._targets(placed) if self.targets else None
        batch = Batch(images, torch.tensor(sizes), torch.tensor(weights), targets, [], truths)
        return EvalItem(batch, errors)

    def produce(self, index: MicroBatch | Sequence[int], images: Tensor | None = None) -> Batch | EvalItem:
        """Return a loader's result for ``index``: a micro-batch of training, or a list of samples of evaluation.

        Args:
            images: where to write the images, of the shape that :meth:`images_shape` says; ``None``: in new memory.
        """
        if isinstance(index, MicroBatch):
            return self.train_batch(index.entries, images)
        return self.eval_batch(index, images)

    def images_shape(self, index: MicroBatch | Sequence[object]) -> tuple[int, ...]:
        """Return the shape of the images (or clips) of an index: (B, 3, H, W) or (B, 3, T, H, W)."""
        entries = index.entries if isinstance(index, MicroBatch) else index
        # A rank without entries has a filler.
        return (max(1, len(entries) * self._views), *self._shape)

    @property
    def _views(self) -> int:
        return self.views.count if self.views else 1

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of an image or a clip on the canvas."""
        height, width = self.transforms.canvas
        return (3, self.config.clip.frames, height, width) if self.kind == "video" else (3, height, width)

    def _blank(self) -> Tensor:
        return torch.zeros(self._shape)

    def _metadata(self, raw: RawSample) -> dict[str, Any]:
        metadata = decode_json(raw.first(("json",)), raw.where)
        if self.kind in CLASSED:
            stated_label(metadata, len(self.manifest.classes), raw.where)
        return metadata

    def _pixels(self, raw: RawSample, metadata: dict[str, Any]) -> Tensor:
        """Return the image (3, H, W), turned as its metadata says, or the clip (T, 3, H, W) with the frames of its
        purpose."""
        where = f"{raw.where} ({shown(metadata.get('file_name'))})"
        if self.kind == "video":
            count = stated_frames(metadata, where)
            indices = sample_frames(count, self.config.clip, self.train)
            return decode_frames(clip_of(raw, metadata), indices, where, self.config.clip.decoder, count)
        return decode_image(raw.first(IMAGE_EXTENSIONS), where, orientation_of(metadata, where))

    def _prepared(self, raw: RawSample, metadata: dict[str, Any]) -> list[Prepared]:
        """Return the views of a sample: one of an image; of a video, clip by clip, the crops of each."""
        if self.kind != "video":
            return [self.transforms.prepare(self._pixels(raw, metadata))]
        where = f"{raw.where} ({shown(metadata.get('file_name'))})"
        count, clip, data = stated_frames(metadata, where), self.config.clip, clip_of(raw, metadata)
        if self.views is None:
            indices = sample_frames(count, clip, self.train)
            resized = decode_resized(data, indices, where, self.transforms.fitted, clip.decoder, count)
            return [self.transforms.prepare_fitted(*resized)]
        clips = clips_of(count, clip, self.views.clips)
        # Clips overlap: each frame is decoded once.
        wanted = sorted({index for indices in clips for index in indices})
        canvas = self.transforms.canvas
        frames, size = decode_resized(data, wanted, where, lambda size: covering(size, canvas), clip.decoder, count)
        place = {index: number for number, index in enumerate(wanted)}
        return [
            view
            for indices in clips
            for view in crops_of(frames[[place[index] for index in indices]], size, self.transforms, self.views.crops)
        ]

    def _prepared_with_target(self, raw: RawSample, metadata: dict[str, Any]) -> tuple[list[Prepared], Sample]:
        """Return the views of a sample, and the sample with its labels on the canvas."""
        if self.kind in CLASSED:
            views = self._prepared(raw, metadata)
            return views, Sample(views[0].canvas, labels=torch.tensor(metadata["label"]))
        pixels = self._pixels(raw, metadata)
        try:
            sample = self._load(raw, metadata, pixels)
        except DataError:  # a label map of another size can be compared with the prediction, but not learnt from
            return [self.transforms.prepare(pixels)], self._nothing()
        fitting = self.transforms.evaluation(sample)
        scale = fitting.size[0] / sample.size[0], fitting.size[1] / sample.size[1]
        placed = self.transforms.place(drop_vanished(fitting))
        return [Prepared(placed.image, fitting.size, scale)], placed

    def _label_map(self, raw: RawSample) -> Tensor:
        label = decode_label(raw.first(("label.png",)), raw.where)
        wrong = label[(label != IGNORE) & ((label < 0) | (label >= len(self.manifest.classes)))]
        if len(wrong):
            raise DataError(f"{raw.where}: class id {int(wrong[0])} of {len(self.manifest.classes)}; pack again")
        return label.to(torch.uint8)

    def _load(self, raw: RawSample, metadata: dict[str, Any], pixels: Tensor | None = None) -> Sample:
        """Decode a sample for training, without crowd regions.

        Args:
            pixels: of the image or clip, where they are decoded already.
        """
        sample = Sample(self._pixels(raw, metadata) if pixels is None else pixels)
        if self.kind in CLASSED:
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
        size = stated_size(metadata, raw.where)
        if self.kind in CLASSED:
            return Truth(raw.key, size, metadata["label"])
        return Truth(raw.key, size, check_annotations(metadata, len(self.manifest.classes), raw.where))

    def _targets(self, placed: Sequence[Sample]) -> Any:
        if self.kind == "detection":
            return [{"boxes": s.boxes, "labels": s.labels, "masks": s.masks} for s in placed]
        attribute = "label_map" if self.kind == "semantic" else "labels"
        return torch.stack([getattr(sample, attribute) for sample in placed])


def prepare_image(image: Tensor, config: DataConfig) -> Prepared:
    """Apply the evaluation transform to an image (3, h, w) uint8."""
    return Transforms(config).prepare(image)


def prepare_clip(path: Path | str, config: DataConfig) -> Prepared:
    """Apply the evaluation transform to a video file: the clip that evaluation would take, on the canvas.

    Raises:
        DataError: missing, broken or too large.
    """
    path = Path(path)
    frames = probe_video(path, str(path))["frames"]
    indices = sample_frames(frames, config.clip, train=False)
    transforms = Transforms(config)
    resized = decode_resized(path, indices, str(path), transforms.fitted, config.clip.decoder, frames)
    return transforms.prepare_fitted(*resized)
