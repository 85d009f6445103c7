"""Our models against numbers of the official implementations: outputs and the gradient of every parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.cases import Case, NotBuilt, compare, read_case
from parity.kinds import build_case
from torch import Tensor

from vitgraft.models.ops.deformable import MSDeformAttn


def test_official_numbers(case: Path) -> None:
    read = read_case(case)
    torch.manual_seed(0)
    try:
        built = build_case(read)
    except NotBuilt as reason:
        pytest.skip(f"{read.name}: {reason}")
    wrong = compare(read, built)
    assert not wrong, "\n".join([f"{len(wrong)} differences", *wrong])


def made_up() -> Case:
    """A case of our own numbers: deformable attention, as if its official code had given them."""
    generator = torch.Generator().manual_seed(0)
    module = MSDeformAttn(12, levels=2, heads=2, points=3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    inputs: dict[str, Tensor] = {
        "query": torch.randn(1, 5, 12, generator=generator),
        "input_flatten": torch.randn(1, 16 + 4, 12, generator=generator),
        "spatial_shapes": torch.tensor([[4, 4], [2, 2]]),
        "reference_points2": torch.rand(1, 5, 2, 2, generator=generator),
    }
    given = (inputs["query"], inputs["reference_points2"], inputs["input_flatten"], [(4, 4), (2, 2)])
    output = module(*given)
    output.square().mean().backward()
    norms = {name: p.grad.norm().item() for name, p in module.named_parameters() if p.grad is not None}
    meta = {
        "source": {"repo": "fundamentalvision/Deformable-DETR"},
        "cls": "MSDeformAttn",
        "constructor": {"d_model": 12, "n_levels": 2, "n_heads": 2, "n_points": 3},
        "param_grad_l2": norms,
    }
    grads = {"value_proj.weight": module.value_proj.weight.grad.clone()}  # type: ignore[union-attr]
    return Case("made_up", meta, dict(module.state_dict()), inputs, {"ref2": output.detach()}, grads, {})


def test_what_differs_is_seen() -> None:
    case = made_up()
    assert compare(case, build_case(case)) == []
    case.outputs["ref2"] = case.outputs["ref2"] + 1e-3
    case.grads["value_proj.weight"] = case.grads["value_proj.weight"] * 1.01
    case.meta["param_grad_l2"]["output_proj.bias"] *= 1.01
    wrong = compare(case, build_case(case))
    assert [line.split(":")[0] for line in wrong] == [
        "out/ref2",
        "param_grad_l2 output_proj.bias",
        "grad/value_proj.weight",
    ]


def test_an_argument_without_translation_is_refused() -> None:
    case = made_up()
    case.meta["constructor"]["im2col_step"] = 64
    with pytest.raises(AssertionError, match=r"made_up: constructor: unknown arguments \{'im2col_step': 64\}"):
        build_case(case)


def test_kinds_that_are_not_built_are_skipped_with_the_reason() -> None:
    case = made_up()
    case.meta["source"]["repo"] = "raoyongming/DenseCLIP"
    with pytest.raises(NotBuilt, match="DenseCLIP"):
        build_case(case)
    case.meta["source"]["repo"], case.meta["cls"] = "hustvl/MIMDet", "Another"
    with pytest.raises(AssertionError, match="has no 'Another' here; known"):
        build_case(case)
