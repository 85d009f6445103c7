"""Copy-paste, mixup and cutmix: hand-made scenes, and partners that nothing but the plan decides."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes

from vitgraft.configs.errors import DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.configs.schema.heads import ClassifierConfig, VideoTransformerConfig
from vitgraft.configs.schema.transforms import CopyPaste, CutMix, Mixup
from vitgraft.data_shards.batch import Batch, Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.geometry import Sample, drop_vanished, tight_boxes
from vitgraft.data_shards.loader import train_batches
from vitgraft.data_shards.mixing import copy_paste, mix, partner_of
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.plan import EpochPlan, micro_batches
from vitgraft.data_shards.transforms import seeded
from vitgraft.models.heads.classifier import Classifier
from vitgraft.models.heads.video_transformer import VideoTransformer

Configure = Callable[..., DataConfig]

MIXED = [
    {"name": "random_resized_crop"},
    {"name": "mixup", "probability": 0.5},
    {"name": "cutmix", "probability": 0.4},
]
PASTED = [
    {"name": "scale_jitter", "min": 0.5, "max": 1.5},
    {"name": "random_crop"},
    {"name": "copy_paste"},
    {"name": "horizontal_flip"},
]
RECIPES = [("video", MIXED), ("detection", PASTED)]
GREY = [9, 9, 9]


def squares(size: tuple[int, int], boxes: list[tuple[int, int, int, int]], value: int, first: int = 0) -> Sample:
    """Filled rectangles (left, top, right, bottom) of one colour on black, classes counted from ``first``."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    image = (masks.amax(0) * value).expand(3, *size).contiguous() if boxes else torch.zeros(3, *size, dtype=torch.uint8)
    return Sample(image, torch.tensor(boxes).reshape(-1, 4).float(), first + torch.arange(len(boxes)), masks)


def pasted(sample: Sample, partner: Sample, count: int, **options: Any) -> Sample:
    """The result of the first seed that pastes so many instances."""
    assert sample.labels is not None
    for seed in range(200):
        with seeded(seed):
            after = copy_paste(sample, partner, CopyPaste(**options), GREY)
        assert after.labels is not None
        if len(after.labels) - len(sample.labels) == count:
            return after
    raise AssertionError(f"never {count}")


def parts(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    assert sample.boxes is not None
    assert sample.labels is not None
    assert sample.masks is not None
    return sample.boxes, sample.labels, sample.masks


def test_a_pasted_instance_covers_what_lies_below() -> None:
    below = squares((20, 30), [(2, 2, 12, 10), (20, 2, 28, 10), (5, 12, 7, 14)], 100)
    above = squares((20, 30), [(6, 0, 14, 18)], 200, first=7)
    boxes, labels, masks = parts(pasted(below, above, 1))
    image = pasted(below, above, 1).image
    assert labels.tolist() == [0, 1, 2, 7]
    # The first loses its right part, the second is untouched, the third's left column stays.
    assert boxes.tolist() == [[2, 2, 6, 10], [20, 2, 28, 10], [5, 12, 6, 14], [6, 0, 14, 18]]
    assert bool((masks.sum(0) <= 1).all())
    assert torch.equal(masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]), boxes)
    assert torch.equal(image[0], (masks[:3].sum(0) * 100 + masks[3] * 200).to(torch.uint8))
    assert int(below.image.max()) == 100


def test_an_instance_covered_wholly_is_gone() -> None:
    below = squares((20, 20), [(5, 5, 8, 8), (12, 12, 19, 19)], 100)
    after = drop_vanished(pasted(below, squares((20, 20), [(4, 4, 9, 9)], 200, first=5), 1))
    boxes, labels, masks = parts(after)
    assert labels.tolist() == [1, 5]
    assert torch.equal(tight_boxes(masks), boxes)


def test_a_box_wider_than_its_mask_stays_where_nothing_covers_it() -> None:
    """Annotated boxes are not always tight; only those of covered instances are made so."""
    below = squares((20, 20), [(2, 2, 6, 6)], 100)
    below.boxes = torch.tensor([[1.5, 1.5, 6.5, 6.5]])
    boxes, _, _ = parts(pasted(below, squares((20, 20), [(10, 10, 15, 15)], 200), 1))
    assert boxes.tolist()[0] == [1.5, 1.5, 6.5, 6.5]


def test_images_of_two_sizes_meet_on_the_larger() -> None:
    below = squares((10, 30), [(1, 1, 5, 5)], 100)
    after = pasted(below, squares((20, 12), [(2, 12, 10, 19)], 200), 1)
    boxes, _, masks = parts(after)
    assert after.size == (20, 30)
    assert masks.shape == (2, 20, 30)
    assert boxes.tolist() == [[1, 1, 5, 5], [2, 12, 10, 19]]
    assert after.image[:, 12, 2].tolist() == [200] * 3
    assert after.image[:, 19, 29].tolist() == GREY


def test_a_random_part_is_pasted_up_to_the_limit() -> None:
    partner = squares((40, 40), [(4 * i, 4, 4 * i + 3, 9) for i in range(6)], 200)
    below = squares((40, 40), [(10, 20, 30, 30)], 100)
    counts, chosen = set(), set()
    for seed in range(120):
        with seeded(seed):
            _, labels, _ = parts(copy_paste(below, partner, CopyPaste(max_instances=4), GREY))
        counts.add(len(labels) - 1)
        chosen.update(labels[1:].tolist())
    assert counts == {0, 1, 2, 3, 4}
    assert chosen == set(range(6))
    with seeded(0):
        assert copy_paste(below, partner, CopyPaste(probability=0.0), GREY) is below


@pytest.mark.parametrize(("own", "other"), [(0, 0), (0, 2), (2, 0)])
def test_images_without_instances(own: int, other: int) -> None:
    boxes = [(2, 2, 9, 9), (12, 2, 18, 9)]
    below, above = squares((20, 20), boxes[:own], 100), squares((20, 20), boxes[:other], 200)
    for seed in range(10):
        with seeded(seed):
            found, labels, masks = parts(copy_paste(below, above, CopyPaste(), GREY))
        assert len(found) == len(labels) == len(masks) <= own + other


def clip_of(value: float, label: int, size: tuple[int, int] = (20, 30)) -> Sample:
    return Sample(torch.full((3, 4, *size), value), labels=torch.tensor(label))


def test_mixup_is_one_combination_of_pixels_and_classes() -> None:
    shares = []
    for seed in range(200):
        with seeded(seed):
            after = mix(clip_of(1.0, 0), lambda: clip_of(0.0, 2), [Mixup(alpha=0.8)], 4)
        assert after.labels is not None
        share = float(after.labels[0])
        assert after.labels.tolist() == pytest.approx([share, 0, 1 - share, 0])
        assert torch.allclose(after.image, torch.full((3, 4, 20, 30), share))
        shares.append(share)
    found = torch.tensor(shares)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 alpha + 1)).
    assert abs(float(found.mean()) - 0.5) < 0.06
    assert abs(float(found.var()) - 1 / (4 * 2.6)) < 0.02


def test_cutmix_is_a_rectangle_in_all_frames_weighted_by_its_area() -> None:
    areas = set()
    for seed in range(100):
        with seeded(seed):
            after = mix(clip_of(1.0, 1), lambda: clip_of(0.0, 3), [CutMix()], 4)
        assert after.labels is not None
        foreign = after.image == 0
        assert torch.equal(foreign, foreign[:1, :1].expand_as(foreign))
        area = int(foreign[0, 0].sum())
        rows, columns = foreign[0, 0].any(1), foreign[0, 0].any(0)
        assert area == int(rows.sum()) * int(columns.sum())
        assert after.labels.tolist() == pytest.approx([0, 1 - area / 600, 0, area / 600])
        areas.add(area)
    assert len(areas) > 40


def test_each_way_of_mixing_as_often_as_asked_for() -> None:
    counts = {"mixup": 0, "cutmix": 0, "alone": 0}
    for seed in range(300):
        partners: list[int] = []

        def partner(called: list[int] = partners) -> Sample:
            called.append(1)
            return clip_of(0.0, 1)

        with seeded(seed):
            after = mix(clip_of(1.0, 0), partner, [Mixup(probability=0.2), CutMix(probability=0.5)], 2)
        assert after.labels is not None
        assert after.labels.dtype == torch.float32
        values = after.image.unique().tolist()
        kind = "alone" if not partners else "cutmix" if set(values) <= {0.0, 1.0} else "mixup"
        assert kind != "alone" or after.labels.tolist() == [1, 0]
        counts[kind] += 1
    assert 40 < counts["mixup"] < 85
    assert 120 < counts["cutmix"] < 180


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_partners_are_other_entries_of_the_same_epoch(length: int) -> None:
    plan = EpochPlan("f", [length], 1, 3)
    for position in range(length):
        partner = partner_of(position, plan)
        assert partner in plan.entries(0, length)
        assert (partner.position == position) == (length == 1)
        if length % 2 == 0:
            assert partner_of(partner.position, plan).position == position


def tensors(batch: Batch) -> list[Tensor]:
    targets = batch.targets if isinstance(batch.targets, list) else [{"all": batch.targets}]
    return [batch.images, batch.sizes, *(value for target in targets for value in target.values())]


def samples_of(batch: Batch) -> dict[Entry, list[bytes]]:
    """The bytes of every sample of a batch, by entry."""
    found = {}
    for index, entry in enumerate(batch.entries):
        target = batch.targets[index]
        values = [target] if isinstance(target, Tensor) else list(target.values())
        found[entry] = [part.numpy().tobytes() for part in (batch.images[index], batch.sizes[index], *values)]
    return found


@pytest.mark.parametrize(("kind", "steps"), RECIPES)
def test_no_world_and_no_worker_changes_a_mixed_sample(
    packed: dict[str, Path], configure: Configure, kind: Any, steps: list[dict[str, Any]]
) -> None:
    """22 entries at worlds 1, 2 and 6: partners are cut off by ranks, batches and the end of the epoch."""

    def epoch(world: int, workers: int) -> dict[Entry, list[bytes]]:
        config = configure(packed[kind], transforms=steps, image_size=[64, 64], workers=workers)
        dataset = PackedDataset(packed[kind], config, kind, seed=7)
        found: dict[Entry, list[bytes]] = {}
        for rank in range(world):
            cut = micro_batches(
                dataset.plan,
                epoch_size=dataset.epoch_size,
                first_step=0,
                last_step=4,
                global_batch=6,
                accumulation=1,
                rank=rank,
                world=world,
            )
            for _, batch in train_batches(dataset, cut):
                found |= samples_of(batch)
        return found

    alone = epoch(1, 0)
    assert len(alone) == 22
    assert epoch(2, 2) == alone
    assert epoch(6, 0) == alone


@pytest.mark.parametrize(("kind", "steps"), RECIPES)
def test_mixing_depends_on_seed_epoch_and_partner(
    packed: dict[str, Path], configure: Configure, kind: Any, steps: list[dict[str, Any]]
) -> None:
    config = configure(packed[kind], transforms=steps)
    dataset = PackedDataset(packed[kind], config, kind, seed=7)
    entries = dataset.plan(0).entries(0, 6)
    before = dataset.train_batch(entries).images
    assert torch.equal(PackedDataset(packed[kind], config, kind, seed=7).train_batch(entries).images, before)
    assert not torch.equal(PackedDataset(packed[kind], config, kind, seed=8).train_batch(entries).images, before)
    later = [entry._replace(epoch=1) for entry in entries]
    assert not torch.equal(dataset.train_batch(later).images, before)


def test_a_mixed_batch_is_made_of_its_partners_own_samples(packed: dict[str, Path], configure: Configure) -> None:
    """mixup alone: each sample lies on the line between what the two entries are without it."""
    crop = {"name": "random_resized_crop"}
    plain = PackedDataset(packed["video"], configure(packed["video"], transforms=[crop]), "video", seed=7)
    mixed = PackedDataset(
        packed["video"], configure(packed["video"], transforms=[crop, {"name": "mixup"}]), "video", seed=7
    )
    entries = plain.plan(2).entries(0, 8)
    before, after = plain.train_batch(entries), mixed.train_batch(entries)
    classes = len(plain.manifest.classes)
    assert before.targets.dtype == torch.int64
    assert after.targets.shape == (8, classes)
    hard = F.one_hot(before.targets, classes).float()
    shares = set()
    for index in range(8):
        own, other = before.images[index], before.images[index ^ 1]
        share = float(((after.images[index] - other) * (own - other)).sum() / ((own - other) ** 2).sum())
        assert torch.allclose(after.images[index], own * share + other * (1 - share), atol=1e-4)
        assert torch.allclose(after.targets[index], hard[index] * share + hard[index ^ 1] * (1 - share), atol=1e-3)
        shares.add(round(share, 4))
    assert len(shares) == 8


def test_partners_of_a_batch_are_read_once(
    packed: dict[str, Path], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(packed["detection"], transforms=PASTED)
    dataset = PackedDataset(packed["detection"], config, "detection")
    read: list[int] = []
    original = dataset.reader.read
    monkeypatch.setattr(dataset.reader, "read", lambda sample: [read.append(sample), original(sample)][1])
    entries = dataset.plan(0).entries(4, 8)
    dataset.train_batch(entries)
    assert sorted(read) == sorted(entry.sample for entry in entries)


def test_pasting_brings_the_partners_instances(packed: dict[str, Path], configure: Configure) -> None:
    """Before what follows copy-paste, boxes stay tight around masks, and there are more of them."""
    before, after = (
        PackedDataset(packed["detection"], configure(packed["detection"], transforms=steps), "detection", seed=1)
        for steps in (PASTED[:2], PASTED)
    )
    entries = before.plan(0).entries(0, 22)
    ours, theirs = after.train_batch(entries), before.train_batch(entries)
    assert sum(len(t["labels"]) for t in ours.targets) > 1.2 * sum(len(t["labels"]) for t in theirs.targets)
    for target in ours.targets:
        tight = tight_boxes(target["masks"])
        assert bool((target["boxes"][:, :2] <= tight[:, :2] + 2.5).all())
        assert bool((target["boxes"][:, 2:] >= tight[:, 2:] - 2.5).all())


def test_a_filler_has_soft_targets_too(packed: dict[str, Path], configure: Configure) -> None:
    dataset = PackedDataset(packed["video"], configure(packed["video"], transforms=MIXED), "video")
    filler, batch = dataset.train_batch([]), dataset.train_batch(dataset.plan(0).entries(0, 1))
    assert filler.targets.shape == batch.targets.shape == (1, len(dataset.manifest.classes))
    assert filler.targets.dtype == batch.targets.dtype == torch.float32
    assert not filler.targets.any()
    assert filler.images.shape == batch.images.shape


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["classifier", "video_transformer"])
def test_soft_targets_cost_the_combination_of_hard_ones(kind: str, smoothing: float) -> None:
    torch.manual_seed(0)
    head: Any
    if kind == "classifier":
        head = Classifier(ClassifierConfig(label_smoothing=smoothing), channels={8: 12}, num_classes=5)
    else:
        config = VideoTransformerConfig(embed_dim=8, depth=1, num_heads=2, grid=2, label_smoothing=smoothing)
        head = VideoTransformer(config, channels={8: 12}, num_classes=5)
    head.eval()
    maps, sizes = {8: torch.randn(3, 2, 12, 4, 4)}, torch.full((3, 2), 32)
    weights = torch.tensor([1.0, 0.5, 0.0])

    def loss(targets: Tensor) -> tuple[float, float]:
        term = head(maps, sizes, (32, 32), targets, weights)["video"]
        return float(term[0]), float(term[1])

    one, two = torch.tensor([0, 1, 4]), torch.tensor([2, 3, 0])
    share = 0.3
    soft = F.one_hot(one, 5) * share + F.one_hot(two, 5) * (1 - share)
    assert loss(soft)[0] == pytest.approx(share * loss(one)[0] + (1 - share) * loss(two)[0], rel=1e-5)
    assert loss(F.one_hot(one, 5).float()) == pytest.approx(loss(one), rel=1e-6)
    assert loss(soft)[1] == 1.5


@pytest.mark.parametrize(("kind", "steps"), RECIPES)
def test_an_unreadable_partner(
    packed: dict[str, Path],
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    steps: list[dict[str, Any]],
) -> None:
    """Skipped where the recipe says so, and then no other entry is lost with it."""
    if kind == "video":
        steps = [{"name": "resize"}, {"name": "mixup"}]

    def dataset(on_error: Any) -> PackedDataset:
        config = configure(packed[kind], transforms=steps, on_error=on_error)
        made = PackedDataset(packed[kind], config, kind, seed=2)
        original, broken = made.reader.read, made.plan(0).entry(0).sample  # type: ignore[attr-defined]

        def read(sample: int) -> Any:
            if sample == broken:
                raise DataError("broken")
            return original(sample)

        monkeypatch.setattr(made.reader, "read", read)
        return made

    made = dataset("stop")
    with pytest.raises(DataError, match="broken"):
        made.train_batch(made.plan(0).entries(1, 2))
    made = dataset({"skip": 5})
    entries = made.plan(0).entries(0, 4)
    batch = made.train_batch(entries)
    assert batch.weights.tolist() == [0, 1, 1, 1]
    assert [skip.entry for skip in batch.skipped] == entries[:1]
    if kind == "video":
        assert sorted(batch.targets[1].tolist())[-2:] == [0, 1]


def test_classified_images_are_mixed_as_clips_are(tmp_path: Path, configure: Configure) -> None:
    with DatasetWriter(tmp_path / "set", "image", ["a", "b", "c"]) as writer:
        for number in range(4):
            stream = io.BytesIO()
            Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(stream, "PNG")
            facts = {"label": number % 3, "file_name": f"{number}.png", "height": 30, "width": 40}
            writer.add({"png": stream.getvalue()}, facts)
    steps = [{"name": "random_resized_crop"}, {"name": "rand_augment"}, {"name": "random_erasing"}, *MIXED[1:]]
    dataset = PackedDataset(tmp_path / "set", configure(tmp_path / "set", transforms=steps), "image")
    batch = dataset.train_batch(dataset.plan(0).entries(0, 4))
    assert batch.images.shape == (4, 3, 96, 96)
    assert batch.targets.shape == (4, 3)
    assert batch.targets.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert bool(((batch.targets > 0).sum(1) == 2).any())
    assert dataset.train_batch([]).targets.shape == (1, 3)
