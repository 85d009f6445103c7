"""Loading published weights: read without running any code, matched by name, resized, checked and reported.

A file is .safetensors, .pth/.pt/.bin of tensors, or .pkl of arrays, local or on the Hugging Face hub. Every trunk,
adapter and neck says in its ``layout`` how the official names become its own; the spellings that many files share
(:mod:`vitgraft.models.weight_layouts`) need no saying. For a trunk from timm, timm's own converter is asked
where that does not suffice (CLIP, OpenCLIP, DINOv2 with registers and others).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models import eva
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError
from vitgraft.models.backbones.relative_position import resize_rel_pos_linear
from vitgraft.models.grafting import Graft
from vitgraft.models.resizing import (
    PREFIXES,
    resize_patch_kernel,
    resize_positions,
    resize_square_table,
    square_grid,
    table_layout,
)
from vitgraft.models.weight_files import canvas_of, read_tensors
from vitgraft.models.weight_layouts import (
    GRAFTED,
    IGNORED,
    Found,
    Layout,
    View,
    find,
    has_layer_scales,
    likely_prefixes,
    prefixes,
    reason_for,
    view_of,
    without_wrappers,
)
from vitgraft.models.weight_report import LoadReport, some

log = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.*\b(?:blocks|layers|interactions|extra_extractors))\.(\d+)\.")

_BEFORE_BLOCKS = re.compile(r"(vit\.)?(norm_pre|ln_pre)\.weight")
_POOLED_NORM = re.compile(r"(.*\.)?fc_norm\.weight")
_FINAL_NORM = re.compile(r"(vit\.)?norm\.(weight|bias)")


@dataclass
class Conversion:
    """A file's tensors under our names and in our shapes, by part, and the report of how they came about."""

    values: dict[str, dict[str, Tensor]]
    report: LoadReport


def load_weights(
    parts: Mapping[str, nn.Module] | nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    strict: bool = False,
    canvas: tuple[int, int] | None = None,
) -> LoadReport:
    """Load ``state``, the tensors of a file, into a module or into the parts of a model; the report is logged once.

    A module alone and the part called ``backbone`` must be found whole, but for what its layout calls fresh. Of the
    other parts, and of what is grafted on a trunk, either all is found or nothing, and then it stays as initialised.
    With ``strict`` every part must be found, and every tensor of the file be taken or be ignored with a reason.
    ``where``: the recipe's key and the file, for errors and the log. ``canvas``: (height, width) in pixels for which
    its tables of positions are laid out, if that is known; published ones are square.

    Raises ``CheckpointError``, naming key and expectation, for what is missing, has another shape, belongs to more
    blocks than there are, or is the statistics of a BatchNorm where there is another norm. Nothing is loaded then.
    """
    conversion = convert_weights(parts, state, where=where, strict=strict, canvas=canvas)
    modules = {"": parts} if isinstance(parts, nn.Module) else parts
    with torch.no_grad():
        for part, values in conversion.values.items():
            targets = modules[part].state_dict()
            for name, value in values.items():
                targets[name].copy_(value)
    log.info("weights of %s:\n%s", where, conversion.report)
    return conversion.report


def load_trunk(trunk: nn.Module, file: str | Path, *, where: str = "model.backbone.weights") -> LoadReport:
    """Load every tensor of a trunk, or of a timm VisionTransformer without head, from a file or a name on the hub.

    Raises ``CheckpointError`` as :func:`read_tensors` and :func:`load_weights` do.
    """
    tensors = read_tensors(file, where=where)
    return load_weights(trunk, tensors, where=f"{where}: {file}", canvas=canvas_of(file, where))


def convert_weights(
    parts: Mapping[str, nn.Module] | nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    strict: bool = False,
    canvas: tuple[int, int] | None = None,
) -> Conversion:
    """Return the tensors that :func:`load_weights` would load; differentiable in the tensors of ``state``."""
    modules = {"": parts} if isinstance(parts, nn.Module) else dict(parts)
    matches = [_match(name, module, state) for name, module in modules.items() if module is not None]
    report = LoadReport()
    for match in matches:
        match.canvas = canvas
        _check_found(match, where, report, strict)
    _check_left_over(matches, state, where, report, strict)
    values = {match.part: {name: _fitted(match, name, where, report) for name in match.found} for match in matches}
    return Conversion(values, report)


@dataclass
class _Match:
    """Match of a view of the file with one part of the model."""

    part: str
    module: nn.Module
    layout: Layout
    targets: dict[str, Tensor]
    view: View
    found: dict[str, Found]
    prefix: str
    timm: set[str] = field(default_factory=set)
    """Names in the file that timm's converter made something else of."""
    rivals: list[str] = field(default_factory=list)
    """Other prefixes under which as much is found."""
    canvas: tuple[int, int] | None = None
    """(height, width) for which the file's tables are laid out, if that is known."""

    @property
    def missing(self) -> list[str]:
        """Our names without anything in the file; old files have no counters of batches, and nothing reads them."""
        return [name for name in self.targets if name not in self.found and not name.endswith("num_batches_tracked")]

    @property
    def taken(self) -> set[str]:
        """The names in the file that something is made of."""
        return self.timm | {self.view.originals[n] for found in self.found.values() for n in found.sources}

    @property
    def what(self) -> str:
        """The part, in a message."""
        return "the trunk" if self.part in ("", "backbone") else f"the {self.part}"

    def label(self, name: str) -> str:
        return f"{self.part}.{name}" if self.part else name


def _match(part: str, module: nn.Module, state: Mapping[str, Tensor]) -> _Match:
    """Match a part under the prefix with the most of its tensors, with timm's converter where names do not suffice."""
    layout: Layout = getattr(module, "layout", Layout())
    targets = module.state_dict()

    def under(prefix: str) -> _Match:
        view = view_of(state, prefix, layout.renames)
        found = {name: hit for name in targets if (hit := find(name, view.tensors)) is not None}
        return _Match(part, module, layout, targets, view, found, prefix)

    best = _best(under(prefix) for prefix in prefixes(state))
    if best.missing:
        best = _best([best, *map(under, likely_prefixes(state, targets, layout.renames))])
    vit = module if isinstance(module, VisionTransformer) else getattr(module, "vit", None)
    if best.missing and isinstance(vit, VisionTransformer | Eva):
        common = [p for p in prefixes(state) if all(name.startswith(p) for name in state)][-1]
        by_timm = [_by_timm(best, vit, state, prefix) for prefix in dict.fromkeys((best.prefix, common))]
        best = _best([best, *filter(None, by_timm)])
    return best


def _best(matches: Iterable[_Match]) -> _Match:
    """Return the match with the most tensors; prefixes with equally many are noted in it."""
    best, *others = sorted(matches, key=lambda match: -len(match.found))
    best.rivals = [o.prefix for o in others if o.found and len(o.found) == len(best.found) and o.taken != best.taken]
    return best


def _by_timm(plain: _Match, vit: VisionTransformer | Eva, state: Mapping[str, Tensor], prefix: str) -> _Match | None:
    """Match the names under ``prefix`` as converted by timm; ``None``: timm's converter fails."""
    bare = view_of(state, prefix, ())
    try:
        converted = (
            eva.checkpoint_filter_fn(dict(bare.tensors), vit)
            if isinstance(vit, Eva)
            else checkpoint_filter_fn(dict(bare.tensors), vit, adapt_layer_scale=True)
        )
    except Exception:  # a foreign file meets timm's converter here; what is missing is told by the caller
        return None
    view = view_of(converted, "", plain.layout.renames)
    found = {name: hit for name in plain.targets if (hit := find(name, view.tensors)) is not None}
    originals = {new: bare.originals.get(name, name) for new, name in view.originals.items()}
    timm = {original for name, original in bare.originals.items() if name not in converted}
    return _Match(
        plain.part, plain.module, plain.layout, plain.targets, View(view.tensors, originals), found, prefix, timm
    )


def _check_found(match: _Match, where: str, report: LoadReport, strict: bool) -> None:
    """Raises unless everything is found that must be; what may be missing goes into the report."""
    grafts = {f"{path}.": module.tuning for path, module in match.module.named_modules() if isinstance(module, Graft)}
    groups: dict[str, list[str]] = {}
    for name in match.targets:
        groups.setdefault(next((kind for path, kind in grafts.items() if name.startswith(path)), ""), []).append(name)
    absent = set(match.missing)
    for pattern, reason in match.layout.fresh:
        if not any(re.match(pattern, name) for name in match.found):
            fresh = [name for name in absent if re.match(pattern, name)]
            report.fresh.update({match.label(name): reason for name in sorted(fresh)})
            absent.difference_update(fresh)
    if any(map(_POOLED_NORM.fullmatch, match.view.tensors)):
        norm = sorted(name for name in absent if _FINAL_NORM.fullmatch(name))
        report.fresh.update({match.label(n): "the file norms the mean of its tokens instead (fc_norm)" for n in norm})
        absent.difference_update(norm)
    for kind, wanted in groups.items():
        names = [name for name in wanted if name in absent]
        if not names:
            continue
        if not strict and (kind or match.part not in ("", "backbone")) and not any(n in match.found for n in wanted):
            report.fresh[kind or match.part] = f"the file holds none of its {len(wanted)} tensors"
            continue
        what = f"the {kind}" if kind else match.what
        raise CheckpointError(
            f"{where} lacks {len(names)} of {what}'s {len(wanted)} tensors: {some(names)}; it "
            f"holds {some(sorted(match.view.originals.values()))}; name the weights of the same architecture"
        )
    if match.prefix and match.found:
        rivals = f", as much stands under {some(match.rivals)}: FILE#PREFIX chooses" if match.rivals else ""
        report.prefixes.append(f"{match.prefix} for {match.what}{rivals}")
    if match.targets:
        report.loaded[match.part] = sum(1 for found in match.found.values() if found.sources)


def _check_left_over(
    matches: list[_Match], state: Mapping[str, Tensor], where: str, report: LoadReport, strict: bool
) -> None:
    """Raises when a tensor that nothing takes tells that the file is another architecture's; reports the others."""
    taken = {name for match in matches for name in match.taken}
    for original in [name for name in state if name not in taken]:
        names = [(match, new) for match in matches for new, name in match.view.originals.items() if name == original]
        reasons = [reason_for(new, match.layout.ignored) for match, new in names]
        reasons += [reason_for(without_wrappers(original), match.layout.ignored) for match in matches]
        reasons += [reason_for(n, IGNORED) for _, new in names for n in (new, without_wrappers(new))]
        if original.endswith("bias") and not state[original].any():
            reasons.append("is zero, and adds nothing")
        if not strict and GRAFTED.search(original):
            reasons.append("grafted on a trunk; name the file in model.weights, and the graft, to load it too")
        reason = next(filter(None, [*reasons, reason_for(without_wrappers(original), IGNORED)]), None)
        if reason is not None:
            report.ignored[original] = reason
        else:
            report.unexpected.append(original)
            for match, new in names:
                _check_foreign(match, new, where)
    if strict and report.unexpected:
        raise CheckpointError(
            f"{where} holds {len(report.unexpected)} tensors that nothing here takes: {some(report.unexpected)}; "
            "name the weights of the same architecture"
        )


def _check_foreign(match: _Match, name: str, where: str) -> None:
    """Raises when ``name``, which is left over in a view, could not be left out without computing something else."""
    if not match.found or GRAFTED.search(name):
        return
    stem, _, last = name.rpartition(".")
    used = {n for found in match.found.values() for n in found.sources}
    if last in ("running_mean", "running_var") and f"{stem}.weight" in used:
        raise CheckpointError(
            f"{where}: {name} is the statistics of a BatchNorm, but {stem} is another norm here; "
            "choose norm: bn or syncbn, or other weights"
        )
    if _BEFORE_BLOCKS.fullmatch(name):
        raise CheckpointError(
            f"{where}: {match.view.originals[name]} norms the tokens before the first block, which {match.what} does "
            "not; name weights of the same architecture, or a timm trunk that has it, e.g. 'vit_base_patch16_clip_224'"
        )
    inside = _NUMBERED.match(name)
    numbers = {
        int(numbered[2])
        for ours in match.targets
        if inside is not None and (numbered := _NUMBERED.match(ours)) is not None and numbered[1] == inside[1]
    }
    if inside is None or not numbers:
        return
    if int(inside[2]) > max(numbers):
        more = sorted(
            file for n, file in match.view.originals.items() if n.startswith(f"{inside[1]}.") and n not in used
        )
        raise CheckpointError(
            f"{where} holds more than {match.what}'s {inside[1].rpartition('.')[2]}: {some(more)}; there are "
            f"{max(numbers) + 1}; name the weights of the same architecture"
        )
    raise CheckpointError(
        f"{where}: {match.view.originals[name]} has no place in {match.what}, which would compute something else "
        "without it; set the option that adds it, or name the weights of the same architecture"
    )


def _fitted(match: _Match, name: str, where: str, report: LoadReport) -> Tensor:
    """Return the value found for ``name``, in the target's dtype and shape.

    Raises:
        CheckpointError: another kind of dtype, a shape that cannot be resized, or numbers that are not finite.
    """
    target, (value, sources) = match.targets[name], match.found[name]
    if not sources:
        counts = "zero, as keys without a bias" if name.endswith("bias") else "one"
        report.fresh[match.label(name)] = f"absent in this kind of file, where it counts as {counts}"
        return value.expand_as(target)
    if value.is_floating_point() != target.is_floating_point():
        raise CheckpointError(f"{where}: {match.label(name)} is of type {value.dtype}, expected {target.dtype}")
    value = value.to(target.dtype)  # before it is resized: files of half precision would round what comes out
    if not value.isfinite().all():
        raise CheckpointError(
            f"{where}: {match.label(name)} holds numbers that are not finite; fetch the file again, or take a "
            "checkpoint from before its training diverged"
        )
    fitted: Tensor | None = value
    if name.endswith("pos_embed") and value.numel() and value.ndim == target.ndim == 3:
        fitted = _positions(match, name, value, where)
    elif value.shape != target.shape and value.numel():
        hook = getattr(match.module, "resize_loaded", None)
        fitted = None if hook is None else hook(name, value)
        fitted = _resized(match, name, value, target) if fitted is None else fitted
    if fitted is None or fitted.shape != target.shape:
        raise CheckpointError(
            f"{where}: {match.label(name)} has shape {tuple(value.shape)}, {match.what}'s is {tuple(target.shape)}; "
            "name the weights of the same architecture"
        )
    if fitted is not value:
        report.resized[match.label(name)] = f"{tuple(value.shape)} → {tuple(target.shape)}"
    return fitted


def _resized(match: _Match, name: str, value: Tensor, target: Tensor) -> Tensor | None:
    """Return ``value`` in the shape of ``target``, if it can be resized; otherwise ``None``."""
    last = name.rpartition(".")[2]
    if last in ("rel_pos_h", "rel_pos_w") and value.ndim == 2:
        return resize_rel_pos_linear(value, len(target))
    if last == "relative_position_bias_table" and value.ndim == 2:
        return resize_square_table(value, target)
    if name.endswith("patch_embed.proj.weight"):
        # Of the published files only DINOv2's name their layer scales so.
        dinov2 = any(n.endswith(".ls1.gamma") for n in match.view.tensors)
        return resize_patch_kernel(value, tuple(target.shape[2:]), "bilinear" if dinov2 else "bicubic")
    return None


def _grid(match: _Match, name: str) -> tuple[nn.Module, tuple[int, int] | None]:
    """Return the module that owns a table of positions, and the grid that the table is laid out for."""
    owner = match.module.get_submodule(name.rpartition(".")[0])
    rows = match.targets[name].shape[1]
    grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
    if grid is not None and grid[0] * grid[1] <= rows:
        return owner, (int(grid[0]), int(grid[1]))
    square = square_grid(rows)
    return owner, None if square is None else (square[1], square[1])


def _positions(match: _Match, name: str, value: Tensor, where: str) -> Tensor | None:
    """Return a file's positions (1, rows, C) resized to our grid; ``None`` where they do not fit.

    Raises ``CheckpointError`` for a table whose grid cannot be told from the file's class token and our grid.
    """
    target, (source, *_) = match.targets[name], match.found[name].sources
    owner, grid = _grid(match, name)
    if grid is None:
        return value
    before = target.shape[1] - grid[0] * grid[1]
    layout = _known_layout(match, source, value.shape[1], owner)
    tokens: tuple[int, ...] = PREFIXES
    if layout is None:
        own = match.view.originals[source].endswith("vit.pos_embed")  # of a model of ours, on the same canvas
        if value.shape == target.shape and (own or match.timm):
            return value
        tokens = _prefix_rows(match, source, owner)
        layout = table_layout(value.shape[1], tokens, grid)
    if layout is None:
        if tokens == PREFIXES:
            return None
        raise CheckpointError(
            f"{where}: {match.label(name)} has {value.shape[1]} rows, the class token's of the file among them: the "
            f"others are neither a square grid nor {match.what}'s of {grid[0]} × {grid[1]}; set data.image_size to the "
            "canvas of that training"
        )
    if layout == (before, grid):
        return value
    antialias = isinstance(owner, VisionTransformer) and not getattr(match.module, "by_sizes", False)
    return resize_positions(value, target, before, grid, layout, antialias=antialias)


def _known_layout(match: _Match, source: str, rows: int, owner: nn.Module) -> tuple[int, tuple[int, int]] | None:
    """Return (prefix rows, grid) of a file's table whose canvas is known; ``None`` where it is not laid out for a
    canvas."""
    if match.canvas is None or match.timm or not hasattr(getattr(owner, "patch_embed", None), "grid_size"):
        return None
    kernel = match.view.tensors.get(source.removesuffix("pos_embed") + "patch_embed.proj.weight")
    if kernel is None:
        return None
    height, width = (-(-side // size) for side, size in zip(match.canvas, kernel.shape[-2:], strict=True))
    return (rows - height * width, (height, width)) if 0 <= rows - height * width <= max(PREFIXES) else None


def _prefix_rows(match: _Match, source: str, owner: nn.Module) -> tuple[int, ...]:
    """Return the possible numbers of prefix rows in a file's ``pos_embed``, likeliest first, by the file's tokens."""
    stem = source.removesuffix("pos_embed")
    beside = {n.removeprefix(stem): v for n, v in match.view.tensors.items() if n.startswith(stem)}
    classes = sum(any(n in beside for n in names) for names in (("cls_token", "class_token"), ("dist_token",)))
    registers = next((beside[n].shape[-2] for n in ("reg_token", "register_tokens") if n in beside), 0)
    if not classes:
        return PREFIXES
    rows = (classes + registers, classes, 1)
    # Class tokens without a row: DeiT III's, and timm's of DINOv2 with registers, which all have layer scales.
    without = getattr(owner, "no_embed_class", False) or has_layer_scales(match.view.tensors)
    return tuple(dict.fromkeys((*rows, 0) if without else rows))


__all__ = [
    "Conversion",
    "Layout",
    "LoadReport",
    "convert_weights",
    "load_trunk",
    "load_weights",
    "read_tensors",
]
