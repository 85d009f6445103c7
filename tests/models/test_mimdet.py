"""MIMDet's trunk: official numbers, what is sampled, what is loaded, and models built on it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_samples import ADAPTFORMER, CLASSES, HEADS, batch_of, loss_of
from pydantic import ValidationError
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.adapters import FPNConfig
from vitgraft.configs.schema.backbones import MIMDetConfig
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.backbones.mimdet import MIMDet, valid_sizes
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.layer_decay import layer_of
from vitgraft.models.necks.fpn import FPN
from vitgraft.models.weights import load_weights

SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "table_size": 64,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
BACKBONE: dict[str, Any] = {"name": "mimdet", **SIZES}
FPN16: dict[str, Any] = {"name": "fpn", "channels": 16, "norm": "gn"}


def trunk_of(**options: Any) -> MIMDet:
    torch.manual_seed(0)
    return MIMDet(MIMDetConfig(**(SIZES | options)), image_size=(64, 64))


def model_of(
    head: str, *adapter: dict[str, Any], backbone: dict[str, Any] | None = None, **options: Any
) -> GraftedModel:
    config = ModelConfig.model_validate(
        {"backbone": backbone or BACKBONE, "adapter": list(adapter), "head": HEADS[head] | options}
    )
    torch.manual_seed(0)
    return build_model(config, num_classes=CLASSES, image_size=(64, 64))


def seen_by_the_encoder(trunk: MIMDet, images: Tensor) -> tuple[Tensor, int]:
    """``order`` and ``kept`` of one forward."""
    seen: list[Any] = []
    hook = trunk.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1:]))
    trunk(images)
    hook.remove()
    ((order, kept),) = seen
    return order, kept


# -- the original ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(test_data: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    meta = json.loads((test_data / "parity" / "mimdet_backbone.json").read_text())
    with np.load(test_data / "parity" / "mimdet_backbone.npz") as file:
        return meta, {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}


def official(case: tuple[dict[str, Any], dict[str, Tensor]]) -> tuple[MIMDet, dict[str, Tensor]]:
    meta, arrays = case
    encoder, decoder = meta["encoder"], meta["decoder"]
    config = MIMDetConfig(
        embed_dim=encoder["embed_dim"],
        depth=encoder["depth"],
        num_heads=encoder["num_heads"],
        decoder_dim=decoder["decoder_embed_dim"],
        decoder_depth=decoder["depth"],
        decoder_heads=decoder["num_heads"],
        sample_ratio=meta["sample_ratio_partial"],
        table_size=encoder["img_size"],
    )
    trunk = MIMDet(config, image_size=(64, 96)).eval()
    state = {name.removeprefix("sd/"): value for name, value in arrays.items() if name.startswith("sd/")}
    for name in ("encoder.pos_embed", "decoder.decoder_pos_embed"):
        torch.testing.assert_close(trunk.get_buffer(name), state[name], rtol=0, atol=1e-6)
    assert load_weights(trunk, state, where="the case", strict=True).loaded == {"": len(state)}
    return trunk, arrays


def test_full_maps_and_gradients_are_the_official_ones(case: Any) -> None:
    trunk, arrays = official(case)
    images = arrays["in/x"].clone().requires_grad_()
    maps = trunk(images)
    for name, level in zip(("c2", "c3", "c4", "c5"), maps, strict=True):
        torch.testing.assert_close(level, arrays[f"out/full_{name}"], rtol=1e-4, atol=1e-4)
    torch.stack([level.square().mean() for level in maps]).sum().backward()
    torch.testing.assert_close(images.grad, arrays["grad/x"], rtol=1e-3, atol=1e-6)
    norms = case[0]["param_grad_l2"]
    assert set(norms) == {name for name, _ in trunk.named_parameters()}
    for name, norm in norms.items():
        gradient = trunk.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name


def test_sampled_maps_are_the_official_ones(case: Any) -> None:
    trunk, arrays = official(case)
    sizes = torch.tensor(case[0]["image_sizes"])
    encoded = trunk.encode(arrays["in/x"], arrays["extra/noise"], sizes)
    kept = encoded.latent.shape[1]
    assert torch.equal(encoded.order[:, :kept], arrays["extra/ids_keep_part"])
    torch.testing.assert_close(encoded.latent, arrays["out/latent_part"], rtol=1e-4, atol=1e-4)
    for name, level in zip(("c2", "c3", "c4", "c5"), trunk.decode(encoded, (4, 6)), strict=True):
        torch.testing.assert_close(level, arrays[f"out/part_{name}"], rtol=1e-4, atol=1e-4)
    assert torch.equal(valid_sizes(arrays["in/x"]), sizes)


@pytest.mark.parametrize(
    ("size", "width", "depth", "published"), [("base", 768, 12, 127.96), ("large", 1024, 24, 349.33)]
)
def test_it_has_the_published_parameters(size: Any, width: int, depth: int, published: float) -> None:
    def blocks(width: int, depth: int) -> int:
        return depth * (12 * width**2 + 13 * width) + 2 * width

    with torch.device("meta"):
        trunk = MIMDet(MIMDetConfig(size=size), image_size=(800, 800))
        neck = FPN(FPNConfig(norm="bn"), channels=trunk.channels)
    widths = [3, width // 8, width // 4, width // 2, width]
    stem = sum(9 * a * b + 2 * b for a, b in pairwise(widths)) + width**2 + width
    decoder = blocks(512, 4) + 2 * (width + 1) * 512
    assert sum(p.numel() for p in trunk.encoder.parameters()) == stem + blocks(width, depth)
    assert sum(p.numel() for p in trunk.decoder.parameters()) == decoder
    # The published figure counts the position tables, the pyramid and, for 80 classes, detectron2's heads: a region
    # proposal network of two convolutions, a box head of four and one linear layer, a mask head of four.
    tables = 2501 * (width + 512)
    conv, norm = 256 * 256 * 9, 2 * 256
    rpn = 2 * (conv + 256) + 257 * 3 * (1 + 4)
    box = 4 * (conv + norm) + 256 * 49 * 1024 + 1024 + 1025 * (81 + 4 * 80)
    mask = 4 * (conv + norm) + 256 * 256 * 4 + 256 + 257 * 80
    pyramid = sum(p.numel() for p in neck.parameters())
    total = stem + blocks(width, depth) + decoder + tables + pyramid + rpn + box + mask
    assert total / 1e6 == pytest.approx(published, abs=0.006)


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 3), (0.5, 7), (1.0, 15), (0.01, 1)])
def test_training_encodes_a_share_and_evaluation_everything(ratio: float, kept: int) -> None:
    trunk = trunk_of(sample_ratio=ratio)
    images = torch.randn(2, 3, 48, 80)
    order, count = seen_by_the_encoder(trunk, images)
    assert count == kept
    assert torch.equal(order.sort(1).values, torch.arange(15).expand(2, -1))
    assert torch.equal(order[0], order[1]) == (ratio == 1)
    state = torch.get_rng_state()
    order, count = seen_by_the_encoder(trunk.eval(), images)
    assert count == 15
    assert torch.equal(order, torch.arange(15).expand(2, -1))
    assert torch.equal(state, torch.get_rng_state())


def test_the_sample_comes_from_torchs_generator() -> None:
    trunk, images = trunk_of(), torch.randn(1, 3, 64, 64)
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        runs.append(trunk(images))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not torch.allclose(runs[0][2], runs[1][2])
    # The stem sees all of the image.
    assert all(torch.equal(runs[0][level], runs[1][level]) for level in (0, 1))


def test_padding_is_sampled_last() -> None:
    trunk = trunk_of()
    images = torch.zeros(3, 3, 64, 64)
    images[0] = torch.randn(3, 64, 64)
    images[1, :, :33, :50] = torch.randn(3, 33, 50)  # 3 × 4 patches
    images[2, :, :20, :32] = torch.randn(3, 20, 32)  # 2 × 2 patches, half as many as are sampled
    assert valid_sizes(images).tolist() == [[64, 64], [33, 50], [20, 32]]
    for _ in range(5):
        order, kept = seen_by_the_encoder(trunk, images)
        assert kept == 8
        assert order[1, :12].max() < 12
        assert sorted(order[2, :4].tolist()) == [0, 1, 4, 5]
    noise = torch.rand(3, 16)
    by_hand = trunk.encode(images, noise, torch.tensor([[64, 64], [32, 64], [17, 17]])).order
    assert torch.equal(by_hand[0], noise[0].argsort())
    assert sorted(by_hand[1, :8].tolist()) == list(range(8))
    assert sorted(by_hand[2, :4].tolist()) == [0, 1, 4, 5]


def test_places_that_are_not_encoded_get_the_stems_tokens() -> None:
    trunk, images = trunk_of().eval(), torch.randn(1, 3, 64, 64)
    encoded = trunk.encode(images, torch.rand(1, 16))
    with_stem = trunk.decode(encoded, (4, 4))[2]
    without = trunk.decode(encoded._replace(dropped=torch.zeros_like(encoded.dropped)), (4, 4))[2]
    assert (with_stem - without).abs().amax() > 1e-3
    # Attention has no order: the encoded tokens are the same set, whichever comes first, and the others change none.
    flipped = torch.cat([encoded.order[:, :8].flip(1), encoded.order[:, 8:].flip(1)], 1)
    again = trunk.encoder(images, flipped, 8)[0].flip(1)
    torch.testing.assert_close(again, encoded.latent, rtol=1e-4, atol=1e-5)


# -- as a trunk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (48, 80)])
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_gradients(size: tuple[int, int], training: bool) -> None:
    trunk = trunk_of(drop_path=0.2).train(training)
    maps = trunk(torch.randn(2, 3, *size))
    assert trunk.channels == {4: 6, 8: 12, 16: 16, 32: 16}
    for (stride, channels), level in zip(trunk.channels.items(), maps, strict=True):
        assert level.shape == (2, channels, *(-(-side // stride) for side in size))
    torch.stack([level.square().mean() for level in maps]).sum().backward()
    assert [name for name, p in trunk.named_parameters() if p.grad is None] == []
    assert torch.equal(trunk.eval().forward_features(torch.ones(1, 3, *size)), trunk(torch.ones(1, 3, *size))[-1])


def test_bfloat16() -> None:
    trunk, images = trunk_of().eval(), torch.randn(2, 3, 64, 64)
    exact = trunk(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = trunk(images)
    for a, b in zip(rounded, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)
    for level in trunk.to(torch.bfloat16).train()(images.bfloat16()):
        assert level.dtype == torch.bfloat16
        assert torch.isfinite(level).all()


def test_a_frozen_trunk_encodes_everything_and_trains_its_grafts() -> None:
    model = model_of("upernet", ADAPTFORMER, backbone=BACKBONE | {"frozen": True})
    trunk = model.backbone
    assert isinstance(trunk, MIMDet)
    assert seen_by_the_encoder(trunk, torch.randn(1, 3, 64, 64))[1] == 16
    loss_of(model(**batch_of("upernet"))).backward()
    trained = {name for name, p in trunk.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in trunk.named_parameters() if ".adaptmlp." in name}
    assert all(name.startswith("encoder.blocks.") for name in trained)
    assert len(trained) == 2 * 4


def test_prompts_go_into_the_blocks_only() -> None:
    deep = model_of("upernet", {"name": "vpt", "prompts": 3})
    loss_of(deep(**batch_of("upernet"))).backward()
    prompts = [p for name, p in deep.backbone.named_parameters() if ".prompts." in name]
    assert len(prompts) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompts)
    with pytest.raises(ConfigError, match="no place for 3 more tokens"):
        model_of("upernet", {"name": "vpt", "prompts": 3, "depth": "shallow"})


def test_nothing_works_between_its_blocks() -> None:
    with pytest.raises(ConfigError, match="nothing can work between the blocks of mimdet"):
        trunk_of()(torch.randn(1, 3, 64, 64), lambda index, tokens, grid: tokens)
    with pytest.raises(ConfigError, match="no multiples of the trunk's patch size 16"):
        trunk_of()(torch.randn(1, 3, 64, 60))


def test_layers() -> None:
    names = {
        "backbone.encoder.patch_embed.proj.0.0.weight": 0,
        "backbone.encoder.blocks.0.norm1.weight": 1,
        "backbone.encoder.blocks.1.mlp.fc1.bias": 2,
        "backbone.decoder.decoder_blocks.0.norm1.weight": 3,
        "backbone.decoder.decoder_embed.weight": 3,
    }
    assert set(names) < {f"backbone.{name}" for name, _ in trunk_of().named_parameters()}
    assert {name: layer_of(name, 2) for name in names} == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 28}, "multiple of 8"),
        ({"num_heads": 5}, "multiple of num_heads 5"),
        ({"decoder_dim": 18}, "multiple of 4"),
        ({"decoder_heads": 3}, "multiple of decoder_heads 3"),
        ({"table_size": 100}, "multiple of 16"),
        ({"sample_ratio": 0.0}, "greater than 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MIMDetConfig(**(SIZES | options))


# -- weights ---------------------------------------------------------------------------------------------------------


def autoencoder(trunk: MIMDet, side: int = 3, decoder_depth: int = 3) -> dict[str, Tensor]:
    """A full MAE checkpoint with random values: its names and shapes for the sizes of ``trunk``."""
    state = {}
    for name, value in trunk.state_dict().items():
        if "patch_embed" not in name and "conv_feat_proj" not in name and "pos_embed" not in name:
            state[name.removeprefix("encoder.").removeprefix("decoder.")] = torch.randn_like(value)
    for name in [name for name in state if name.startswith("decoder_blocks.0.")]:
        state[name.replace(".0.", f".{decoder_depth - 1}.", 1)] = torch.randn_like(state[name])
    width, decoder = trunk.embed_dim, trunk.channels[16]
    state |= {"cls_token": torch.randn(1, 1, width), "mask_token": torch.randn(1, 1, decoder)}
    state |= {"patch_embed.proj.weight": torch.randn(width, 3, 16, 16), "patch_embed.proj.bias": torch.randn(width)}
    state |= {"decoder_pred.weight": torch.randn(768, decoder), "decoder_pred.bias": torch.randn(768)}
    state |= {
        "pos_embed": torch.randn(1, 1 + side**2, width),
        "decoder_pos_embed": torch.randn(1, 1 + side**2, decoder),
    }
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_full_autoencoder_loads(prefix: str) -> None:
    trunk = trunk_of()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    state = autoencoder(trunk)
    report = load_weights(trunk, {prefix + name: value for name, value in state.items()}, where="mae", strict=True)
    after = trunk.state_dict()
    for name, value in after.items():
        official = name.removeprefix("encoder.").removeprefix("decoder.")
        if "patch_embed" in name or "conv_feat_proj" in name:
            assert name in report.fresh
            assert torch.equal(value, before[name])
        elif "pos_embed" in name:
            table = state[official]
            assert name in report.resized
            assert torch.equal(value[:, :1], table[:, :1])
            maps = table[:, 1:].transpose(1, 2).reshape(1, -1, 3, 3)
            maps = nn.functional.interpolate(maps, (4, 4), mode="bicubic", align_corners=False)
            torch.testing.assert_close(value[:, 1:], maps.flatten(2).transpose(1, 2))
        else:
            assert torch.equal(value, state[official]), name
    deeper = {name for name in state if name.startswith("decoder_blocks.2.")}
    unwanted = {"cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    unwanted |= {"decoder_pred.weight", "decoder_pred.bias"}
    assert {name.removeprefix(prefix) for name in report.ignored} == deeper | unwanted
    assert report.unexpected == []


def test_an_encoder_alone_does_not_load() -> None:
    trunk = trunk_of()
    state = {name: value for name, value in autoencoder(trunk).items() if "decoder" not in name}
    with pytest.raises(CheckpointError, match=r"decoder\.decoder_embed\.weight"):
        load_weights(trunk, state, where="encoder.pth")


def test_a_detectors_file_loads() -> None:
    source = model_of("upernet", FPN16)
    target = model_of("upernet", FPN16)
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    state = {f"backbone.bottom_up.{name}": value for name, value in source.backbone.state_dict().items()}
    assert source.neck is not None
    assert target.neck is not None
    state |= {f"backbone.{name}": value for name, value in source.neck.state_dict().items()}
    state["proposal_generator.rpn_head.conv.conv0.weight"] = torch.zeros(1)
    report = load_weights({"backbone": target.backbone, "neck": target.neck}, state, where="mimdet", strict=True)
    assert list(report.ignored) == ["proposal_generator.rpn_head.conv.conv0.weight"]
    for ours, theirs in ((target.backbone, source.backbone), (target.neck, source.neck)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


# -- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "adapter", "options"),
    [
        ("mask_rcnn", [FPN16], {"anchor_sizes": [8, 16, 32, 64]}),
        ("mask_rcnn", [ADAPTFORMER, FPN16 | {"top_block": True}], {"anchor_sizes": [8, 16, 32, 64, 128]}),
        ("upernet", [FPN16], {}),
        ("upernet", [{"name": "none"}], {}),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (37, 83)])
def test_models(head: str, adapter: list[dict[str, Any]], options: dict[str, Any], size: tuple[int, int]) -> None:
    model, batch = model_of(head, *adapter, **options), batch_of(head, size=size)
    loss = loss_of(model(**batch))
    assert torch.isfinite(loss)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    units = [module for unit in model.recompute_units() for module in unit.modules()]
    assert len(units) == len(set(units))
    with torch.no_grad():
        predictions = model.eval()(batch["images"], batch["sizes"])
    assert len(predictions) == 2
    if head == "upernet":
        assert predictions.shape[-2:] == size


def test_combinations_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"maps of one width.*\{4: 6, 8: 12, 16: 16, 32: 16\}.*add adapter fpn"):
        model_of("mask_rcnn", {"name": "none"}, anchor_sizes=[8, 16, 32, 64])
    with pytest.raises(ConfigError, match="simple_pyramid reads a plain trunk's one map"):
        model_of("upernet", {"name": "simple_pyramid"})
    with pytest.raises(ValidationError, match="choose a plain backbone"):
        model_of("video_transformer")
    with pytest.raises(ValidationError, match=r"4 sizes for the pyramid's strides \[4, 8, 16, 32, 64\]"):
        model_of("mask_rcnn", FPN16 | {"top_block": True}, anchor_sizes=[8, 16, 32, 64])
