"""The DeepSpeed dictionary: what is rendered, what a user may add, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny_recipe

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import validate_recipe
from vitgraft.trainer.deepspeed_config import render


def rendered(world: int = 2, user: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    settings = {f"train__{key}": value for key, value in train.items()}
    tree = tiny_recipe("detection", "train", train__deepspeed=user or {}, **settings)
    return render(validate_recipe(tree, "recipe"), world)


@pytest.mark.parametrize(("accumulation", "world", "micro"), [(1, 1, 24), (1, 3, 8), (2, 3, 4), (4, 2, 3), (4, 6, 1)])
def test_the_batch_is_cut_by_accumulation_and_then_over_the_ranks(accumulation: int, world: int, micro: int) -> None:
    config = rendered(world, global_batch=24, accumulation=accumulation)
    assert config["train_micro_batch_size_per_gpu"] == micro
    assert config["gradient_accumulation_steps"] == accumulation
    assert micro * accumulation * world == 24


def test_stage_clipping_and_precision() -> None:
    plain = rendered(zero_stage=3, clip_grad=0.1)
    assert plain["zero_optimization"]["stage"] == 3
    assert plain["gradient_clipping"] == 0.1
    assert not {"bf16", "fp16", "torch_autocast", "optimizer", "scheduler"} & plain.keys()
    autocast = rendered(precision="bf16")
    assert autocast["torch_autocast"]["enabled"] is True
    assert autocast["torch_autocast"]["dtype"] == "bfloat16"
    assert "bf16" not in autocast
    engine = rendered(precision="bf16_params")
    assert engine["bf16"] == {"enabled": True}
    assert "torch_autocast" not in engine


def test_offload() -> None:
    """The states go to host memory, under torch's own optimizer; nothing of it without the key."""
    for stage in (1, 2, 3):
        config = rendered(
            zero_stage=stage, offload_optimizer=True, user={"zero_optimization": {"contiguous_gradients": True}}
        )
        assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
        assert config["zero_optimization"]["contiguous_gradients"] is True
        assert config["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in rendered()["zero_optimization"]
    assert "zero_force_ds_cpu_optimizer" not in rendered()
    with pytest.raises(ConfigError, match="offload_optimizer needs zero_stage 1, 2 or 3"):
        rendered(zero_stage=0, offload_optimizer=True)
    tuned = rendered(offload_optimizer=True, user={"zero_optimization": {"offload_optimizer": {"pin_memory": False}}})
    assert tuned["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_offload_is_where_a_run_computes_and_not_what() -> None:
    plain, offloaded = (
        validate_recipe(tiny_recipe("semantic", "data", train__offload_optimizer=value), "recipe")
        for value in (False, True)
    )
    assert plain.identity_hash() == offloaded.identity_hash()


def test_a_users_own_keys_are_laid_over() -> None:
    user = {
        "zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True},
        "comms_logger": {"enabled": True},
        "steps_per_print": 7,
    }
    config = rendered(user=user)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert config["comms_logger"] == {"enabled": True}
    assert config["steps_per_print"] == 7
    untouched = rendered()
    assert {key: config[key] for key in untouched if key not in user} == {
        key: untouched[key] for key in untouched if key not in user
    }


CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("train_batch_size", {"train_batch_size": 8}),
    ("zero_optimization.offload_optimizer.device", {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}),
    ("zero_force_ds_cpu_optimizer", {"zero_force_ds_cpu_optimizer": True}),
    ("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": 4}),
    ("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": None}),
    ("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": "auto"}),
    ("gradient_accumulation_steps", {"gradient_accumulation_steps": 2}),
    ("gradient_clipping", {"gradient_clipping": 0.5}),
    ("gradient_clipping", {"gradient_clipping": None}),
    ("zero_optimization.stage", {"zero_optimization": {"stage": 1}}),
    ("zero_optimization.stage", {"zero_optimization": {"stage": None}}),
    ("zero_optimization", {"zero_optimization": None}),
    ("zero_optimization", {"zero_optimization": True}),
    ("bf16.enabled", {"bf16": {"enabled": True}}),
    ("bf16", {"bf16": True}),
    ("bfloat16.enabled", {"bfloat16": {"enabled": True}}),
    ("fp16.enabled", {"fp16": {"enabled": "auto"}}),
    ("amp.enabled", {"amp": {"enabled": True}}),
    ("torch_autocast.enabled", {"torch_autocast": {"enabled": True}}),
    ("torch_autocast.dtype", {"torch_autocast": {"dtype": "float16"}}),
    ("optimizer", {"optimizer": {"type": "Adam"}}),
    ("scheduler", {"scheduler": {"type": "WarmupLR"}}),
]


@pytest.mark.parametrize(("key", "user"), CONTRADICTIONS, ids=[str(user) for _, user in CONTRADICTIONS])
def test_a_contradiction_is_refused_by_name(key: str, user: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(user=user)
    assert caught.value.exit_code == 2
    assert f"train.deepspeed.{key}:" in str(caught.value)


def test_turning_off_what_the_recipe_turns_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bf16\.enabled: False, but the recipe gives True"):
        rendered(user={"bf16": {"enabled": False}}, precision="bf16_params")
    with pytest.raises(ConfigError, match=r"torch_autocast\.dtype: 'float16', but the recipe gives 'bfloat16'"):
        rendered(user={"torch_autocast": {"dtype": "float16"}}, precision="bf16")


def test_repeating_what_the_recipe_says_is_allowed() -> None:
    user = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    config = rendered(user=user)
    assert {key: config[key] for key in user if key != "zero_optimization"} == {
        key: value for key, value in user.items() if key != "zero_optimization"
    }
    assert config["zero_optimization"]["stage"] == 2
    assert rendered(user={"bf16": {"enabled": True}}, precision="bf16_params")["bf16"] == {"enabled": True}


def test_the_recipes_own_dictionary_is_not_changed() -> None:
    user = {"zero_optimization": {"reduce_bucket_size": 5}}
    recipe = validate_recipe(tiny_recipe("detection", "train", train__deepspeed=user), "recipe")
    render(recipe, 1)["zero_optimization"]["stage"] = 0
    assert recipe.train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}
    assert render(recipe, 1)["zero_optimization"]["stage"] == 2
