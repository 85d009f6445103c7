"""FLOPs of a training step, against torch's count of the real model and against formulas; peaks of known devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_samples import BACKBONE, HEADS, PYRAMID, batch_of, loss_of
from support import tiny_recipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitgraft.configs.load import validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.trainer import train
from vitgraft.trainer.mfu import Arithmetic, arithmetic_of, peak_tflops, training_flops

CLASSES, SIDE = 5, 64


def recipe_of(head: str, options: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    task = {"mask_rcnn": "detection", "upernet": "semantic", "video_transformer": "video"}[head]
    tree = tiny_recipe(task, "data", model__head=HEADS[head] | (options or {}), model__backbone=BACKBONE, **settings)
    tree["data"]["image_size"] = [SIDE, SIDE]
    tree["data"]["clip"] = {"frames": 3}
    return validate_recipe(tree, "recipe")


def model_of(recipe: Recipe) -> GraftedModel:
    torch.manual_seed(0)
    return build_model(recipe.model, num_classes=CLASSES, image_size=(SIDE, SIDE))


def trained(model: GraftedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def really(model: GraftedModel, head: str) -> int:
    """Counted while the model computes on one sample."""
    batch = batch_of(head, batch=1, size=(SIDE, SIDE))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(model(**batch)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("head", "adapter"),
    [
        ("upernet", PYRAMID),
        ("upernet", {"name": "adaptformer", "bottleneck": 4}),
        ("video_transformer", {"name": "adaptformer", "bottleneck": 4}),
        ("video_transformer", {"name": "lora", "rank": 2}),
        ("mask_rcnn", PYRAMID),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_the_count_is_that_of_the_real_model(head: str, adapter: dict[str, Any]) -> None:
    parts = [adapter] if head != "upernet" or adapter is PYRAMID else [adapter, PYRAMID]
    # Few RoIs, so that the sampler finds as many as it is asked for; how many are positive depends on the picture.
    options = {"roi_batch": 4, "masks": False} if head == "mask_rcnn" else None
    recipe = recipe_of(head, options, model__adapter=parts)
    model = model_of(recipe)
    names = trained(model)
    assert training_flops(recipe, CLASSES, names) == really(model, head)


def test_a_frozen_trunk_costs_its_forward_pass_only() -> None:
    recipe = recipe_of("upernet", model__adapter=[PYRAMID])
    model = model_of(recipe)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    frozen = training_flops(recipe, CLASSES, trained(model))
    assert frozen == really(model, "upernet")
    everything = {name for name, _ in model.named_parameters()}
    assert frozen < training_flops(recipe, CLASSES, everything)


def test_masks_count_by_the_recipes_share() -> None:
    counts = {}
    for fraction in (0.25, 0.5):
        head = HEADS["mask_rcnn"] | {"roi_batch": 16, "roi_positive_fraction": fraction}
        tree = tiny_recipe("detection", "data", model__head=head)
        recipe = validate_recipe(tree, "recipe")
        model = build_model(recipe.model, num_classes=CLASSES, image_size=(128, 128))
        counts[fraction] = training_flops(recipe, CLASSES, trained(model))
        width, channels = 16, head["mask_channels"]
        convs = 14 * 14 * 9 * (width * channels + channels * channels)
        up = 14 * 14 * 4 * channels * channels + 28 * 28 * channels * CLASSES
    # Forward, and the gradients of weights and inputs: three times the forward pass, two operations each.
    assert counts[0.5] - counts[0.25] == 4 * 3 * 2 * (convs + up)


def test_vit_large_costs_what_is_published() -> None:
    """61.6 GMAC forward at 224 × 224 (timm's table of results); nobody needs the gradient of the images."""
    tree = tiny_recipe(
        "semantic",
        "data",
        model__backbone={"name": "vit", "embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
        model__adapter={"name": "none"},
        model__head={"name": "image_classifier"},
        data__image_size=[224, 224],
    )
    recipe = validate_recipe(tree, "recipe")
    with torch.device("meta"):
        model = build_model(recipe.model, num_classes=1000, image_size=(224, 224))
    assert training_flops(recipe, 1000, trained(model)) == pytest.approx(3 * 2 * 61.6e9, rel=0.01)


@pytest.mark.parametrize(
    "name", ["quickstart/detection", "quickstart/semantic", "quickstart/video", "starter/coco_vit_adapter"]
)
def test_every_kind_of_recipe_can_be_counted(name: str) -> None:
    from vitgraft.configs.load import load_recipe

    recipe = load_recipe(name)
    size = (recipe.data.image_size[0], recipe.data.image_size[1])
    with torch.device("meta"):
        model = build_model(recipe.model.without_weights(), num_classes=10, image_size=size)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    tokens = size[0] * size[1] // recipe.model.backbone.patch_size**2
    # At least what the trunk's matrices cost on the tokens of one image.
    assert training_flops(recipe, 10, trained(model)) > 2 * 0.5 * parameters * tokens
    assert torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10G", None),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_utilisation_and_when_there_is_none() -> None:
    assert Arithmetic(10**9, 4e12).utilisation(samples=8, seconds=0.01) == pytest.approx(0.2)
    recipe = recipe_of("upernet", model__adapter=[PYRAMID])
    names = trained(model_of(recipe))
    assert arithmetic_of(recipe, CLASSES, names, torch.device("cpu"), world=2) is None
    told = recipe_of("upernet", model__adapter=[PYRAMID], train__peak_tflops=0.5)
    found = arithmetic_of(told, CLASSES, names, torch.device("cpu"), world=2)
    assert found == Arithmetic(training_flops(recipe, CLASSES, names), 1e12)
    # It says how a run is shown, not what it computes.
    assert told.identity_hash() == recipe.identity_hash()


def test_a_model_that_cannot_be_counted_trains_without_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("meta tensors have no item()\nmore")

    monkeypatch.setattr(train, "arithmetic_of", refuse)
    notes: list[str] = []
    session = SimpleNamespace(
        engine=SimpleNamespace(module=torch.nn.Linear(2, 2)),
        facts=SimpleNamespace(classes=["a"]),
        device=torch.device("cpu"),
        reporter=SimpleNamespace(note=notes.append),
    )
    loop: Any = SimpleNamespace(session=session, recipe=None)
    assert train.TrainLoop._count_arithmetic(loop) is None
    assert notes == ["no MFU curve: the model's FLOPs cannot be counted: meta tensors have no item()"]
