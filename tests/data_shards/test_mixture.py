"""Several data sets in one epoch: exact composition, in proportion everywhere, each in the order that it has alone."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import DataConfig
from vitgraft.configs.schema.data import SourceConfig
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import train_batches
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.mixture import STRETCH, Part, mixture_entries, mixture_fingerprint, plan_epoch
from vitgraft.data_shards.pack.digits import pack_digits
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.plan import EpochPlan, micro_batches

Configure = Callable[..., DataConfig]

REPEATS = st.one_of(st.integers(1, 3), st.fractions(Fraction(1, 10), 4, max_denominator=20))


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    count = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 40), min_size=1, max_size=40)
    return [Part(f"source {number}", draw(sizes), draw(REPEATS)) for number in range(count)]


@given(parts(), st.integers(0, 3), st.integers(0, 5))
def test_the_composition_of_an_epoch_is_exact(parts: list[Part], seed: int, epoch: int) -> None:
    """Each sample floor(w) times, and of the rest exactly so many once more that round(w n) entries come together."""
    plan = plan_epoch(parts, seed, epoch)
    entries = plan.entries(0, len(plan))
    assert len(plan) == mixture_entries(parts) == len(entries)
    assert [(entry.epoch, entry.position) for entry in entries] == [(epoch, i) for i in range(len(plan))]
    assert len({(entry.sample, entry.repetition) for entry in entries}) == len(entries)
    visits = Counter(entry.sample for entry in entries)
    offset = 0
    for part in parts:
        mine = [visits[sample] for sample in range(offset, offset + part.samples)]
        whole = int(part.repeats)
        assert set(mine) <= {whole, whole + 1}
        assert abs(sum(mine) - part.repeats * part.samples) <= Fraction(1, 2)
        offset += part.samples
    assert max(visits, default=-1) < offset


@given(parts(), st.data())
def test_any_stretch_can_be_read_alone(parts: list[Part], data: st.DataObject) -> None:
    plan = plan_epoch(parts, 1, 0)
    start = data.draw(st.integers(0, len(plan)))
    stop = data.draw(st.integers(start, len(plan)))
    assert plan_epoch(parts, 1, 0).entries(start, stop) == plan.entries(0, len(plan))[start:stop]


def test_one_source_is_no_mixture() -> None:
    alone, mixed = EpochPlan("f", [7, 9], 3, 1, 2), plan_epoch([Part("f", [7, 9], 2)], 3, 1)
    assert mixed.entries(0, 32) == alone.entries(0, 32)
    assert mixture_fingerprint(["f"]) == "f"


def test_each_source_keeps_the_order_that_it_has_alone() -> None:
    first, second = Part("a", [500] * 40), Part("b", [300] * 7, Fraction(7, 2))
    plan = plan_epoch([first, second], 3, 1)
    entries = plan.entries(0, len(plan))
    for part, offset in ((first, 0), (second, 20_000)):
        alone = EpochPlan(part.fingerprint, part.shard_sizes, 3, 1, part.repeats)
        mine = [e for e in entries if offset <= e.sample < offset + part.samples]
        expected = alone.entries(0, len(alone))
        assert [(e.sample - offset, e.repetition) for e in mine] == [(e.sample, e.repetition) for e in expected]


def test_every_part_of_an_epoch_has_the_sources_in_proportion_and_shuffled() -> None:
    plan = plan_epoch([Part("a", [1000] * 24), Part("b", [100] * 80)], 0, 0)
    sources = [entry.sample >= 24_000 for entry in plan.entries(0, len(plan))]
    for start in range(0, len(sources) - 4000, 1000):
        share = sum(sources[start : start + 4000])
        # A quarter, but for the ends of stretches, of which two are cut.
        assert abs(share - 1000) < STRETCH / 5
    runs = sum(a != b for a, b in itertools.pairwise(sources))
    assert 0.9 < runs / (2 * 0.25 * 0.75 * len(sources)) < 1.1


def test_order_and_fingerprint_never_drift() -> None:
    """Resuming a run after an upgrade relies on these very numbers."""
    plan = plan_epoch([Part("0" * 64, [5, 7]), Part("1" * 64, [4], Fraction(3, 2))], seed=3, epoch=2)
    assert [(entry.sample, entry.repetition) for entry in plan.entries(0, len(plan))] == GOLDEN
    assert mixture_fingerprint(["0" * 64, "1" * 64]) == GOLDEN_FINGERPRINT
    assert mixture_fingerprint(["1" * 64, "0" * 64]) != GOLDEN_FINGERPRINT


GOLDEN = [
    (14, 0),
    (8, 0),
    (4, 0),
    (2, 0),
    (0, 0),
    (9, 0),
    (11, 0),
    (3, 0),
    (13, 0),
    (15, 0),
    (12, 0),
    (7, 0),
    (1, 0),
    (14, 1),
    (10, 0),
    (6, 0),
    (12, 1),
    (5, 0),
]
GOLDEN_FINGERPRINT = "6562b9e50260e784f3df50be94059167c7208f40b271d4c2197541e101fd2241"


def test_seed_epoch_and_sources_each_decide_the_order() -> None:
    def order(second: str = "b", seed: int = 0, epoch: int = 0) -> list[bool]:
        plan = plan_epoch([Part("a", [60]), Part(second, [60])], seed, epoch)
        return [entry.sample >= 60 for entry in plan.entries(0, 120)]

    assert len({tuple(o) for o in (order(), order("c"), order(seed=1), order(epoch=1))}) == 4


def test_a_fraction_takes_other_samples_in_each_epoch() -> None:
    drawn = []
    for epoch in range(40):
        plan = EpochPlan("f", [10] * 10, 0, epoch, Fraction(1, 4))
        drawn.append({entry.sample for entry in plan.entries(0, len(plan))})
    assert {len(samples) for samples in drawn} == {25}
    visits = Counter(sample for samples in drawn for sample in samples)
    assert len(visits) == 100
    # Ten visits each are expected.
    assert 2 <= min(visits.values()) <= max(visits.values()) <= 20


def test_a_fraction_is_drawn_from_all_blocks_alike() -> None:
    plan = EpochPlan("f", [100] * 64, 0, 0, Fraction(1, 10))
    found = Counter(entry.sample // 100 for entry in plan.entries(0, len(plan)))
    blocks = [sum(found[int(shard)] for shard in block) for block in plan._blocks]
    assert blocks == [160] * 4


@settings(deadline=None, max_examples=30)
@given(parts(), st.sampled_from([(12, 1), (12, 2), (24, 2)]))
def test_every_world_sees_the_same_steps(parts: list[Part], shape: tuple[int, int]) -> None:
    batch, accumulation = shape
    size = mixture_entries(parts)
    found = []
    for world in (1, 3, 6):
        steps: dict[int, list[Any]] = {}
        for rank in range(world):
            cut = micro_batches(
                lambda epoch: plan_epoch(parts, 5, epoch),
                epoch_size=size,
                first_step=0,
                last_step=-(-size // batch) + 2,
                global_batch=batch,
                accumulation=accumulation,
                rank=rank,
                world=world,
            )
            for micro in cut:
                steps.setdefault(micro.step, []).extend(micro.entries)
        found.append({step: sorted(entries) for step, entries in steps.items()})
    assert found[0] == found[1] == found[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sets of digits scenes with other samples: 22 and 9."""
    root = tmp_path_factory.mktemp("two")
    pack_digits("semantic", "val", root / "a", samples=22, samples_per_shard=10)
    pack_digits("semantic", "train", root / "b", samples=9, samples_per_shard=4)
    return [root / "a", root / "b"]


def mixed(two: list[Path], configure: Configure, **changes: Any) -> PackedDataset:
    train = [{"path": str(two[0])}, {"path": str(two[1]), "weight": 2.5}]
    config = configure(two[0], train=train, **changes)
    return PackedDataset(config.train, config, "semantic", seed=7)


def cut(dataset: PackedDataset, last: int) -> Any:
    return micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=0,
        last_step=last,
        global_batch=8,
        accumulation=1,
        rank=0,
        world=1,
    )


def test_batches_hold_the_samples_of_their_sources(two: list[Path], configure: Configure) -> None:
    dataset = mixed(two, configure, transforms=[])
    assert (len(dataset), dataset.epoch_size) == (31, 22 + 23)
    assert dataset.fingerprint == mixture_fingerprint([read_manifest(folder).fingerprint for folder in two])
    alone = [PackedDataset(folder, configure(folder, transforms=[]), "semantic", seed=7) for folder in two]
    entries = dataset.plan(0).entries(0, 45)
    assert {entry.sample >= 22 for entry in entries[:8]} == {False, True}
    for entry in entries[:8]:
        source, sample = (1, entry.sample - 22) if entry.sample >= 22 else (0, entry.sample)
        expected = alone[source].train_batch([entry._replace(sample=sample)])
        batch = dataset.train_batch([entry])
        assert bool((batch.images == expected.images).all())
        assert bool((batch.targets == expected.targets).all())
        assert dataset.reader.read(entry.sample) == alone[source].reader.read(sample)
        assert dataset.reader.key(entry.sample) == f"{two[source]}:{sample:09d}"
    with pytest.raises(IndexError):
        dataset.reader.read(31)


@pytest.mark.slow
def test_workers_read_a_mixture(two: list[Path], configure: Configure) -> None:
    runs = []
    for workers in (0, 2):
        dataset = mixed(two, configure, transforms=[{"name": "photometric"}], workers=workers)
        batches = list(train_batches(dataset, cut(dataset, 6)))
        assert sum(len(batch.entries) for _, batch in batches) == 45
        runs.append([batch.images.numpy().tobytes() for _, batch in batches])
    assert runs[0] == runs[1]


def test_a_mixture_can_be_pickled(two: list[Path], configure: Configure) -> None:
    dataset = mixed(two, configure)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.plan(1).entries(0, 45) == dataset.plan(1).entries(0, 45)
    assert copy.reader.read(30) == dataset.reader.read(30)
    assert (copy.fingerprint, copy.epoch_size, len(copy)) == (dataset.fingerprint, 45, 31)


def test_what_cannot_be_mixed_is_refused(two: list[Path], tmp_path: Path, configure: Configure) -> None:
    def open_mixture(*sources: dict[str, Any]) -> None:
        config = configure(two[0], train=list(sources))
        PackedDataset(config.train, config, "semantic")

    a, b = str(two[0]), str(two[1])
    with pytest.raises(ConfigError, match=r"data\.train: .*/a holds the same data as .*/a; keep one and raise"):
        open_mixture({"path": a}, {"path": b}, {"path": a})
    with pytest.raises(ConfigError, match=r"/b: weight 0\.05 of 9 samples is not one entry in an epoch"):
        open_mixture({"path": a}, {"path": b, "weight": 0.05})
    manifest = read_manifest(two[0])
    with DatasetWriter(tmp_path / "other", "semantic", ["x", "y"]) as writer:
        members = {"png": b"1", "label.png": b"2"}
        writer.add(members, {"height": 1, "width": 1})
    with pytest.raises(DataError, match=rf"semantic with 2, semantic with {len(manifest.classes)}\); pack it with"):
        open_mixture({"path": a}, {"path": str(tmp_path / "other")})
    pack_digits("video", "val", tmp_path / "video", samples=2)
    with pytest.raises(ConfigError, match="holds video data"):
        open_mixture({"path": a}, {"path": str(tmp_path / "video")})


def test_weights_mean_what_is_written() -> None:
    def visits(**keys: Any) -> Fraction:
        return SourceConfig.model_validate({"path": "x", **keys}).visits

    assert [visits(), visits(repeats=3), visits(weight=0.1), visits(weight=2)] == [1, 3, Fraction(1, 10), 2]
    # As the binary fraction nearest to 0.1 it would be 26 of 255 samples: 25.5 is rounded up, and 25.4999... down.
    assert mixture_entries([Part("f", [255], visits(weight=0.1))]) == 26


RECIPE = "quickstart/semantic"


def test_recipes_of_one_source_stay_as_they_are() -> None:
    """Runs from before mixtures go on: their recipe's hash held neither a list nor a weight."""
    recipe = load_recipe(RECIPE)
    assert recipe.identity()["data"]["train"] == {"repeats": recipe.data.train[0].repeats, "weight": None}
    assert recipe.model_dump()["data"]["train"]["path"] == recipe.data.train[0].path
    moved = load_recipe(RECIPE, ["data.train.path=elsewhere"])
    assert moved.identity_hash() == recipe.identity_hash()


def test_paths_of_a_mixture_may_change_and_weights_may_not() -> None:
    def identity(text: str) -> str:
        return load_recipe(RECIPE, [f"data.train={text}"]).identity_hash()

    base = identity("[{path: a, weight: 2}, {path: b}]")
    assert identity("[{path: c, weight: 2.0}, {path: d, repeats: 1}]") == base
    for other in ("[{path: a, weight: 3}, {path: b}]", "[{path: a, weight: 2}]", "[{path: b}, {path: a, weight: 2}]"):
        assert identity(other) != base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "data.train: list should have at least 1 item"),
        ("5", "data.train: input should be a valid list"),
        ("{repeats: 2}", "data.train.path: missing"),
        ("{path: a, weigth: 2}", "data.train.weigth: unknown key (value 2); did you mean 'weight'?"),
        ("[{path: a}, {path: b, weight: 0}]", "data.train.1.weight: input should be greater than 0"),
        ("[{path: a, weight: .nan}]", "--set data.train:1: '.nan' is not finite"),
        ("[{path: a, weight: 1e30}]", "data.train.0.weight: input should be less than or equal to 10000"),
        ("[{path: a, weight: 1.5, repeats: 2}]", "repeats 2 and weight 1.5 say the same; keep one"),
    ],
)
def test_wrong_mixtures_are_answered_with_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(RECIPE, [f"data.train={text}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
