"""The DeepSpeed dictionary, rendered from the recipe. Pure."""

from __future__ import annotations

from typing import Any

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema import Recipe

# What vitgraft decides: a user's dictionary may repeat it but not contradict it.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_force_ds_cpu_optimizer",
    "bf16.enabled",
    "bfloat16.enabled",  # an older name that DeepSpeed still reads
    "fp16.enabled",
    "amp.enabled",
    "torch_autocast.enabled",
    "torch_autocast.dtype",
    "optimizer",
    "scheduler",
)
# Apart from null, which would wipe out what vitgraft renders.
_ABSENT = object()


def render(recipe: Recipe, world: int) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize`` at this world size.

    Raises:
        ConfigError: ``train.deepspeed`` contradicts the recipe.
    """
    train = recipe.train
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.global_batch // (train.accumulation * world),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip_grad,
        "zero_optimization": {"stage": train.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if train.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # torch's own optimizer updates on the CPU: DeepSpeed's CPU Adam wants a compiler on every host.
        config["zero_force_ds_cpu_optimizer"] = False
    if train.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif train.precision == "bf16_params":
        config["bf16"] = {"enabled": True}
    ours = {**config, "train_batch_size": train.global_batch}
    for key in _OWNED:
        _refuse_contradiction(key, train.deepspeed, ours)
    return _merge(config, train.deepspeed)


def _refuse_contradiction(key: str, user: dict[str, Any], own: dict[str, Any]) -> None:
    *parents, _ = key.split(".")
    section = _look_up(user, parents)
    if section is not _ABSENT and not isinstance(section, dict):
        raise ConfigError(f"train.deepspeed.{'.'.join(parents)}: expected a section, found {section!r}; see DeepSpeed")
    theirs, ours = _look_up(user, key.split(".")), _look_up(own, key.split("."))
    if theirs is _ABSENT or theirs == ours or (theirs is False and ours is _ABSENT):
        return
    says = "vitgraft sets this itself" if ours is _ABSENT else f"the recipe gives {ours!r}"
    raise ConfigError(f"train.deepspeed.{key}: {theirs!r}, but {says}; remove the key and use the recipe's own")


def _look_up(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return _ABSENT
        tree = tree[key]
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
