"""Images, boxes, masks and clips move together, and evaluation can be undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from vitgraft.data_shards.geometry import Sample, crop, drop_vanished, fitted, flip, resize, tight_boxes
from vitgraft.data_shards.manifest import IGNORE
from vitgraft.data_shards.transforms import Transforms, seeded

JITTER = [{"name": "scale_jitter", "min": 0.4, "max": 2.0}, {"name": "random_crop"}, {"name": "horizontal_flip"}]
CROP = [{"name": "random_resized_crop", "min_area": 0.2}, {"name": "horizontal_flip"}]
LARGE = [{"name": "scale_jitter", "min": 1.5, "max": 2.0}]
COLOUR = [{"name": "photometric"}, {"name": "resize"}]


def scene(height: int = 60, width: int = 80, seed: int = 0) -> Sample:
    """Filled ellipses of distinct brightness: pixels, masks, tight boxes and a label map that agree exactly."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    masks = []
    for index in range(4):
        cy, cx, ry, rx = torch.rand(4, generator=generator).tolist()
        mask = ((y - cy * height) / (6 + 12 * ry)) ** 2 + ((x - cx * width) / (6 + 12 * rx)) ** 2 <= 1
        for other in masks:
            other &= ~mask
        masks.append(mask)
        image[:, mask] = 60 + 60 * index
    stacked = torch.stack([mask for mask in masks if mask.sum() > 30]).to(torch.uint8)
    labels = torch.arange(len(stacked))
    label_map = (stacked * (labels + 1)[:, None, None].to(torch.uint8)).sum(0).to(torch.uint8)
    return Sample(image, masks_to_boxes(stacked) + torch.tensor([0, 0, 1, 1]), labels, stacked, label_map)


def transforms(configure: Any, steps: list[dict[str, Any]], size: tuple[int, int] = (64, 96)) -> Transforms:
    return Transforms(configure(Path("x"), transforms=steps, image_size=list(size)))


@pytest.mark.parametrize("steps", [JITTER, CROP, LARGE, COLOUR], ids=["jitter", "crop", "large", "colour"])
def test_boxes_are_tight_around_the_transformed_masks(configure: Any, steps: list[dict[str, Any]]) -> None:
    pipeline = transforms(configure, steps)
    compared = 0
    for seed in range(60):
        with seeded(seed):
            after = pipeline.train(scene(seed=seed))
        assert after.boxes is not None
        assert after.masks is not None
        assert after.size[0] <= 64
        assert after.size[1] <= 96
        assert after.masks.shape[1:] == after.size
        filled = after.masks.flatten(1).any(1)
        assert bool(filled.all())
        if len(after.boxes):
            expected = masks_to_boxes(after.masks) + torch.tensor([0, 0, 1, 1])
            # A resize rounds masks to pixels, in a chain of up to two resizes.
            scale = max(after.size[0] / 60, after.size[1] / 80, 1.0)
            assert float((after.boxes - expected).abs().max()) <= 1.0 + scale, seed
            compared += len(after.boxes)
    assert compared > 60


@pytest.mark.parametrize("steps", [JITTER, CROP], ids=["jitter", "crop"])
def test_label_map_moves_with_pixels_and_masks(configure: Any, steps: list[dict[str, Any]]) -> None:
    pipeline = transforms(configure, steps)
    for seed in range(30):
        before = scene(seed=seed)
        # No colour change here: the brightness of the pixels says what the label must be.
        with seeded(seed):
            after = pipeline.train(Sample(before.image, label_map=before.label_map))
        with seeded(seed):
            masks = pipeline.train(Sample(before.image, before.boxes, before.labels, before.masks))
        assert after.label_map is not None
        assert masks.masks is not None
        assert masks.labels is not None
        assert torch.equal(masks.image, after.image)
        for mask, label in zip(masks.masks, masks.labels.tolist(), strict=True):
            assert bool((after.label_map[mask.bool()] == label + 1).all())
        sharp = (after.image[0] == 0) | (after.image[0] >= 60)
        background = after.label_map == 0
        agree = (background == (after.image[0] < 30))[sharp].float().mean()
        assert agree > 0.9


def test_an_object_cut_by_a_crop_gets_the_box_of_what_is_left() -> None:
    """An L: cutting off its foot leaves a narrow stem, which a merely clipped box would overstate."""
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, 5:30, 5:8] = 1
    mask[0, 27:30, 5:35] = 1
    sample = Sample(torch.zeros(3, 40, 40, dtype=torch.uint8), tight_boxes(mask), torch.zeros(1).long(), mask)
    after = crop(sample, 0, 0, 20, 40)
    assert after.boxes is not None
    assert after.boxes.tolist() == [[5, 5, 8, 20]]
    untouched = crop(sample, 2, 3, 38, 37)
    assert untouched.boxes is not None
    assert untouched.boxes.tolist() == [[2, 3, 32, 28]]


def test_boxes_without_masks_are_clipped() -> None:
    boxes = torch.tensor([[1.5, 2.0, 30.0, 18.0], [35.0, 35.0, 39.0, 39.0]])
    sample = Sample(torch.zeros(3, 40, 40, dtype=torch.uint8), boxes, torch.tensor([1, 2]))
    after = drop_vanished(crop(sample, 0, 10, 20, 10))
    assert after.boxes is not None
    assert after.labels is not None
    assert after.boxes.tolist() == [[0, 2, 10, 18]]
    assert after.labels.tolist() == [1]


def test_vanished_instances_go_with_all_their_parts() -> None:
    masks = torch.zeros(3, 20, 20, dtype=torch.uint8)
    masks[0, 2:6, 2:6] = 1
    masks[1, 0, 0:3] = 1
    boxes = torch.tensor([[2.0, 2, 6, 6], [0, 0, 3, 1], [19.5, 0, 30, 9]])
    after = drop_vanished(Sample(torch.zeros(3, 20, 20), boxes, torch.tensor([5, 6, 7]), masks))
    assert after.labels is not None
    assert after.masks is not None
    assert after.labels.tolist() == [5]
    assert torch.equal(after.masks, masks[:1])


def test_no_instances_at_all(configure: Any) -> None:
    empty = Sample(
        torch.zeros(3, 30, 50, dtype=torch.uint8),
        torch.zeros(0, 4),
        torch.zeros(0).long(),
        torch.zeros(0, 30, 50, dtype=torch.uint8),
    )
    for steps in (JITTER, CROP, LARGE, COLOUR):
        pipeline = transforms(configure, steps)
        with seeded(0):
            placed = pipeline.place(pipeline.train(empty))
        assert placed.masks is not None
        assert placed.boxes is not None
        assert placed.masks.shape == (0, 64, 96)
        assert placed.boxes.shape == (0, 4)


def test_flip_is_its_own_inverse() -> None:
    before = scene()
    twice = flip(flip(before))
    assert torch.equal(twice.image, before.image)
    assert twice.boxes is not None
    assert before.boxes is not None
    assert torch.equal(twice.boxes, before.boxes)
    once = flip(before)
    assert once.boxes is not None
    assert once.masks is not None
    assert torch.equal(once.boxes, masks_to_boxes(once.masks) + torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("size", [(60, 80), (30, 40), (333, 77), (64, 96), (1, 500), (500, 1), (7, 7)])
def test_fitting_the_canvas(size: tuple[int, int]) -> None:
    height, width = fitted(size, (64, 96))
    assert 1 <= height <= 64
    assert 1 <= width <= 96
    assert height == 64 or width == 96
    ratio = min(64 / size[0], 96 / size[1])
    assert abs(height - size[0] * ratio) <= 1
    assert abs(width - size[1] * ratio) <= 1


def test_evaluation_can_be_undone(configure: Any) -> None:
    pipeline = transforms(configure, COLOUR)
    before = scene(57, 83)
    canvas, size, scale = pipeline.prepare(before.image)
    after = pipeline.evaluation(before)
    assert canvas.shape == (3, 64, 96)
    assert after.size == size
    assert after.boxes is not None
    assert before.boxes is not None
    back = after.boxes / torch.tensor([scale[1], scale[0], scale[1], scale[0]])
    assert torch.allclose(back, before.boxes, atol=1e-4)
    assert (after.boxes[:, 2] <= size[1]).all()
    assert (after.boxes[:, 3] <= size[0]).all()


def test_padding_is_zero_after_normalisation_and_ignored(configure: Any) -> None:
    pipeline = transforms(configure, COLOUR)
    before = Sample(torch.full((3, 64, 48), 255, dtype=torch.uint8), label_map=torch.ones(64, 48, dtype=torch.uint8))
    placed = pipeline.place(pipeline.evaluation(before))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(placed.image[:, :, :48], expected[:, None, None].expand(3, 64, 48))
    assert not placed.image[:, :, 48:].any()
    assert placed.label_map is not None
    assert placed.label_map.dtype == torch.int64
    assert placed.label_map[:, :48].unique().tolist() == [1]
    assert placed.label_map[:, 48:].unique().tolist() == [IGNORE]


@pytest.mark.parametrize("steps", [JITTER, CROP, COLOUR], ids=["jitter", "crop", "colour"])
def test_frames_of_a_clip_share_everything_random(configure: Any, steps: list[dict[str, Any]]) -> None:
    pipeline = transforms(configure, steps)
    frame = scene().image
    with seeded(3):
        clip = pipeline.train(Sample(frame.expand(5, 3, 60, 80)))
    with seeded(3):
        image = pipeline.train(Sample(frame))
    assert all(torch.equal(one, image.image) for one in clip.image)
    assert pipeline.place(clip).image.shape == (3, 5, 64, 96)


OFF = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
RED = torch.tensor([200, 40, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
MANY = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def distorted(configure: Any, image: Tensor, count: int, **keys: float) -> list[Tensor]:
    """The image through ``photometric`` alone, by seeds 0, 1, …"""
    pipeline, found = transforms(configure, [{"name": "photometric"} | keys]), []
    for seed in range(count):
        with seeded(seed):
            found.append(pipeline.train(Sample(image)).image)
    return found


def unchanged(found: list[Tensor], image: Tensor) -> int:
    return sum(torch.equal(one, image) for one in found)


@pytest.mark.parametrize("change", [{"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}])
def test_each_colour_operation_comes_half_of_the_time(configure: Any, change: dict[str, float]) -> None:
    keys = OFF | change
    assert 75 < unchanged(distorted(configure, MANY, 200, **keys), MANY) < 125
    assert unchanged(distorted(configure, MANY, 30, **keys, probability=1), MANY) < 5
    assert unchanged(distorted(configure, MANY, 30, **keys, probability=0), MANY) == 30


def test_colours_are_changed_independently_and_channels_stay(configure: Any) -> None:
    """A sixteenth of the images keep all; no channel takes another's place, which torchvision's own transform does."""
    assert 6 < unchanged(distorted(configure, MANY, 320), MANY) < 40
    for one in distorted(configure, RED, 100, hue=0):
        assert bool((one[0] > one[1]).all())
        assert torch.equal(one[1], one[2])


def test_colours_keep_to_their_ranges(configure: Any) -> None:
    """Brightness by an eighth, and hue by a tenth of the circle: mmseg's 32 of 255 on white, and its 18 of 180."""
    grey = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    brightness = distorted(configure, grey, 150, **OFF | {"brightness": 0.125}, probability=1)
    values = [int(one[0, 0, 0]) for one in brightness]
    assert 174 <= min(values) <= 178
    assert 222 <= max(values) <= 225
    degrees = []
    for one in distorted(configure, RED, 150, **OFF | {"hue": 0.1}, probability=1):
        red, green, blue = (int(channel) for channel in one[:, 0, 0])
        degrees.append(60 * (green - blue) / (red - min(green, blue)))
    assert -37 < min(degrees) < -33
    assert 33 < max(degrees) < 37
    # A factor is never negative.
    distorted(configure, RED, 20, **OFF | {"brightness": 3.0}, probability=1)


def test_masks_shrink_around_their_own_centre() -> None:
    """Plain nearest would shift a mask up and to the left against its pixels."""
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 16:48, 16:48] = 1
    image = mask.expand(3, 64, 64) * 255
    after = resize(Sample(image, masks=mask), (13, 13))

    def centre(weights: Tensor) -> float:
        return float((weights.float() * (torch.arange(13) + 0.5)).sum() / weights.float().sum())

    assert after.masks is not None
    assert abs(centre(after.masks[0]) - centre(after.image[0])) < 0.1


def test_randomness_stays_inside_its_block() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(99):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(99):
        assert torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2, 2)])
def test_tiny_images_survive_everything(configure: Any, size: tuple[int, int]) -> None:
    for steps in (JITTER, CROP, LARGE, COLOUR):
        pipeline = transforms(configure, steps)
        with seeded(1):
            placed = pipeline.place(pipeline.train(Sample(torch.zeros(3, *size, dtype=torch.uint8))))
        assert placed.image.shape == (3, 64, 96)
