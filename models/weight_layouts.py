"""Mapping of the names and tensors of published checkpoints to ours.

Everything is driven by the names that are wanted: :func:`find` looks for one of ours under every spelling that the
published files use (queries, keys and values fused or split, layer scales, the FFN with or without ``mlp.``, tables
shared by all blocks), in a :class:`View` of the file, which knows the prefix and the renames of the part to be loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitgraft.models.transformers_names import official_name


@dataclass(frozen=True)
class Layout:
    """Mapping from official weight files to a class's tensors: pairs of a regular expression and a text.

    ``renames``: (expression, replacement), ``re.sub`` on every name of the file, in this order. ``ignored``:
    (expression, reason), names of the file, after the renames, that are known and not wanted. ``fresh``: (expression,
    reason), names of *ours* that a file may lack, all that match or none; they keep their initial value. Expressions
    of ``ignored`` and ``fresh`` match a name from its beginning (``re.match``).
    """

    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    fresh: tuple[tuple[str, str], ...] = ()


IGNORED: tuple[tuple[str, str], ...] = (
    (r".*relative_position_index$", "rebuilt from the size of the window"),
    (r"(.*\.)?(rope\w*\.)?freqs_(cos|sin)$", "rotary tables are computed anew"),
    (r".*num_batches_tracked$", "a counter that nothing reads"),
    (r".*\.k(_proj\.|_)bias$", "adds one number to all logits of a query, which the softmax takes away again"),
    (r"(mask_token$|lm_head\.|encoder_to_decoder\.|decoder(_\w+)?(\.|$))", "only masked pre-training uses it"),
    (r"((cls_)?head(_dist)?|fc_cls|pre_logits)\.", "classifies the data of its training"),
    (
        r"(neck|rpn_head|roi_heads?|bbox_head|proposal_generator|decode_head|auxiliary_head)\.",
        "neck and head of the original; the recipe says which to build",
    ),
    (r"(fc_)?norm\.(weight|bias)$", "the final norm, which this trunk does without"),
    (r"cls_token$", "this trunk has no class token"),
    (r"dist_token$", "this trunk has no distillation token"),
    (r"(reg_token|register_tokens|storage_tokens)$", "this trunk has no registers"),
    (r"pooler\.|classifier\.|visual_projection\.", "pools and classifies the data of its training"),
    (r"(text_model|text_projection|logit_(scale|bias)|token_embedding|transformer)(\.|$)", "reads text"),
    (r"(prompt_encoder|mask_decoder)\.", "segments what it is prompted for"),
    (r"embeddings\.position_ids$", "an index that is computed"),
)
"""Names of a file without wrappers, beside those of a part's own layout, that are known and may be left over."""

GRAFTED = re.compile(r"\.(adaptmlp|lora\w*|prompts?)\.|(^|\.)(embeddings|prompts?)\.\d+$")
"""Names of grafts (AdaptMLP, LoRA, prompts) in files of tuned models."""

_COMPILED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing add to names."""
_RENAMES = ((r"^embeddings\.(\d+)$", r"blocks.\1.prompts.tokens"),)  # deep prompts, as AdaptFormer's code names them
_WRAPPERS = ("module.", "model.", "backbone.", "bottom_up.", "net.", "encoder.", "trunk.", "vit.", "adapter.", "neck.")
_ALIASES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(r"(^|(?<=\.))" + pattern), spellings)
    for pattern, spellings in (
        (r"(?:gamma_?([12])|ls([12])\.gamma)$", (r"gamma_\2\3", r"gamma\2\3", r"ls\2\3.gamma")),
        (
            r"(?:mlp\.)?fc1\.(weight|bias)$",
            (r"mlp.fc1.\2", r"fc1.\2", r"mlp.layers.0.0.\2", r"mlp.lin1.\2", r"mlp.up_proj.\2"),
        ),
        (r"mlp\.fc1_x\.(weight|bias)$", (r"mlp.up_proj.\2",)),
        (r"mlp\.fc1_g\.(weight|bias)$", (r"mlp.gate_proj.\2",)),
        (r"(?:mlp\.)?fc2\.(weight|bias)$", (r"mlp.fc2.\2", r"fc2.\2", r"mlp.layers.1.\2", r"mlp.lin2.\2")),
        (r"patch_embed\.proj(?:ection)?\.(weight|bias)$", (r"patch_embed.proj.\2", r"patch_embed.projection.\2")),
    )
)
_GAMMA = _ALIASES[0][0]
_PREFIX_PARTS = 5
_SPLIT = re.compile(r"^(?P<stem>(?:.*\.)?)(?P<letter>[qkv])(?:_proj\.(?P<kind>weight|bias)|_bias)$")
_FUSED = re.compile(r"^(?P<stem>(?:.*\.)?)(?:qkv\.|in_proj[._])(?P<kind>weight|bias)$")
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


class View(NamedTuple):
    """A file as one part reads it: its tensors by name without the prefix and renamed, and the names in the file."""

    tensors: dict[str, Tensor]
    originals: dict[str, str]


class Found(NamedTuple):
    """Value for one of our tensors, and the names (in the view) it comes from."""

    value: Tensor
    sources: tuple[str, ...]


def view_of(state: Mapping[str, Tensor], prefix: str, renames: Iterable[tuple[str, str]]) -> View:
    """Return the tensors of ``state`` under ``prefix``, without it and renamed."""
    originals = {}
    for name in state:
        if name.startswith(prefix):
            originals[_renamed(name.removeprefix(prefix), renames)] = name
    return View({new: _in_shape(new, state[name]) for new, name in originals.items()}, originals)


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    name = official_name(_COMPILED.sub("", name))
    for pattern, replacement in (*_RENAMES, *renames):
        name = re.sub(pattern, replacement, name)
    return name


def _in_shape(name: str, value: Tensor) -> Tensor:
    """Reshape class tokens (C,) and positions (N, C) of CLIP, and positions (1, h, w, C) of SAM, to the usual
    shapes."""
    last = name.rpartition(".")[2]
    if last == "pos_embed" and value.ndim == 4:
        return value.flatten(1, 2)
    if (last == "cls_token" and value.ndim == 1) or (last == "pos_embed" and value.ndim == 2):
        return value.reshape(1, -1, value.shape[-1])
    return value


def prefixes(names: Iterable[str]) -> list[str]:
    """Return every prefix in ``names`` made of the common wrappers, the shortest first; the empty one is among them."""
    found = {""}
    for name in names:
        prefix = ""
        while (wrapper := next((w for w in _WRAPPERS if name.startswith(w, len(prefix))), None)) is not None:
            prefix += wrapper
            found.add(prefix)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def likely_prefixes(
    names: Iterable[str], targets: Iterable[str], renames: Iterable[tuple[str, str]], limit: int = 6
) -> list[str]:
    """Return the prefixes under which the most names are those of ``targets``; teachers before students.

    For files whose prefixes are not made of the common wrappers. A prefix has at least a quarter of the targets.
    """
    targets = list(targets)
    wanted = {spelling for target in targets for spelling in _spellings(target)}
    votes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for cut in range(1, min(len(parts), _PREFIX_PARTS + 1)):
            if _renamed(".".join(parts[cut:]), renames) in wanted:
                votes[".".join(parts[:cut]) + "."] += 1
    enough = [prefix for prefix, count in votes.items() if count >= max(1, len(targets) // 4)]
    return sorted(enough, key=lambda prefix: (-votes[prefix], "student" in prefix, len(prefix), prefix))[:limit]


def without_wrappers(name: str) -> str:
    """Return ``name`` without the common wrappers at its beginning."""
    return name.removeprefix(prefixes([name])[-1])


def find(name: str, tensors: Mapping[str, Tensor]) -> Found | None:
    """Return the value in ``tensors`` for ``name``, under any known spelling; ``None``: absent.

    A layer scale is 1 where no block has one, and the bias of the keys 0 where only queries and values have one.
    """
    steps: tuple[Callable[[str, Mapping[str, Tensor]], Found | None], ...] = (
        _spelt,
        _fused,
        _split,
        _shared,
        _unscaled,
        _registers,
    )
    return next((found for step in steps if (found := step(name, tensors)) is not None), None)


def has_layer_scales(names: Iterable[str]) -> bool:
    """Tell whether blocks have layer scales, under any spelling."""
    return any(_GAMMA.search(name) for name in names)


def reason_for(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """Return the reason of the first rule (expression, reason) that matches ``name`` from its beginning."""
    return next((reason for pattern, reason in rules if re.match(pattern, name)), None)


def _spellings(name: str) -> Iterator[str]:
    yield name
    for pattern, spellings in _ALIASES:
        if pattern.search(name):
            yield from (pattern.sub(spelling, name) for spelling in spellings)


def _spelt(name: str, tensors: Mapping[str, Tensor]) -> Found | None:
    return next((Found(tensors[n], (n,)) for n in _spellings(name) if n in tensors), None)


def _third(stem: str, letter: str, kind: str, tensors: Mapping[str, Tensor]) -> Found | None:
    """Return weight or bias of queries, keys or values (``letter``) alone."""
    spellings = [f"{stem}{letter}_proj.{kind}", *([f"{stem}{letter}_bias"] if kind == "bias" else [])]
    for name in spellings:
        if name in tensors:
            return Found(tensors[name], (name,))
    for name in (f"{stem}qkv.{kind}", f"{stem}in_proj.{kind}", f"{stem}in_proj_{kind}"):
        if name in tensors and len(tensors[name]) % 3 == 0:
            return Found(tensors[name].chunk(3)["qkv".index(letter)], (name,))
    if (letter, kind) == ("k", "bias"):
        queries, values = (tensors.get(f"{stem}{other}_bias") for other in "qv")
        if queries is not None and values is not None:
            return Found(torch.zeros_like(queries), ())
    return None


def _fused(name: str, tensors: Mapping[str, Tensor]) -> Found | None:
    match = _FUSED.match(name)
    if match is None:
        return None
    thirds = [_third(match["stem"], letter, match["kind"], tensors) for letter in "qkv"]
    found = [third for third in thirds if third is not None]
    if len(found) < 3:
        return None
    return Found(torch.cat([third.value for third in found]), tuple(n for third in found for n in third.sources))


def _split(name: str, tensors: Mapping[str, Tensor]) -> Found | None:
    match = _SPLIT.match(name)
    return None if match is None else _third(match["stem"], match["letter"], match["kind"] or "bias", tensors)


def _shared(name: str, tensors: Mapping[str, Tensor]) -> Found | None:
    if not name.endswith(".attn.relative_position_bias_table"):
        return None
    return next((Found(tensors[n], (n,)) for n in tensors if n.endswith(_SHARED_TABLE)), None)


def _unscaled(name: str, tensors: Mapping[str, Tensor]) -> Found | None:
    if _GAMMA.search(name) is None or has_layer_scales(tensors):
        return None
    return Found(torch.ones(1), ())


def _registers(name: str, tensors: Mapping[str, Tensor]) -> Found | None:
    """Find registers under DINOv3's names; those of DINOv2 come with learned positions, which timm's converter
    handles."""
    stem, _, last = name.rpartition("reg_token")
    if last or any(other.endswith("pos_embed") for other in tensors):
        return None
    spelt = (f"{stem}storage_tokens", f"{stem}register_tokens")
    return next((Found(tensors[n], (n,)) for n in spelt if n in tensors), None)
