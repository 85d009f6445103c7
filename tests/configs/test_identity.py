"""A run's identity: its difference from defaults that do not change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.recipe import OPERATIONAL
from vitgraft.configs.schema.section import Section

RECIPE = "quickstart/detection"
GOLDEN = Path(__file__).parents[1] / "golden" / "defaults.json"


def _sections(base: type[Section]) -> Iterator[type[Section]]:
    for section in base.__subclasses__():
        yield section
        yield from _sections(section)


def defaults() -> dict[str, dict[str, Any]]:
    """Every section's keys that have a default, as JSON would hold it."""
    found: dict[str, dict[str, Any]] = {}
    for section in {section.__name__: section for section in _sections(Section)}.values():
        if not section.__module__.startswith("vitgraft.configs."):
            continue
        fields = found[section.__name__] = {}
        for key, field in sorted(section.model_fields.items()):
            value = field.get_default(call_default_factory=True, validated_data={})
            if value is not PydanticUndefined:
                fields[key] = json.loads(json.dumps(value, default=lambda part: part.model_dump(mode="json")))
    return dict(sorted(found.items()))


def test_no_default_has_changed() -> None:
    """A changed default changes what old recipes compute. After adding keys or sections write the file anew:
    ``python tests/configs/test_identity.py``."""
    assert Recipe in _sections(Section)
    assert defaults() == json.loads(GOLDEN.read_text())


def test_a_key_at_its_default_is_no_part_of_the_hash() -> None:
    base = load_recipe(RECIPE)
    written_out = load_recipe(RECIPE, ["train.ema=null", "data.clip={frames: 8}", "model.head.nms_threshold=0.5"])
    assert written_out.identity_hash() == base.identity_hash()
    assert load_recipe(RECIPE, ["model.head.nms_threshold=0.6"]).identity_hash() != base.identity_hash()
    assert load_recipe(RECIPE, ["data.clip={frames: 9}"]).identity_hash() != base.identity_hash()


def test_what_a_section_is_belongs_to_the_hash_though_it_is_its_default() -> None:
    base = load_recipe(RECIPE, ["train.schedule={name: cosine}"])
    assert load_recipe(RECIPE, ["train.schedule={name: poly}"]).identity_hash() != base.identity_hash()


def test_how_and_where_a_run_runs_is_no_part_of_its_hash() -> None:
    base, moved = (
        load_recipe(RECIPE),
        load_recipe(RECIPE, ["data.train.path=x", "data.workers=3", "train.zero_stage=3"]),
    )
    assert moved.identity_hash() == base.identity_hash()
    assert moved.identity() == base.identity()
    assert "launch" in OPERATIONAL
    assert "launch" not in base.identity()


def test_the_hash_of_manifests_before_this_one_is_known() -> None:
    """That was over all keys."""
    recipe = load_recipe(RECIPE)
    tree = recipe.identity()
    del tree["data"]["train"]["weight"], tree["data"]["clip"]["decoder"], tree["train"]["init_from"]
    assert recipe.has_hash(sha256_of(tree))
    assert recipe.has_hash(recipe.identity_hash())
    assert not recipe.has_hash(load_recipe(RECIPE, ["train.seed=7"]).identity_hash())


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(defaults(), indent=1) + "\n")
