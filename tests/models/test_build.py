"""The whole model: shapes, gradients, precision and refusals, for every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import ADAPTFORMER, BACKBONE, CLASSES, HEADS, PYRAMID, batch_of, loss_of, model_of

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models import registry
from vitgraft.models.build import build_model, parameter_counts

SIZES = [(64, 64), (32, 96), (96, 64)]


def without_gradient(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_losses_and_predictions(head: str, size: tuple[int, int]) -> None:
    model = model_of(head, size=size)
    batch = batch_of(head, size=size)
    losses = model(**batch)
    for total, count in losses.values():
        assert total.shape == count.shape == ()
        assert total.dtype == count.dtype == torch.float32
        assert torch.isfinite(total)
        assert not count.requires_grad
    loss_of(losses).backward()
    assert without_gradient(model) == []
    with torch.no_grad():
        predictions = model.eval()(batch["images"], batch["sizes"])
    if head == "mask_rcnn":
        assert len(predictions) == 2
        for image in predictions:
            count = len(image["boxes"])
            assert 0 < count <= 10
            assert image["boxes"].shape == (count, 4)
            assert image["masks"].shape == (count, 28, 28)
            assert image["scores"].tolist() == sorted(image["scores"].tolist(), reverse=True)
            assert image["labels"].min() >= 0
            assert image["labels"].max() < CLASSES
            assert (image["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all()
    else:
        assert predictions.dtype == torch.float32
        assert predictions.shape == ((2, CLASSES, *size) if head == "upernet" else (2, CLASSES))


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_autocast(head: str) -> None:
    model, batch = model_of(head), batch_of(head)
    torch.manual_seed(3)
    exact = model(**batch)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**batch)
    for name, (total, count) in losses.items():
        assert total.dtype == torch.float32
        # Sampled RoIs may differ after rounding, so counts may too; the means must not.
        ours, theirs = total / count.clamp(min=1), exact[name].total / exact[name].count.clamp(min=1)
        assert torch.allclose(ours, theirs, rtol=0.1, atol=0.02), name
    loss_of(losses).backward()
    assert without_gradient(model) == []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions = model.eval()(batch["images"], batch["sizes"])
    scores = torch.cat([p["scores"] for p in predictions]) if head == "mask_rcnn" else predictions
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_parameters(head: str) -> None:
    model, batch = model_of(head).to(torch.bfloat16), batch_of(head)
    loss_of(model(**batch)).backward()
    assert without_gradient(model) == []


# Batches so large that nothing is left to draw at random.
EVERYTHING = {"mask_rcnn": {"rpn_batch": 10000, "roi_batch": 10000, "roi_positive_fraction": 0.5}}


@pytest.mark.parametrize("head", HEADS)
def test_halves_add_up_to_the_whole(head: str) -> None:
    model, batch = model_of(head, **EVERYTHING.get(head, {})), batch_of(head, batch=4)
    batch["weights"] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    whole = model(**batch)
    halves = [model(**{key: value[part] for key, value in batch.items()}) for part in (slice(0, 1), slice(1, 4))]
    for name, (total, count) in whole.items():
        assert torch.isclose(total, sum(half[name].total for half in halves), rtol=1e-6), name
        assert count == sum(half[name].count for half in halves)


@pytest.mark.parametrize("head", HEADS)
def test_a_weight_of_zero_leaves_a_sample_out(head: str) -> None:
    model, batch = model_of(head, **EVERYTHING.get(head, {})), batch_of(head)
    batch["weights"] = torch.tensor([1.0, 0.0])
    losses = model(**batch)
    alone = model(**{key: value[:1] for key, value in batch.items()})
    for name, (total, count) in alone.items():
        assert torch.isclose(losses[name].total, total, rtol=1e-5), name
        assert losses[name].count == count


def test_adaptformer_and_pyramid_together() -> None:
    model = model_of("mask_rcnn", adapter=[ADAPTFORMER, PYRAMID], backbone={"frozen": True})
    loss_of(model(**batch_of("mask_rcnn"))).backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {n for n, _ in model.named_parameters() if not n.startswith("backbone.") or ".adaptmlp." in n}
    trained, total = parameter_counts(model)
    assert trained == sum(p.numel() for name, p in model.named_parameters() if name in names)
    assert total == sum(p.numel() for p in model.parameters())


def test_units_to_recompute_do_not_nest() -> None:
    for head in HEADS:
        units = model_of(head).recompute_units()
        inside = [module for unit in units for module in unit.modules()]
        assert len(inside) == len({id(module) for module in inside})


def config_of(**axes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"backbone": BACKBONE, "adapter": PYRAMID, "head": HEADS["upernet"]} | axes)


def test_another_number_of_classes_is_refused() -> None:
    config = config_of(head=HEADS["upernet"] | {"num_classes": 7})
    with pytest.raises(ConfigError, match=r"7 in the recipe.*3 classes.*null"):
        build_model(config, num_classes=3, image_size=(64, 64))


@pytest.mark.parametrize(
    ("axes", "size", "message"),
    [
        ({"adapter": PYRAMID | {"strides": [1, 8]}}, (64, 64), r"stride 1 cannot.*\[2, 4, 8, 16, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused(axes: dict[str, Any], size: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config_of(**axes), num_classes=3, image_size=size)


@pytest.mark.parametrize("head", ["upernet", "mask_rcnn"])
@pytest.mark.parametrize("size", [(64, 60), (37, 83)])
def test_any_size_goes(head: str, size: tuple[int, int]) -> None:
    """Padding for the trunk and cropping of the maps stay inside; what is cut off does not matter."""
    model = model_of(head).eval()
    images = torch.randn(2, 3, *size)
    whole = torch.zeros(2, 3, *(-(-side // 16) * 16 for side in size))
    whole[..., : size[0], : size[1]] = images
    with torch.no_grad():
        maps = model.adapter.maps(model.backbone, images)
        around = model.adapter.maps(model.backbone, whole)
        predictions = model(images, torch.tensor([size, size]))
    for stride, level in maps.items():
        assert level.shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
        assert torch.equal(level, around[stride][..., : level.shape[-2], : level.shape[-1]])
    if head == "upernet":
        assert predictions.shape[-2:] == size
    else:
        assert all((p["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all() for p in predictions)


def test_registry() -> None:
    with pytest.raises(ConfigError, match="did you mean 'upernet'"):
        registry.build("head", HEADS_WITH_A_SLIP)
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register("head", "upernet")(lambda config: None)


class HEADS_WITH_A_SLIP:  # noqa: N801
    name = "upernett"
