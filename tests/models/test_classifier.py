"""The linear classifier for clips: its mean, norms, loss and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.heads import ClassifierConfig, ImageClassifierConfig
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models import registry
from vitgraft.models.build import build_model
from vitgraft.models.heads.classifier import Classifier
from vitgraft.models.norms import frozen_batchnorm, unsynchronised_statistics

WIDTH, CLASSES = 12, 5
SIZES, CANVAS = torch.tensor([[32, 48]] * 3), (32, 48)


def head_of(**options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(**options), channels={8: WIDTH}, num_classes=CLASSES)


def maps_of(seed: int = 1) -> dict[int, torch.Tensor]:
    return {8: torch.randn(3, 2, WIDTH, 4, 6, generator=torch.Generator().manual_seed(seed)) + 1}


@pytest.mark.parametrize("fc_norm", [True, False])
def test_logits_are_those_of_the_mean(fc_norm: bool) -> None:
    head, maps = head_of(fc_norm=fc_norm), maps_of()
    logits = head(maps, SIZES, CANVAS)
    mean = maps[8].mean((1, 3, 4))
    if fc_norm:
        mean = F.layer_norm(mean, (WIDTH,), eps=1e-6)
    torch.testing.assert_close(logits, mean @ head.head.weight.T)
    assert logits.dtype == torch.float32


def test_its_count_is_known_before_the_forward_pass() -> None:
    head, weights, targets = head_of(), torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 1, 2])
    (loss,) = head(maps_of(), SIZES, CANVAS, targets, weights).values()
    assert head.counts(targets, weights) == {"video": loss.count}


def test_names_and_parameters_are_official() -> None:
    names = ["fc_norm.weight", "fc_norm.bias"]
    assert list(head_of().state_dict()) == [*names, "head.weight", "head.bias"]
    probe = ["head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias"]
    assert list(head_of(batch_norm=True).state_dict()) == [*names, *probe]
    for classes, expected in ((100, 76_900), (174, 133_806)):
        head = Classifier(ClassifierConfig(fc_norm=False), channels={16: 768}, num_classes=classes)
        assert sum(p.numel() for p in head.parameters()) == expected


def test_batch_norm_is_torchs_without_weights() -> None:
    head = head_of(batch_norm=True, fc_norm=False).train()
    reference = torch.nn.BatchNorm1d(WIDTH, eps=1e-6, affine=False)
    for seed in range(3):
        mean = maps_of(seed)[8].mean((1, 3, 4))
        torch.testing.assert_close(head(maps_of(seed), SIZES, CANVAS), head.head[1](reference(mean)))
    for ours, theirs in zip(head.head[0].buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    mean = maps_of()[8].mean((1, 3, 4))
    torch.testing.assert_close(head.eval()(maps_of(), SIZES, CANVAS), head.head[1](reference.eval()(mean)))
    # Whoever keeps statistics apart from filler batches, or brings ranks together, finds them.
    before = [b.clone() for b in head.head[0].buffers()]
    with frozen_batchnorm(head.train()):
        head(maps_of(9), SIZES, CANVAS)
    assert all(torch.equal(a, b) for a, b in zip(before, head.head[0].buffers(), strict=True))
    assert len(unsynchronised_statistics(head)) == 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_a_weighted_sum(smoothing: float) -> None:
    head, targets, weights = head_of(label_smoothing=smoothing), torch.tensor([0, 4, 2]), torch.tensor([1.0, 0.0, 0.5])
    each = F.cross_entropy(head(maps_of(), SIZES, CANVAS), targets, reduction="none", label_smoothing=smoothing)
    losses: Any = head(maps_of(), SIZES, CANVAS, targets, weights)
    torch.testing.assert_close(losses["video"].total, (each * weights).sum())
    assert losses["video"].count == 1.5
    losses["video"].total.backward()
    assert all(p.grad is not None for p in head.parameters())
    plain: Any = head(maps_of(), SIZES, CANVAS, targets)
    torch.testing.assert_close(plain["video"].total, each.sum())
    assert plain["video"].count == 3


@pytest.mark.parametrize("batch_norm", [True, False])
def test_bfloat16_autocast(batch_norm: bool) -> None:
    head = head_of(batch_norm=batch_norm)
    exact = head(maps_of(), SIZES, CANVAS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head({8: maps_of()[8].bfloat16()}, SIZES, CANVAS)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_an_image_is_a_clip_of_one_frame(batch_norm: bool) -> None:
    clips = head_of(batch_norm=batch_norm)
    config = ImageClassifierConfig(batch_norm=batch_norm, label_smoothing=0.1)
    images = registry.build("head", config, channels={8: WIDTH}, num_classes=CLASSES)
    images.load_state_dict(clips.state_dict())
    maps = {8: maps_of()[8][:, :1]}
    still = {8: maps[8][:, 0]}
    torch.testing.assert_close(images(still, SIZES, CANVAS), clips(maps, SIZES, CANVAS))
    targets, weights = torch.tensor([0, 4, 2]), torch.tensor([1.0, 0.0, 0.5])
    losses: Any = images(still, SIZES, CANVAS, targets, weights)
    each = F.cross_entropy(images(still, SIZES, CANVAS), targets, reduction="none", label_smoothing=0.1)
    assert list(losses) == ["image"]
    torch.testing.assert_close(losses["image"].total, (each * weights).sum())
    assert losses["image"].count == 1.5


def test_a_model_for_images() -> None:
    vit = {"name": "vit", "embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    config = ModelConfig.model_validate({"backbone": vit, "head": {"name": "image_classifier"}})
    assert config.head.task == "image"
    model = build_model(config, num_classes=7, image_size=(32, 48))
    assert model(torch.randn(2, 3, 32, 48), SIZES[:2]).shape == (2, 7)
    with pytest.raises(ValidationError, match="head image_classifier reads the trunk's last map; remove adapter"):
        ModelConfig.model_validate(
            {"backbone": vit, "adapter": {"name": "simple_pyramid"}, "head": {"name": "image_classifier"}}
        )
    with pytest.raises(ValidationError, match="backbone videomae reads clips, head image_classifier images"):
        ModelConfig.model_validate({"backbone": {"name": "videomae"}, "head": {"name": "image_classifier"}})


def test_maps_of_several_strides_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"classifier reads one map, not those of strides \[8, 16\]"):
        Classifier(ClassifierConfig(), channels={8: 4, 16: 4}, num_classes=2)
    vit = {"name": "vit", "embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    with pytest.raises(ValidationError, match="head classifier reads the trunk's last map; remove adapter simple_pyr"):
        ModelConfig.model_validate(
            {"backbone": vit, "adapter": {"name": "simple_pyramid"}, "head": {"name": "classifier"}}
        )
