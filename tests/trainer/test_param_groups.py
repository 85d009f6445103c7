"""Parameter groups: rules in order, decay, and layer-wise learning rates against the closed formula."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import BackboneConfig, ModelConfig
from vitgraft.configs.schema.train import TrainConfig
from vitgraft.models import registry
from vitgraft.models.build import build_model
from vitgraft.models.layer_decay import layer_of
from vitgraft.trainer.param_groups import Group, ParameterFacts, check_rules, frozen_names, make_groups

FACTS = [
    ParameterFacts("backbone.vit.pos_embed", 3),
    ParameterFacts("backbone.vit.blocks.0.norm1.weight", 1),
    ParameterFacts("backbone.vit.blocks.0.attn.qkv.weight", 2),
    ParameterFacts("backbone.vit.blocks.1.attn.qkv.weight", 2),
    ParameterFacts("backbone.vit.blocks.1.attn.qkv.bias", 1),
    ParameterFacts("head.classifier.weight", 2),
]
NAMES = [fact.name for fact in FACTS]


def config_of(**changes: Any) -> TrainConfig:
    base = {"steps": 1, "global_batch": 1, "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}}
    return TrainConfig.model_validate(base | changes)


def groups_of(depth: int = 2, **changes: Any) -> list[Group]:
    return make_groups(config_of(**changes), FACTS, lambda name: layer_of(name, depth), depth)


def settings(groups: list[Group]) -> dict[str, tuple[float, float]]:
    """(multiplier, weight decay) by name."""
    return {name: (group.lr_multiplier, group.weight_decay) for group in groups for name in group.names}


def test_without_rules_there_are_two_groups_in_the_order_of_the_model() -> None:
    assert groups_of() == [
        Group((NAMES[0], NAMES[2], NAMES[3], NAMES[5]), 1.0, 0.05),
        Group((NAMES[1], NAMES[4]), 1.0, 0.0),
    ]


def test_layer_decay_is_the_closed_formula() -> None:
    found = settings(groups_of(layer_decay=0.7))
    # depth 2: embeddings are layer 0, block i is layer i + 1, the head is layer 3 = depth + 1.
    layers = [0, 1, 1, 2, 2, 3]
    for name, layer in zip(NAMES, layers, strict=True):
        assert found[name][0] == pytest.approx(0.7 ** (3 - layer))
    assert found["head.classifier.weight"][0] == 1.0


def test_layer_decay_on_a_real_model() -> None:
    tree = {
        "backbone": {"name": "vit", "embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8},
        "adapter": [{"name": "adaptformer", "bottleneck": 4}],
        "head": {"name": "video_transformer", "embed_dim": 16, "num_heads": 2, "grid": 2},
    }
    model = build_model(ModelConfig.model_validate(tree), num_classes=3, image_size=(16, 16))
    facts = [ParameterFacts(name, p.dim()) for name, p in model.named_parameters()]
    found = settings(make_groups(config_of(layer_decay=0.5), facts, lambda name: layer_of(name, 3), 3))
    assert len(found) == len(facts)
    for name, (multiplier, decay) in found.items():
        part = name.split(".")
        if ".adaptmlp." in name or not name.startswith("backbone.") or name.startswith("backbone.vit.norm."):
            assert multiplier == 1.0, name
        elif "blocks" in part:
            assert multiplier == pytest.approx(0.5 ** (3 - int(part[part.index("blocks") + 1]))), name
        else:
            assert multiplier == pytest.approx(0.5**4), name
        assert decay == (0.0 if name.endswith("bias") or "norm" in part[-2] else 0.05) or "scale" in name, name


@pytest.mark.parametrize("trunk", ["eva01", "eva02"])
def test_residual_convolutions_have_the_full_rate(trunk: str) -> None:
    """They are not pre-trained; the rate of block 0 would be next to nothing (detectron2's ViTDet)."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "window_size": 2, "global_blocks": [1]}
    config: Any = TypeAdapter(BackboneConfig).validate_python({"name": trunk, "residual_blocks": [0, 1], **sizes})
    names = [f"backbone.{n}" for n, _ in registry.build("backbone", config, image_size=(32, 32)).named_parameters()]
    facts = [ParameterFacts(name, 2) for name in names]
    found = settings(make_groups(config_of(layer_decay=0.5), facts, lambda name: layer_of(name, 2), 2))
    residual = {name: multiplier for name, (multiplier, _) in found.items() if ".residual." in name}
    assert len(residual) > 10
    assert set(residual.values()) == {1.0}
    assert found["backbone.blocks.0.norm1.weight"][0] == 0.25


def test_later_rules_win_key_by_key() -> None:
    rules = [
        {"match": "blocks", "lr_multiplier": 0.5, "weight_decay": 0.2},
        {"match": r"blocks\.1\.", "lr_multiplier": 0.25},
        {"match": "bias$", "weight_decay": 0.0},
    ]
    found = settings(groups_of(param_groups=rules))
    assert found == {
        "backbone.vit.pos_embed": (1.0, 0.05),
        "backbone.vit.blocks.0.norm1.weight": (0.5, 0.2),
        "backbone.vit.blocks.0.attn.qkv.weight": (0.5, 0.2),
        "backbone.vit.blocks.1.attn.qkv.weight": (0.25, 0.2),
        "backbone.vit.blocks.1.attn.qkv.bias": (0.25, 0.0),
        "head.classifier.weight": (1.0, 0.05),
    }
    turned = settings(groups_of(param_groups=rules[::-1]))
    assert turned["backbone.vit.blocks.1.attn.qkv.bias"] == (0.5, 0.2)


def test_a_rule_wins_over_layer_decay() -> None:
    found = settings(groups_of(layer_decay=0.7, param_groups=[{"match": "pos_embed", "lr_multiplier": 2.0}]))
    assert found["backbone.vit.pos_embed"] == (2.0, 0.05)
    assert found["backbone.vit.blocks.0.norm1.weight"][0] == pytest.approx(0.49)


def test_rules_freeze_and_thaw_in_order() -> None:
    rules = [{"match": "^backbone", "frozen": True}, {"match": "norm", "frozen": False}, {"match": "qkv"}]
    assert frozen_names(config_of(param_groups=rules), NAMES) == {NAMES[0], NAMES[2], NAMES[3], NAMES[4]}
    assert frozen_names(config_of(param_groups=rules[::-1]), NAMES) == set(NAMES[:5])
    assert frozen_names(config_of(), NAMES) == set()


def test_rules_that_match_nothing_are_reported() -> None:
    rules = [{"match": "blocks"}, {"match": "bakcbone"}, {"match": r"blocks\.7\."}]
    with pytest.raises(ConfigError, match="'bakcbone' matches no parameter"):
        check_rules(config_of(param_groups=rules), NAMES)
    check_rules(config_of(param_groups=rules[:1]), NAMES)


names = st.lists(
    st.tuples(st.sampled_from(["backbone.vit.", "head.", "adapter."]), st.text("ab.01", max_size=6), st.integers(0, 4)),
    unique_by=lambda part: part[:2],
    max_size=30,
)
rules = st.lists(
    st.fixed_dictionaries(
        {"match": st.sampled_from(["a", "b", r"\.", "^head", "0$", ""])},
        optional={
            "lr_multiplier": st.sampled_from([0.0, 0.1, 1.0, 2.0]),
            "weight_decay": st.sampled_from([0.0, 0.05, 0.3]),
        },
    ),
    max_size=5,
)


@given(names, rules, st.none() | st.floats(0.1, 1.0))
def test_every_parameter_is_in_exactly_one_group(
    parts: list[tuple[str, str, int]], changes: list[dict[str, Any]], layer_decay: float | None
) -> None:
    facts = [ParameterFacts(prefix + rest, dimensions) for prefix, rest, dimensions in parts]
    config = config_of(param_groups=changes, layer_decay=layer_decay)
    groups = make_groups(config, facts, lambda name: layer_of(name, 2), 2)
    members = [name for group in groups for name in group.names]
    assert sorted(members) == sorted(fact.name for fact in facts)
    pairs = [(group.lr_multiplier, group.weight_decay) for group in groups]
    assert len(set(pairs)) == len(pairs)
    order = {fact.name: place for place, fact in enumerate(facts)}
    firsts = [order[group.names[0]] for group in groups]
    assert firsts == sorted(firsts)
    assert all(list(group.names) == sorted(group.names, key=order.__getitem__) for group in groups)
