"""Recipes: what is wrong is said in one line with file, key, value and remedy."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import dump_recipe, find_recipe, load_recipe, parse_yaml, validate_recipe
from vitgraft.configs.worlds import possible_worlds

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
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_recipe(str(binary))
    listing = tmp_path / "list.yaml"
    listing.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_recipe(str(listing))


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(str(recipe))


def test_possible_worlds() -> None:
    assert possible_worlds(16, 1) == [1, 2, 4, 8, 16]
    assert possible_worlds(12, 2) == [1, 2, 3, 6]
