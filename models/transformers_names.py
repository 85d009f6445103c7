"""Renaming of Hugging Face transformers' vision transformers to the tensor names of the original releases.

One table for ViT, DeiT, MAE, DINOv2 and DINOv3, CLIP and SigLIP, VideoMAE, BEiT, Data2Vec, I-JEPA and MSN: the names of
their files differ little from each other, and what they are renamed to is what timm's and the authors' files say.
"""

from __future__ import annotations

import re

_BEGINNINGS = ("embeddings.", "encoder.", "decoder.", "layer", "post_layernorm.", "pre_lay")
_BLOCK = re.compile(r"(decoder\.)?(?:(?:decoder_)?encoder\.layers?|decoder_layers|layer)\.(\d+)\.(.+)")
_INSIDE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"attention\.attention\.(?:(q)uery|(k)ey|(v)alue)\.", r"attn.\1\2\3_proj."),
        (r"attention\.attention\.([qv]_bias)$", r"attn.\1"),
        (r"attention\.attention\.relative_position_bias\.(relative_position_bias_table)$", r"attn.\1"),
        (r"attention\.output\.dense\.", "attn.proj."),
        (r"(?:attention|self_attn)\.([qkv]_proj)\.", r"attn.\1."),
        (r"(?:attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
        (r"intermediate\.dense\.", "mlp.fc1."),
        (r"output\.dense\.", "mlp.fc2."),
        (r"mlp\.weights_in\.", "mlp.w12."),
        (r"mlp\.weights_out\.", "mlp.w3."),
        (r"mlp\.down_proj\.", "mlp.fc2."),
        (r"layernorm_before\.|layer_norm1\.", "norm1."),
        (r"layernorm_after\.|layer_norm2\.", "norm2."),
        (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
        (r"lambda_([12])$", r"gamma_\1"),
    )
)
_OUTSIDE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
        (r"embeddings\.class_embedding$", "cls_token"),
        (r"embeddings\.distillation_token$", "dist_token"),
        (r"embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
        (r"embeddings\.patch_embeddings?\.(?:projection\.)?(weight|bias)$", r"patch_embed.proj.\1"),
        (r"encoder\.relative_position_bias\.", "rel_pos_bias."),
        (r"(?:post_)?layernorm\.(weight|bias)$", r"norm.\1"),
        (r"pre_layr?norm\.(weight|bias)$", r"norm_pre.\1"),
        (r"decoder\.(decoder_(?:embed|pos_embed|norm|pred)\b|mask_token$)", r"\1"),
    )
)


def official_name(name: str) -> str:
    """Return the original releases' name of transformers' tensor ``name`` (without prefixes such as ``vit.``).

    Any other name is returned as it is.
    """
    if not name.startswith(_BEGINNINGS):
        return name
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _first(name, _OUTSIDE)
    decoder, index, inside = block.groups()
    return f"{'decoder_' if decoder else ''}blocks.{index}.{_first(inside, _INSIDE)}"


def _first(name: str, renames: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    """Return ``name`` renamed by the first expression that matches it from its beginning."""
    for pattern, replacement in renames:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name
