"""Layer of each parameter of a model, for layer-wise learning-rate decay."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^backbone\.(?:.*\.)?blocks\.(\d+)\.")
_STEM = re.compile(
    r"^backbone\.(?:.*\.)?(patch_embed\.|visual_embed\.|norm_pre\."
    r"|(pos_embed|cls_token|reg_token|dist_token|mask_token)$)"
)
_UNTRAINED = re.compile(r"\.(adaptmlp|lora|prompts|residual)\.")


def layer_of(parameter_name: str, depth: int) -> int:
    """Return the layer of a model's parameter for layer-wise learning-rate decay (BEiT, arXiv 2106.08254).

    0: what comes before the trunk's blocks (patch embedding, positions, prefix tokens). i + 1: block i. depth + 1:
    everything else, with it grafts and residual convolutions inside the blocks, because they start untrained (ViTDet's
    official code excludes the latter by name).
    """
    if _UNTRAINED.search(parameter_name):
        return depth + 1
    if (block := _BLOCK.match(parameter_name)) is not None:
        return int(block.group(1)) + 1
    return 0 if _STEM.match(parameter_name) else depth + 1
