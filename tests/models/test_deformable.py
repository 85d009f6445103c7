"""Deformable attention: against the official numbers, a sampler written out by hand, and in every precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.models.ops.deformable import MSDeformAttn, deformable_attention
from vitgraft.models.weights import load_weights

SHAPES = [(4, 6), (1, 3), (5, 2)]
PLACES = 24 + 3 + 10


def case(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    notes = json.loads((folder / "parity" / f"{name}.json").read_text())
    with np.load(folder / "parity" / f"{name}.npz") as file:
        return notes, {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fiub"}


def operands(heads: int = 3, width: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations (a part of them outside) and weights for ``SHAPES``."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, PLACES, heads, width, generator=generator).to(dtype)
    locations = torch.rand(2, 7, heads, 3, 4, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(2, 7, heads, 3, 4, generator=generator).to(dtype)
    return value, locations, weights


def by_hand(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable DETR's equation 3, one sample after the other."""
    batch, _, heads, width = value.shape
    result = torch.zeros(batch, locations.shape[1], heads, width)
    for b, q, m, level, p in np.ndindex(*locations.shape[:5]):
        h, w = SHAPES[level]
        start = sum(a * b for a, b in SHAPES[:level])
        level_map = value[b, start : start + h * w, m].view(h, w, width)
        x, y = (locations[b, q, m, level, p] * torch.tensor([w, h]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    result[b, q, m] += weights[b, q, m, level, p] * share * level_map[row, column]
    return result.flatten(2)


def test_official_operation(test_data: Path) -> None:
    _, data = case(test_data, "msdeform_op")
    names = {"value": "value", "sampling_locations": "locations", "attention_weights": "weights"}
    inputs = {ours: data[f"in/{official}"].requires_grad_() for official, ours in names.items()}
    shapes = [(h, w) for h, w in data["in/value_spatial_shapes"].tolist()]
    output = deformable_attention(shapes=shapes, **inputs)
    torch.testing.assert_close(output, data["out/output"], atol=1e-4, rtol=1e-4)
    (output * data["extra/grad_output"]).sum().backward()
    for official, ours in names.items():
        # The first three queries lie on borders and centres, where the slope to either side differs.
        of = slice(3, None) if ours == "locations" else slice(None)
        found, expected = inputs[ours].grad, data[f"grad/{official}"]
        assert found is not None
        torch.testing.assert_close(found[:, of], expected[:, of], atol=1e-4, rtol=1e-3)


def test_official_module(test_data: Path) -> None:
    notes, data = case(test_data, "msdeform_module")
    options = notes["constructor"]
    module = MSDeformAttn(
        options["d_model"], levels=options["n_levels"], heads=options["n_heads"], points=options["n_points"]
    )
    state = {name.removeprefix("sd/"): value for name, value in data.items() if name.startswith("sd/")}
    load_weights(module, state, where="msdeform_module", strict=True)
    query, features = (data[f"in/{name}"].requires_grad_() for name in ("query", "input_flatten"))
    shapes = [(h, w) for h, w in data["in/spatial_shapes"].tolist()]
    points, boxes = data["in/reference_points2"], data["in/reference_points4"]
    output = module(query, points, features, shapes)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(output, data["out/ref2"], **close)
    masked = module(query, points, features, shapes, data["in/padding_mask"])
    torch.testing.assert_close(masked, data["out/ref2_mask"], **close)
    torch.testing.assert_close(module(query, boxes, features, shapes), data["out/ref4"], **close)
    output.square().mean().backward()
    found = {"query": query, "input_flatten": features} | dict(module.named_parameters())
    for name, expected in data.items():
        if name.startswith("grad/"):
            gradient = found[name.removeprefix("grad/")].grad
            assert gradient is not None
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("heads", "width"), [(3, 5), (1, 44), (2, 1)])
def test_samples_by_hand(heads: int, width: int) -> None:
    value, locations, weights = operands(heads, width)
    torch.testing.assert_close(
        deformable_attention(value, SHAPES, locations, weights), by_hand(value, locations, weights)
    )


def test_gradients_in_float64() -> None:
    value, locations, weights = (tensor.double().requires_grad_() for tensor in operands(2, 3))
    assert torch.autograd.gradcheck(lambda v, x, w: deformable_attention(v, SHAPES, x, w), (value, locations, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_in_float32(dtype: torch.dtype) -> None:
    value, locations, weights = operands(dtype=dtype)
    expected = deformable_attention(value.float(), SHAPES, locations, weights.float())
    plain = deformable_attention(value.requires_grad_(), SHAPES, locations, weights)
    with torch.autocast("cpu", dtype=dtype):
        cast = deformable_attention(value, SHAPES, locations, weights)
    for found in plain, cast:
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))  # rounded once, at the end
    plain.sum().backward()
    assert value.grad is not None
    assert value.grad.dtype == dtype


class Operation(nn.Module):
    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, SHAPES, locations, weights)


def test_export_for_any_batch_and_number_of_queries() -> None:
    batch, queries = torch.export.Dim("batch", max=64), torch.export.Dim("queries", max=512)
    dynamic = {0: batch, 1: queries}
    exported = torch.export.export(Operation(), operands(), dynamic_shapes=({0: batch}, dynamic, dynamic))
    value, locations, weights = operands()
    other = value[:1], locations[:1, :4], weights[:1, :4]
    torch.testing.assert_close(exported.module()(*other), Operation()(*other))


def test_tensors_that_do_not_fit() -> None:
    value, locations, weights = operands()
    with pytest.raises(ValueError, match=r"value has shape \(2, 36, 3, 5\); expected .* S = 37"):
        deformable_attention(value[:, 1:], SHAPES, locations, weights)
    with pytest.raises(ValueError, match=r"locations have shape .* B, M, L = \(2, 3, 3\)"):
        deformable_attention(value, SHAPES, locations[:, :, :2], weights)
    with pytest.raises(ValueError, match=r"weights have shape .*one for each location"):
        deformable_attention(value, SHAPES, locations, weights[..., :3])
    with pytest.raises(ValueError, match=r"locations are torch.bfloat16; expected torch.float32"):
        deformable_attention(value, SHAPES, locations.bfloat16(), weights)


def attention(dim: int = 24, heads: int = 4, **options: Any) -> MSDeformAttn:
    torch.manual_seed(0)
    return MSDeformAttn(dim, levels=3, heads=heads, points=2, **options)


def test_the_start_looks_around() -> None:
    module = attention()
    offsets = module.sampling_offsets.bias.view(4, 3, 2, 2)
    ring = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(offsets[:, 0, 0], ring)
    torch.testing.assert_close(offsets[:, 2, 1], 2 * ring)
    diagonal = attention(heads=8).sampling_offsets.bias.view(8, 3, 2, 2)[1, 0, 0]
    torch.testing.assert_close(diagonal, torch.ones(2))  # the larger component is 1
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()


def test_ratio_narrows_the_values() -> None:
    module = attention(ratio=0.5)
    assert module.value_proj.weight.shape == (12, 24)
    assert module.output_proj.weight.shape == (24, 12)
    output = module(torch.randn(2, 7, 24), torch.rand(1, 7, 1, 2), torch.randn(2, PLACES, 24), SHAPES)
    assert output.shape == (2, 7, 24)
    with pytest.raises(ConfigError, match=r"5 heads do not divide the values' width 24 \(= 24 · 1.0\)"):
        attention(heads=5)


def test_the_module_in_bfloat16() -> None:
    module = attention()
    nn.init.normal_(module.sampling_offsets.weight, std=0.2)
    query, features = torch.randn(2, 7, 24), torch.randn(2, PLACES, 24)
    references = torch.rand(1, 7, 1, 2)
    expected = module(query, references, features, SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = module(query, references, features, SHAPES)
    half = module.bfloat16()(query.bfloat16(), references, features.bfloat16(), SHAPES)
    for found in cast, half:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
