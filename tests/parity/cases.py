"""A case (arrays, and how the official model was built), a model built for it, and their comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from vitgraft.configs.schema.adapters import AdapterConfig
from vitgraft.configs.schema.backbones import BackboneConfig
from vitgraft.models import build, registry
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.weights import convert_weights, load_weights

OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
"""Relative, of the L2 norm of a gradient and of its difference."""
ZERO = 1e-6
"""Norms below are zeros but for rounding."""

assert build.REGISTERING  # importing it registers everything


class NotBuilt(Exception):
    """A kind of case for which there is no model here yet; the text says which."""


class Options:
    """The arguments of a constructor: each must be taken or expected, so that none is ignored by accident."""

    def __init__(self, arguments: Mapping[str, Any], what: str) -> None:
        self.left, self.what = dict(arguments), what

    def take(self, name: str, default: Any = None) -> Any:
        """The argument, or the official default."""
        return self.left.pop(name, default)

    def expect(self, **values: Any) -> None:
        """Arguments for which there is one value here; another one fails."""
        for name, value in values.items():
            found = self.left.pop(name, value)
            assert found == value, f"{self.what}: {name} = {found!r}, only {value!r} is translated"

    def drop(self, *names: str) -> None:
        """Arguments without influence on loaded weights in evaluation (dropout, initialisation, checkpointing)."""
        for name in names:
            self.left.pop(name, None)

    def done(self) -> None:
        assert not self.left, f"{self.what}: unknown arguments {self.left}; translate them in kinds.py"


@dataclass
class Case:
    """``state``: tensors by official name. ``inputs``, ``outputs``, ``grads``, ``extra``: the other arrays."""

    name: str
    meta: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    extra: dict[str, Tensor]

    def options(self, key: str) -> Options:
        """One of the dictionaries of arguments."""
        return Options(self.meta[key], f"{self.name}: {key}")


def read_case(file: Path) -> Case:
    """NAME.json and the NAME.npz beside it (read without pickles)."""
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in ("sd", "in", "out", "grad", "extra")}
    with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
        for name in arrays.files:
            group, _, rest = name.partition("/")
            if group in groups:
                groups[group][rest] = torch.from_numpy(np.array(arrays[name]))
    meta = json.loads(file.read_text())
    return Case(file.stem, meta, groups["sd"], groups["in"], groups["out"], groups["grad"], groups["extra"])


@dataclass
class Built:
    """What is compared with a case.

    ``parts``: the modules, as :func:`load_weights` takes them. ``forward``: inputs → outputs by the case's names; it
    may use only what is in ``parts``. ``inputs``: those with a gradient.
    """

    parts: dict[str, nn.Module]
    forward: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    inputs: tuple[str, ...] = ("x",)
    loss: Callable[[dict[str, Tensor]], Tensor] | None = None
    left_out: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Which part of a gradient is compared, where not all of it is defined."""


def build_trunk(section: dict[str, Any], side: int) -> Trunk:
    """A trunk from its section of a recipe, for a square canvas."""
    config: Any = TypeAdapter(BackboneConfig).validate_python(section)
    trunk: Trunk = registry.build("backbone", config, image_size=(side, side))
    return trunk


def build_adapter(section: dict[str, Any], trunk: Trunk) -> Adapter:
    """An adapter on a trunk, which then goes without the final norm if the adapter does not read it."""
    config: Any = TypeAdapter(AdapterConfig).validate_python(section)
    adapter: Adapter = registry.build("adapter", config, trunk=trunk)
    if not adapter.reads_final_norm:
        trunk.without_final_norm()
    return adapter


def graft(section: dict[str, Any], trunk: Trunk) -> None:
    """Graft on a trunk what a section of a recipe says."""
    config: Any = TypeAdapter(AdapterConfig).validate_python(section)
    registry.build("graft", config, trunk=trunk)


def named_loss(text: str, outputs: dict[str, Tensor]) -> Tensor:
    """The scalar that a case's ``loss`` describes: a mean of squares, or a sum of such means over a range of maps."""
    full = "full_" if "full-ratio" in text else ""
    if (several := re.search(r"([a-z])(\d)\.\.\1(\d)", text)) is not None:
        letter, first, last = several[1], int(several[2]), int(several[3])
        names = [f"{full}{letter}{index}" for index in range(first, last + 1)]
    elif (single := re.fullmatch(r"mean\((\w+)\*\*2\)", text)) is not None:
        names = [single[1]]
    else:
        raise AssertionError(f"unknown loss {text!r}")
    return torch.stack([outputs[name].square().mean() for name in names]).sum()


def compare(case: Case, built: Built) -> list[str]:
    """Everything that differs, one line each; empty where the two implementations agree."""
    for part in built.parts.values():
        part.eval()
    if built.parts:
        load_weights(built.parts, case.state, where=case.name, strict=True)
    inputs = {name: value.clone().requires_grad_(name in built.inputs) for name, value in case.inputs.items()}
    outputs = built.forward(inputs)
    wrong = [f"out/{name}: not computed" for name in case.outputs if name not in outputs]
    for name, expected in case.outputs.items():
        if name in outputs and not torch.allclose(
            outputs[name], expected, rtol=OUTPUT_TOLERANCE, atol=OUTPUT_TOLERANCE
        ):
            wrong.append(f"out/{name}: differs by up to {(outputs[name] - expected).abs().max():.2e}")
    loss = named_loss(case.meta["loss"], outputs) if built.loss is None else built.loss(outputs)
    known = case.meta.get("loss_value")
    if known is not None and abs(loss.item() - known) > OUTPUT_TOLERANCE * max(1.0, abs(known)):
        wrong.append(f"loss: {loss.item()}, expected {known}")
    loss.backward()
    found = {name: value.grad for name, value in inputs.items() if value.grad is not None}
    found.update(official_gradients(case, built.parts))
    return wrong + _compare_gradients(case, built, found)


def official_gradients(case: Case, parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The gradients of our parameters, taken back through the conversion to the official tensors."""
    if not parts:
        return {}
    leaves = {name: value.clone() for name, value in case.state.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    converted = convert_weights(parts, leaves, where=case.name, strict=True).values
    pairs = [
        (converted[part][name], parameter.grad)
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and converted[part][name].requires_grad
    ]
    torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _compare_gradients(case: Case, built: Built, found: dict[str, Tensor]) -> list[str]:
    wrong = []
    for name, expected in case.meta.get("param_grad_l2", {}).items():
        norm = found[name].double().norm().item() if name in found else 0.0
        zero = expected < ZERO and norm < ZERO
        if not zero and abs(norm - expected) > GRADIENT_TOLERANCE * expected:
            wrong.append(f"param_grad_l2 {name}: {norm:.6e}, expected {expected:.6e}")
    for name, expected in case.grads.items():
        if name not in found:
            wrong.append(f"grad/{name}: not computed")
            continue
        part = built.left_out.get(name, lambda gradient: gradient)
        difference = (part(found[name]) - part(expected)).norm().item()
        if difference > GRADIENT_TOLERANCE * max(part(expected).norm().item(), ZERO):
            wrong.append(f"grad/{name}: differs by {difference:.2e} of {part(expected).norm():.2e}")
    return wrong
