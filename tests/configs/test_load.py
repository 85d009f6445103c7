"""Recipes: what is wrong is said in one line with file, key, value and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import dump_recipe, find_recipe, load_recipe, validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.configs.worlds import possible_worlds
from vitgraft.configs.yaml_text import parse_yaml

WRONG = [
    ("model.backbone.depht=3", "model.backbone.depht: unknown key (value 3); did you mean 'depth'?"),
    ("nonsense=1", "nonsense: unknown key (value 1); valid keys: data, evaluate"),
    ("train.optimizer.lr=fast", "train.optimizer.lr: input should be a valid number, found 'fast'"),
    ("train.optimizer.name=adam", "train.optimizer.name: 'adam' is not one of 'adamw', 'sgd'; did you mean 'adamw'?"),
    ("model.head.name=mask_rcn", "did you mean 'mask_rcnn'?"),
    ("train.global_batch=0", "train.global_batch: input should be greater than or equal to 1, found 0"),
    ("train.zero_stage=4", "less than or equal to 3, found 4"),
    ("train.accumulation=5", "global_batch 8 must be a multiple of accumulation 5"),
    ("train.steps=3", "give exactly one of epochs and steps"),
    ("model.adapter={name: none}", "head mask_rcnn reads several strides; add adapter simple_pyramid"),
    ("model.adapter.strides=[4, 8]", "give one size for each stride"),
    ("data.image_size=[128]", "expected [height, width]"),
    (
        "data.transforms=[{name: scale_jitter, mx: 2}]",
        "data.transforms.0.mx: unknown key (value 2); did you mean 'max'?",
    ),
    (
        "train.extend.0.steps=9",
        "train.extend: 0 is a place in a list that the recipe does not write out; give all of it",
    ),
    ("train.param_groups=[{match: '('}]", "train.param_groups.0.match: not a regular expression"),
    ("model.backbone.num_heads=7", "must be a multiple of num_heads 7"),
    ("model.backbone.timm=vit_tiny_patch16_224", "timm names the sizes already; remove embed_dim"),
]


@pytest.mark.parametrize(("override", "expected"), WRONG)
def test_a_wrong_recipe_is_answered_with_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart/detection", [override])
    text = str(caught.value)
    assert expected in text
    assert "detection.yaml" in text
    assert "\n" not in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.optimizer.lr", "expected KEY=VALUE"),
        ("model.head.anchor_sizes.9=2", "needs an index from 0 to"),
        ("train.global_batch.x=1", "not a section"),
        ("train.seed=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        load_recipe("quickstart/detection", [override])


def test_every_packaged_recipe_is_valid_and_survives_a_round_trip() -> None:
    root = Path(str(resources.files("vitgraft.configs")))
    names = [str(path.relative_to(root)) for path in root.glob("*/*.yaml")]
    assert len(names) >= 3
    for name in names:
        recipe = load_recipe(name)
        again = validate_recipe(parse_yaml(dump_recipe(recipe), name), name)
        assert again == recipe
        assert again.identity_hash() == recipe.identity_hash()


def test_operational_keys_do_not_change_the_identity_and_others_do() -> None:
    base = load_recipe("quickstart/detection").identity_hash()
    for override in (
        "train.checkpoint.every_steps=7",
        "data.workers=0",
        "launch.threads=3",
        "train.zero_stage=0",
        "evaluator={}",
    ):
        assert load_recipe("quickstart/detection", [override]).identity_hash() == base
    for override in ("train.seed=1", "train.global_batch=16", "model.backbone.depth=2", "data.mean=[0.1, 0.1, 0.1]"):
        assert load_recipe("quickstart/detection", [override]).identity_hash() != base


def test_an_evaluator_needs_a_process_and_data() -> None:
    recipe = load_recipe("quickstart/detection", ["evaluator.backlog=all"])
    assert recipe.evaluator is not None
    assert (recipe.evaluator.backlog, recipe.evaluator.host, recipe.evaluator.device) == ("all", None, "auto")
    assert load_recipe("quickstart/detection").evaluator is None
    with pytest.raises(
        ConfigError, match=r"evaluator: train\.roles inline .*set evaluator to null, or roles to separate"
    ):
        load_recipe("quickstart/detection", ["evaluator={}", "train.roles=inline"])
    with pytest.raises(ConfigError, match=r"nothing to evaluate on; set data\.val, or evaluator to null"):
        load_recipe("quickstart/detection", ["evaluator={}", "data.val=null"])
    with pytest.raises(ConfigError, match=r"evaluator\.backlog"):
        load_recipe("quickstart/detection", ["evaluator.backlog=newest"])


def test_numbers_are_read_as_people_write_them() -> None:
    assert parse_yaml("[1e-4, 1.5, -2, 3, 1E3, .5, 007x]", "test") == [1e-4, 1.5, -2, 3, 1000.0, 0.5, "007x"]
    assert isinstance(parse_yaml("3", "test"), int)


def test_missing_and_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packaged recipes: quickstart/detection"):
        find_recipe("quickstart/detecton")
    binary = tmp_path / "recipe.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_recipe(str(binary))
    listing = tmp_path / "list.yaml"
    listing.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_recipe(str(listing))


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_recipe(str(recipe))


def test_possible_worlds() -> None:
    assert possible_worlds(16, 1) == [1, 2, 4, 8, 16]
    assert possible_worlds(12, 2) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.image_size=[1000000000, 1000000000]", "data.image_size.0: input should be less than or equal to 16384"),
        ("train.epochs=10000000000", "train.epochs: input should be less than or equal to"),
        ("train.global_batch=10000000", "train.global_batch: input should be less than or equal to"),
        ("data.workers=100000", "data.workers: input should be less than or equal to 1024"),
        ("data.prefetch=100000", "data.prefetch: input should be less than or equal to 1024"),
        ("launch.processes=100000", "launch.processes: input should be less than or equal to 1024"),
        ("launch.threads=100000", "launch.threads: input should be less than or equal to 1024"),
        ("launch.restart_delay_s=1e300", "launch.restart_delay_s: input should be less than or equal to"),
        ("model.backbone.depth=100000", "model.backbone.depth: input should be less than or equal to 1024"),
        ("model.backbone.embed_dim=10000000", "model.backbone.embed_dim: input should be less than or equal to 65536"),
        ("model.head.box_channels=10000000", "model.head.box_channels: input should be less than or equal to 65536"),
        (
            "model.adapter=[{name: simple_pyramid, channels: 10000000}]",
            "channels: input should be less than or equal to 65536",
        ),
        ("data.transforms=[{name: scale_jitter, max: 1e9}]", "less than or equal to 100"),
        ("train.param_groups=[{match: 'a{99999999999}'}]", "not a regular expression"),
        ("model.head.anchor_sizes.²=3", "needs an index from 0 to"),
    ],
)
def test_numbers_that_no_host_can_carry_are_refused_before_anything_starts(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart/detection", [override])
    assert expected in str(caught.value)


def test_no_number_of_the_schema_is_without_bound() -> None:
    """A new key gets a bound, or is named here with a reason."""
    free = {"seed"}  # it is hashed
    found = set(_unbounded(Recipe))
    assert found == free, sorted(found ^ free)


def _unbounded(section: type[BaseModel]) -> Iterator[str]:
    """Names of the integers that have no largest value, in a section and those under it."""
    for name, schema in section.model_json_schema()["$defs"].items():
        for key, value in schema.get("properties", {}).items():
            for part in _parts(value):
                if part.get("type") == "integer" and not {"maximum", "exclusiveMaximum", "const", "enum"} & part.keys():
                    assert name
                    yield key


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    yield value
    for part in [*value.get("anyOf", []), *([value["items"]] if isinstance(value.get("items"), dict) else [])]:
        yield from _parts(part)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "recipe.yaml/more"])
def test_names_that_no_file_has_are_recipes_that_are_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe(str(tmp_path / name))


def test_what_an_alias_stands_for_is_there_once_for_each_place() -> None:
    """An override of one of them would change the others."""
    tree = parse_yaml("a: &same {batch: 3}\nb: *same", "test")
    tree["a"]["batch"] = 4
    assert tree["b"] == {"batch": 3}


@pytest.mark.parametrize(
    "text", ["1e-4", "2024-01-01", "yes", "1:30", ".5", "5.", "1E3", "~", "null", "<<", "=", "017", "+.5e3", "0x1f"]
)
def test_a_resolved_recipe_says_what_was_written(text: str) -> None:
    """RUN/config.yaml is read at the next start, by others too."""
    recipe = load_recipe("quickstart/detection")
    named = recipe.model_copy(update={"name": text})
    assert validate_recipe(parse_yaml(dump_recipe(named), "config"), "config").name == text
    assert yaml.safe_load(dump_recipe(named))["name"] == text
