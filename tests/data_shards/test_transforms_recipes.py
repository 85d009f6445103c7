"""Transforms of published recipes: their geometry, their limits, what they draw, and where they are refused."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.load import validate_recipe
from vitgraft.configs.schema.transforms import CopyPaste, CutMix, Mixup, OneOf, PlainTransform
from vitgraft.data_shards.geometry import Sample, covering, shortest
from vitgraft.data_shards.transforms import Transforms, seeded


def pipeline(configure: Any, *steps: dict[str, Any], size: tuple[int, int] = (64, 96), **changes: Any) -> Transforms:
    return Transforms(configure(Path("x"), transforms=list(steps), image_size=list(size), **changes))


def position_image(height: int, width: int) -> torch.Tensor:
    """Each pixel says where it is: red its row, green its column (sides up to 256)."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    return torch.stack([rows, columns, torch.zeros_like(rows)])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((500, 500), 480, 1333, (480, 480)),
        ((1, 5000), 480, 1333, (1, 1333)),
    ],
)
def test_short_side_and_longest_side(size: tuple[int, int], short: int, long: int, expected: tuple[int, int]) -> None:
    assert shortest(size, short, long) == expected


def test_multi_scale_takes_every_side_and_no_other(configure: Any) -> None:
    image = noise(3, 60, 120)
    choice = pipeline(configure, {"name": "multi_scale", "short": [32, 40, 48], "max_long": 88}, size=(90, 90))
    ranged = {"name": "multi_scale", "short": [30, 33], "sampling": "range", "max_long": 999}
    several = pipeline(configure, ranged, size=(90, 90))
    found: dict[str, set[tuple[int, int]]] = {"choice": set(), "range": set()}
    for seed in range(60):
        for name, transforms in (("choice", choice), ("range", several)):
            with seeded(seed):
                found[name].add(transforms.train(Sample(image)).size)
    # 48 would make the long side 96, so it ends at 88.
    assert found["choice"] == {(32, 64), (40, 80), (44, 88)}
    assert found["range"] == {(30, 60), (31, 62), (32, 64), (33, 66)}


def test_what_multi_scale_leaves_too_large_is_fitted(configure: Any) -> None:
    transforms = pipeline(configure, {"name": "multi_scale", "short": [200]}, size=(64, 96))
    with seeded(0):
        assert transforms.train(Sample(noise(3, 60, 90))).size == (64, 96)


def test_large_scale_jitter_covers_its_range_under_a_fixed_crop(configure: Any) -> None:
    """Factors uniform in 0.1..2.0: as many images below the canvas as 0.9 of 1.9, and whole crops above it."""
    transforms = pipeline(configure, {"name": "scale_jitter"}, {"name": "random_crop"}, size=(64, 64))
    sides = []
    for seed in range(400):
        with seeded(seed):
            size = transforms.train(Sample(noise(3, 50, 50))).size
        assert size[0] == size[1] <= 64
        sides.append(size[0])
    below = sum(side < 64 for side in sides) / len(sides)
    assert 0.40 < below < 0.55
    assert min(sides) <= 10


def test_crops_of_random_size(configure: Any) -> None:
    """DETR's crop: height and width each from the range, smaller images whole; pixels come from one place."""
    transforms = pipeline(configure, {"name": "random_crop", "sides": [40, 60]}, size=(200, 200))
    heights, widths = set(), set()
    for seed in range(80):
        with seeded(seed):
            image = transforms.train(Sample(position_image(50, 120))).image
        height, width = image.shape[1:]
        heights.add(height)
        widths.add(width)
        assert torch.equal(image[0] - image[0, 0, 0], position_image(height, width)[0])
        assert torch.equal(image[1] - image[1, 0, 0], position_image(height, width)[1])
    assert heights == set(range(40, 51))
    assert min(widths) >= 40
    assert max(widths) <= 60
    assert len(widths) > 10
    with seeded(0):
        assert transforms.train(Sample(noise(3, 20, 30))).size == (20, 30)


def test_crops_show_several_classes(configure: Any) -> None:
    """A map with one class but for a corner: without the limit most crops show that class alone, with it few do."""
    label_map = torch.zeros(100, 100, dtype=torch.uint8)
    label_map[:, 60:] = 1
    label_map[:50, :30] = 255
    plain = pipeline(configure, {"name": "random_crop"}, size=(30, 30))
    limited = pipeline(configure, {"name": "random_crop", "cat_max_ratio": 0.75}, size=(30, 30))

    def poor(transforms: Transforms, seed: int) -> bool:
        with seeded(seed):
            found = transforms.train(Sample(noise(3, 100, 100), label_map=label_map)).label_map
        assert found is not None
        assert found.shape == (30, 30)
        counts = torch.tensor([(found == value).sum() for value in (0, 1)]).float()
        return bool(counts.max() >= 0.75 * counts.sum())

    without, with_limit = (sum(poor(transforms, seed) for seed in range(60)) for transforms in (plain, limited))
    assert without > 35
    assert with_limit < 10


def test_a_map_of_one_class_or_none_is_cropped_all_the_same(configure: Any) -> None:
    limited = pipeline(configure, {"name": "random_crop", "cat_max_ratio": 0.75}, size=(30, 30))
    for value in (3, 255):
        with seeded(1):
            after = limited.train(Sample(noise(3, 50, 50), label_map=torch.full((50, 50), value, dtype=torch.uint8)))
        assert after.size == (30, 30)


def test_a_good_first_crop_is_that_of_the_plain_crop(configure: Any) -> None:
    """The limit draws further numbers only where it refuses a crop."""
    stripes = (torch.arange(100) % 2).to(torch.uint8).expand(100, 100)
    sample = Sample(position_image(100, 100), label_map=stripes)
    crops = []
    for step in ({"name": "random_crop"}, {"name": "random_crop", "cat_max_ratio": 0.75}):
        with seeded(5):
            crops.append(pipeline(configure, step, size=(30, 30)).train(sample).image)
    assert torch.equal(*crops)


def test_rand_augment_changes_all_frames_alike(configure: Any) -> None:
    frame = noise(3, 40, 60)
    changed = 0
    for seed in range(25):
        transforms = pipeline(configure, {"name": "rand_augment", "magnitude": 20}, {"name": "random_erasing"})
        with seeded(seed):
            clip = transforms.train(Sample(frame.expand(4, 3, 40, 60))).image
        with seeded(seed):
            augmented = pipeline(configure, {"name": "rand_augment", "magnitude": 20}).train(Sample(frame)).image
        assert clip.shape == (4, 3, 40, 60)
        assert clip.dtype == torch.uint8
        erased = (clip != augmented).any(1)
        assert bool((~erased).any())
        assert torch.equal(clip[0][:, ~erased.any(0)], augmented[:, ~erased.any(0)])
        changed += not torch.equal(augmented, frame)
    assert changed > 18


def test_rand_augment_fills_with_the_mean_colour(configure: Any) -> None:
    """At the largest magnitude a geometric operation moves pixels out; what comes in is neither black nor white."""
    transforms = pipeline(
        configure, {"name": "rand_augment", "operations": 1, "magnitude": 30}, size=(60, 60), mean=[0.2, 0.4, 0.6]
    )
    found = 0
    for seed in range(60):
        with seeded(seed):
            image = transforms.train(Sample(torch.full((3, 60, 60), 255, dtype=torch.uint8))).image
        colours = {tuple(pixel) for pixel in image.flatten(1).T.tolist()}
        found += (51, 102, 153) in colours
    assert found > 5


def test_erasing_is_one_rectangle_of_the_right_size_in_all_frames(configure: Any) -> None:
    white = torch.full((3, 3, 50, 80), 255, dtype=torch.uint8)
    step = {"name": "random_erasing", "probability": 1.0, "fill": "mean", "min_area": 0.1, "max_area": 0.2}
    transforms = pipeline(configure, step, mean=[0.2, 0.4, 0.6])
    places = set()
    for seed in range(40):
        with seeded(seed):
            image = transforms.train(Sample(white)).image
        hole = (image != 255).any(1)
        assert torch.equal(hole[0], hole[1])
        rows, columns = hole[0].any(1).nonzero().flatten(), hole[0].any(0).nonzero().flatten()
        height, width = len(rows), len(columns)
        assert int(hole[0].sum()) == height * width
        # Rounding the sides of a rectangle of this size shifts its area by less than a fifth.
        assert 0.08 < height * width / 4000 < 0.24
        assert image[:, :, hole[0]].flatten(2).unique(dim=2).flatten().tolist() == [51, 102, 153] * 3
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 30
    assert bool((white == 255).all())


def test_erasing_by_noise_is_normal_once_normalised(configure: Any) -> None:
    step = {"name": "random_erasing", "probability": 1.0, "min_area": 0.5, "max_area": 0.6}
    transforms = pipeline(configure, step, size=(200, 200), mean=[0.5] * 3, std=[0.1] * 3)
    with seeded(1):
        sample = transforms.train(Sample(torch.full((3, 200, 200), 255, dtype=torch.uint8)))
    values = transforms.place(sample).image[transforms.place(sample).image < 4.9]
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 40)])
def test_erasing_as_often_as_asked_for(configure: Any, probability: float, expected: int) -> None:
    transforms = pipeline(configure, {"name": "random_erasing", "probability": probability})
    image, changed = noise(3, 60, 60), 0
    for seed in range(40):
        with seeded(seed):
            changed += not torch.equal(transforms.train(Sample(image)).image, image)
    assert changed == expected


def test_one_of_several_pipelines(configure: Any) -> None:
    options = [
        [{"name": "multi_scale", "short": [20]}],
        [{"name": "random_crop", "sides": [10, 10]}, {"name": "multi_scale", "short": [30]}],
    ]
    transforms = pipeline(configure, {"name": "one_of", "options": options})
    sizes = []
    for seed in range(60):
        with seeded(seed):
            sizes.append(transforms.train(Sample(noise(3, 40, 60))).size)
    assert set(sizes) == {(20, 30), (30, 30)}
    assert 15 < sizes.count((20, 30)) < 45


def test_random_numbers_of_a_recipe_are_fixed(configure: Any) -> None:
    """What each transform draws, drawn here by hand: runs that were started with it go on as they began."""
    steps = [{"name": "scale_jitter", "min": 0.5, "max": 2.0}, {"name": "random_crop"}, {"name": "horizontal_flip"}]
    transforms = pipeline(configure, *steps, size=(64, 64))
    for seed in range(20):
        with seeded(seed):
            after = transforms.train(Sample(position_image(64, 64)))
            following = torch.rand(())
        with seeded(seed):
            side = round(64 * (0.5 + 1.5 * float(torch.rand(()))))
            for _ in range(2):
                torch.randint(0, max(side - 64, 0) + 1, ())
            flipped = float(torch.rand(())) < 0.5
            assert torch.equal(following, torch.rand(()))
        assert after.size == (min(side, 64), min(side, 64))
        assert bool(after.image[1, 0, 0] > after.image[1, 0, -1]) == flipped


@pytest.mark.parametrize("size", [(60, 80), (80, 60), (64, 64), (3, 900), (900, 3), (1, 1)])
def test_covering_the_canvas(size: tuple[int, int]) -> None:
    height, width = covering(size, (64, 96))
    assert height >= 64
    assert width >= 96
    assert height == 64 or width == 96
    assert abs(height / width - size[0] / size[1]) < 0.02 * size[0] / size[1]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"name": "multi_scale", "short": []}], "short is empty"),
        ([{"name": "multi_scale", "short": [9, 8], "sampling": "range"}], "is no range"),
        ([{"name": "random_crop", "sides": [600, 384]}], r"expected \[smallest, largest\]"),
        ([{"name": "random_crop", "cat_max_ratio": 1.0}], "less than 1"),
        ([{"name": "rand_augment", "magnitude": 31}], "less than or equal to 30"),
        ([{"name": "random_erasing", "min_area": 0.5, "max_area": 0.4}], "min_area 0.5 is larger"),
        ([{"name": "one_of", "options": [[]]}], "at least two lists"),
        ([{"name": "one_of", "options": [[{"name": "mixup"}], []]}], "mixup"),
        ([{"name": "copy_paste"}, {"name": "copy_paste"}], "copy_paste is listed twice"),
        ([{"name": "mixup"}, {"name": "resize"}], "put them last"),
        ([{"name": "mixup"}, {"name": "cutmix"}], "add up to 2.0; give 0.5 each"),
    ],
)
def test_impossible_transforms(configure: Any, steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        configure(Path("x"), transforms=steps)


HEADS = {
    "detection": (
        {"name": "mask_rcnn", "anchor_sizes": [16, 32, 64]},
        {"name": "simple_pyramid", "strides": [4, 8, 16]},
    ),
    "semantic": ({"name": "upernet"}, {"name": "simple_pyramid", "strides": [4, 8, 16]}),
    "video": ({"name": "classifier"}, {"name": "none"}),
}


def recipe(task: str, transforms: list[dict[str, Any]], **evaluate: Any) -> dict[str, Any]:
    head, adapter = HEADS[task]
    backbone = {"name": "vit", "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    return {
        "model": {"backbone": backbone, "adapter": adapter, "head": head},
        "data": {"train": {"path": "x"}, "image_size": [64, 64], "transforms": transforms},
        "train": {"steps": 1, "global_batch": 2, "optimizer": {"name": "adamw", "lr": 1e-3}},
        "evaluate": evaluate,
    }


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("detection", "mixup"),
        ("semantic", "cutmix"),
        ("semantic", "rand_augment"),
        ("detection", "random_erasing"),
        ("video", "copy_paste"),
        ("semantic", "copy_paste"),
    ],
)
def test_transforms_that_labels_cannot_follow(task: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^r.yaml: .*{name} .*the head does {task}; remove it$"):
        validate_recipe(recipe(task, [{"name": name}]), "r.yaml")


def test_limits_for_another_task_are_refused_inside_a_choice_too() -> None:
    crop = {"name": "random_crop", "cat_max_ratio": 0.75}
    validate_recipe(recipe("semantic", [crop]), "r.yaml")
    with pytest.raises(ConfigError, match="cat_max_ratio reads a label map, the head does detection"):
        validate_recipe(recipe("detection", [{"name": "one_of", "options": [[crop], []]}]), "r.yaml")
    with pytest.raises(ConfigError, match=r"evaluate.views: views are of videos, the head does semantic"):
        validate_recipe(recipe("semantic", [], views={"clips": 2}), "r.yaml")


def test_keys_at_their_defaults_leave_the_identity_of_a_recipe_alone() -> None:
    """Runs that were started before these keys existed resume: their hash was made without them."""
    crop = validate_recipe(recipe("video", [{"name": "random_crop"}]), "r.yaml")
    tree = crop.identity()
    assert tree["data"]["transforms"] == [{"name": "random_crop", "sides": None, "cat_max_ratio": None}]
    tree["data"]["transforms"] = [{"name": "random_crop"}]
    del tree["data"]["train"]["weight"], tree["data"]["clip"]["decoder"], tree["train"]["init_from"]
    assert crop.has_hash(sha256_of(tree))
    changed = validate_recipe(recipe("video", [{"name": "random_crop", "sides": [8, 9]}]), "r.yaml")
    assert changed.identity()["data"]["transforms"][0]["sides"] == [8, 9]
    assert not crop.has_hash(changed.identity_hash())


def documented() -> list[tuple[str, list[dict[str, Any]]]]:
    """The recipes in docs/data.md: the task that the first line names, and the transforms."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    section = page.partition("\n## Transforms\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```yaml\n# (\w+): .*?\n(.*?)```", section, re.DOTALL)
    return [(task, yaml.safe_load(text)) for task, text in blocks]


def test_documented_recipes_are_valid_and_run(configure: Any) -> None:
    found = documented()
    assert [task for task, _ in found] == ["detection", "detection", "semantic", "video"]
    for task, steps in found:
        validate_recipe(recipe(task, steps), "docs/data.md")
        transforms = pipeline(configure, *steps, size=(64, 64))
        with seeded(0):
            after = transforms.train(Sample(noise(3, 60, 80), label_map=noise(60, 80) % 3))
        assert max(after.size) <= 64


def test_every_transform_is_documented_with_its_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = {
        name: row
        for row in page.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    for section in (*typing.get_args(PlainTransform), OneOf, CopyPaste, Mixup, CutMix):
        fields = {key: field for key, field in section.model_fields.items() if key != "name"}
        row = rows[section.model_fields["name"].default]
        for key, field in fields.items():
            assert f"`{key}`" in row, (section, key)
            if isinstance(field.default, int | float) and key != "max_area":
                assert str(field.default) in row, (section, key)
