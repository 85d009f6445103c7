"""UperNet and the video transformer: their losses against torch's means, and what their inputs may be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_samples import CLASSES, HEADS, PYRAMID, batch_of, loss_of, model_of
from torchvision.ops import box_iou

from vitgraft.configs.schema.model import UperNetConfig
from vitgraft.models.heads.upernet import UperNet
from vitgraft.models.heads.video_transformer import sinusoids


def test_the_semantic_loss_is_torchs_mean_over_labelled_pixels() -> None:
    model = model_of("upernet", auxiliary_weight=0.4).train()
    batch = batch_of("upernet")
    losses = model(**batch)
    maps = model.adapter.maps(model.backbone, batch["images"])
    logits = model.head(maps, batch["sizes"], (64, 64))
    assert logits.shape == (2, CLASSES, 64, 64)
    total, count = losses["semantic"]
    torch.testing.assert_close(total / count, F.cross_entropy(logits, batch["targets"], ignore_index=255))
    assert count == (batch["targets"] != 255).sum()
    auxiliary = F.interpolate(model.head.auxiliary(maps[16]), (64, 64), mode="bilinear")
    total, count = losses["auxiliary"]
    torch.testing.assert_close(total / count, 0.4 * F.cross_entropy(auxiliary, batch["targets"], ignore_index=255))


@pytest.mark.parametrize("head", HEADS)
def test_counts_known_before_the_forward_pass_are_those_of_the_losses(head: str) -> None:
    model, batch = model_of(head).train(), batch_of(head, batch=3)
    batch["weights"] = torch.tensor([1.0, 0.0, 0.5])
    losses, known = model(**batch), model.counts(batch["targets"], batch["weights"])
    # A detector samples anchors and regions; all other heads know what counts.
    assert known.keys() == (losses.keys() if head != "mask_rcnn" else set())
    assert all(torch.equal(losses[name].count, count) for name, count in known.items())


def test_no_auxiliary_head_without_weight() -> None:
    model = model_of("upernet", auxiliary_weight=0.0)
    assert set(model(**batch_of("upernet"))) == {"semantic"}
    assert not any("auxiliary" in name for name in model.state_dict())


@pytest.mark.parametrize(("strides", "nearest"), [([4, 8, 32], 8), ([7, 14, 28], 14), ([8], 8), ([4, 8, 16, 32], 16)])
def test_the_auxiliary_map_is_that_of_stride_16_or_the_nearest(strides: list[int], nearest: int) -> None:
    head = UperNet(UperNetConfig(channels=8, norm="gn"), channels=dict.fromkeys(strides, 4), num_classes=3)
    assert head.auxiliary_stride == nearest
    maps = {stride: torch.randn(1, 4, 224 // stride, 224 // stride) for stride in strides}
    loss_of(head(maps, torch.tensor([[224, 224]]), (224, 224), torch.zeros(1, 224, 224, dtype=torch.int64))).backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("norm", ["bn", "syncbn"])
def test_one_image_under_batchnorm(norm: str) -> None:
    model = model_of("upernet", norm=norm, adapter=[PYRAMID | {"norm": norm}]).train()
    losses = model(**batch_of("upernet", batch=1))
    loss_of(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_nothing_but_ignored_pixels() -> None:
    model, batch = model_of("upernet"), batch_of("upernet")
    batch["targets"].fill_(255)
    losses = model(**batch)
    assert all(term.total == 0 and term.count == 0 for term in losses.values())
    loss_of(losses).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_video_loss_is_torchs_mean(smoothing: float) -> None:
    model = model_of("video_transformer", label_smoothing=smoothing)
    batch = batch_of("video_transformer", batch=3)
    total, count = model(**batch)["video"]
    logits = model(batch["images"], batch["sizes"])
    expected = F.cross_entropy(logits, batch["targets"], label_smoothing=smoothing)
    torch.testing.assert_close(total / count, expected)


def test_clips_of_any_length_whose_order_matters() -> None:
    model = model_of("video_transformer").eval()
    torch.nn.init.normal_(model.head.classifier.weight)
    sizes = torch.tensor([[64, 64]])
    clip = torch.randn(1, 3, 4, 64, 64)
    logits = model(clip, sizes)
    assert not torch.allclose(logits, model(clip.flip(2), sizes), atol=1e-5)
    assert model(torch.randn(1, 3, 1, 64, 64), sizes).shape == (1, CLASSES)
    assert model(torch.randn(2, 3, 9, 32, 96), sizes.repeat(2, 1)).shape == (2, CLASSES)
    # A batch is no context: each clip on its own gives the same.
    both = model(torch.cat([clip, clip.flip(2)]), sizes.repeat(2, 1))
    torch.testing.assert_close(both[:1], logits, rtol=1e-4, atol=1e-5)


def test_sinusoids() -> None:
    table = sinusoids(50, 6, torch.device("cpu"))
    assert table.shape == (50, 6)
    position = torch.tensor(7.0)
    expected = [f(position / 10000 ** (2 * i / 6)) for i in range(3) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(table[7], torch.stack(expected))
    assert sinusoids(3, 5, torch.device("cpu")).shape == (3, 5)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mask_rcnn", "upernet", "video_transformer"])
def test_a_batch_can_be_learnt(head: str) -> None:
    """Boxes, classes and masks come out where they went in: a sign or an offset that is wrong would not survive."""
    options = {"score_threshold": 0.5, "roi_batch": 32} if head == "mask_rcnn" else {}
    model, batch = model_of(head, **options).train(), batch_of(head)
    if head == "upernet":
        batch["targets"] = batch["targets"][:, 32:48, 48:].repeat_interleave(4, 1).repeat_interleave(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = loss_of(model(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predictions = model.eval()(batch["images"], batch["sizes"])
    if head == "video_transformer":
        assert torch.equal(predictions.argmax(1), batch["targets"])
    elif head == "upernet":
        # Labels are noise in cells of 4 pixels, as fine as the finest map.
        assert (predictions.argmax(1) == batch["targets"]).float().mean() > 0.9
    else:
        for found, target in zip(predictions, batch["targets"], strict=True):
            best, index = box_iou(target["boxes"], found["boxes"]).max(1)
            assert (best > 0.75).all()
            assert torch.equal(found["labels"][index], target["labels"])
            assert (found["masks"][index].mean((1, 2)) > 0.7).all()
