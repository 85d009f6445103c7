"""The recipe: five typed axes (model.backbone, model.adapter, model.head, data, train) and what runs around them.

Imports neither torch nor deepspeed, so that a wrong recipe is refused before anything heavy starts.
"""

from vitgraft.configs.schema.data import DataConfig
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.configs.schema.recipe import EvaluateConfig, LaunchConfig, Recipe
from vitgraft.configs.schema.train import TrainConfig

__all__ = ["DataConfig", "EvaluateConfig", "LaunchConfig", "ModelConfig", "Recipe", "TrainConfig"]
