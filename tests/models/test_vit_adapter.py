"""ViT-Adapter: the official numbers and sizes, any image, any plain trunk, and every option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_samples import Stub, batch_of, loss_of, model_of
from pydantic import ValidationError
from torch import Tensor, nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import ViTAdapterConfig
from vitgraft.configs.schema.model import ViTConfig
from vitgraft.models import registry
from vitgraft.models.adapters.vit_adapter import Extractor, Injector, ViTAdapter
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.backbones.vit import ViT
from vitgraft.models.build import parameter_counts
from vitgraft.models.recompute import apply_recompute
from vitgraft.models.weights import load_weights

TRUNK: dict[str, Any] = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 16}
ADAPTER: dict[str, Any] = {"name": "vit_adapter", "conv_inplane": 8, "deform_num_heads": 2}


def built(
    adapter: dict[str, Any] | None = None, *, size: tuple[int, int] = (64, 64), seed: int = 0, **trunk: Any
) -> tuple[ViT, ViTAdapter]:
    """A trunk without final norm, and an adapter whose injectors do something."""
    torch.manual_seed(seed)
    vit = ViT(ViTConfig.model_validate(TRUNK | trunk), image_size=size)
    config = ViTAdapterConfig.model_validate(ADAPTER | {"init_values": 0.5} | (adapter or {}))
    made: ViTAdapter = registry.build("adapter", config, trunk=vit)
    vit.without_final_norm()
    return vit, made


def loss(trunk: Trunk, adapter: ViTAdapter, images: Tensor) -> Tensor:
    return torch.stack([level_map.float().square().mean() for level_map in adapter.maps(trunk, images).values()]).sum()


def gradients(*modules: nn.Module) -> list[Tensor]:
    found = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return found


# -- the official numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_adapter_det_global", "vit_adapter_det_windowed", "vit_adapter_seg_global"])
def test_official_numbers(name: str, test_data: Path) -> None:
    notes = json.loads((test_data / "parity" / f"{name}.json").read_text())
    with np.load(test_data / "parity" / f"{name}.npz") as file:
        data = {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fiu"}
    options = notes["constructor"]
    side = options["pretrain_size"]
    trunk = {key: options[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    if options["layer_scale"]:
        trunk["layer_scale"] = 1.0
    if options["window_attn"]:
        everywhere = [index for index, windowed in enumerate(options["window_attn"]) if not windowed]
        trunk |= {"window_size": options["window_size"], "global_blocks": everywhere}
    adapter = {key: options[key] for key in ViTAdapterConfig.model_fields if key in options}
    adapter["fusion"] = "stages" if "segmentation" in notes["source"]["files"][0] else "last"
    vit, made = built(adapter, size=(side, side), seed=1, **trunk)

    state = {key.removeprefix("sd/"): value for key, value in data.items() if key.startswith("sd/")}
    load_weights({"backbone": vit, "adapter": made}, state, where=name, strict=True)
    vit.eval(), made.eval()
    images = data["in/x"].requires_grad_()
    maps = made(vit, images)
    for index, level_map in enumerate(maps):
        torch.testing.assert_close(level_map, data[f"out/f{index + 1}"], atol=1e-4, rtol=1e-4)
    torch.stack([level_map.square().mean() for level_map in maps]).sum().backward()
    torch.testing.assert_close(images.grad, data["grad/x"], atol=1e-5, rtol=1e-3)
    parameters = dict(made.named_parameters()) | {
        key.removeprefix("vit.").replace("ls1.gamma", "gamma1").replace("ls2.gamma", "gamma2"): value
        for key, value in vit.named_parameters()
    }
    assert set(parameters) == set(notes["param_grad_l2"])
    for key, expected in notes["param_grad_l2"].items():
        gradient = parameters[key].grad
        assert gradient is not None, key
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-6), key


LARGE = {"deform_num_heads": 16, "deform_ratio": 0.5}
SIZES: list[tuple[dict[str, Any], dict[str, Any], float, float | None, float | None]] = [
    ({"embed_dim": 192, "depth": 12, "num_heads": 3}, {}, 2.44, 2.22, 7.97),
    ({"embed_dim": 384, "depth": 12, "num_heads": 6}, {}, 5.83, 5.03, 27.5),
    ({"embed_dim": 768, "depth": 12, "num_heads": 12}, LARGE | {"deform_num_heads": 12}, 13.68, 11.67, 99.5),
    ({"embed_dim": 1024, "depth": 24, "num_heads": 16}, LARGE, 23.24, 19.67, 327),
    ({"embed_dim": 1408, "depth": 40, "num_heads": 16}, LARGE, 40.75, None, None),
]


@pytest.mark.parametrize(("trunk", "adapter", "alone", "plain", "total"), SIZES, ids=["T", "S", "B", "L", "EVA"])
def test_official_sizes(
    trunk: dict[str, Any], adapter: dict[str, Any], alone: float, plain: float | None, total: float | None
) -> None:
    def millions(**options: Any) -> tuple[float, float]:
        with torch.device("meta"):
            vit, made = built({"conv_inplane": 64, "deform_num_heads": 6} | adapter | options, size=(224, 224), **trunk)
        counts = parameter_counts(made)[1], parameter_counts(vit)[1] + trunk["embed_dim"]  # the class token's position
        return counts[0] / 1e6, sum(counts) / 1e6

    found = millions()
    assert found[0] == pytest.approx(alone, abs=0.006)
    if total is not None:
        assert found[1] == pytest.approx(total, rel=0.002)
    if plain is not None:
        assert millions(use_extra_extractor=False)[0] == pytest.approx(plain, abs=0.006)


# -- any image, any trunk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (50, 77), (33, 1)])
@pytest.mark.parametrize("trunk", [{}, {"patch_size": 14}, {"class_token": True}, {"window_size": 3}, {"depth": 6}])
def test_any_size(size: tuple[int, int], trunk: dict[str, Any]) -> None:
    vit, adapter = built(**trunk)
    maps = adapter.maps(vit, torch.randn(2, 3, *size))
    height, width = size
    assert {stride: tuple(x.shape) for stride, x in maps.items()} == {
        stride: (2, 24, -(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)
    }
    torch.stack([x.square().sum() for x in maps.values()]).sum().backward()
    # A norm of one place per channel in a batch of two is still a norm: everything takes part.
    assert [name for name, p in [*vit.named_parameters(), *adapter.named_parameters()] if p.grad is None] == []


def test_clips_are_seen_frame_by_frame() -> None:
    vit, adapter = built()
    vit.eval(), adapter.eval()
    clip = torch.randn(2, 3, 4, 64, 32)
    maps = adapter.maps(vit, clip)
    assert maps[8].shape == (2, 4, 24, 8, 4)
    torch.testing.assert_close(maps[8][:, 2], adapter.maps(vit, clip[:, :, 2])[8])


@pytest.mark.parametrize("training", [False, True])
def test_an_image_alone_has_the_gradients_of_a_batch_of_copies(training: bool) -> None:
    vit, adapter = built()
    vit.train(training), adapter.train(training)
    images = torch.randn(1, 3, 64, 96)
    found = []
    for batch in images, images.repeat(2, 1, 1, 1):
        loss(vit, adapter, batch).backward()
        found.append(gradients(vit, adapter))
    for alone, twice in zip(*found, strict=True):
        torch.testing.assert_close(alone, twice, atol=2e-5, rtol=1e-3)


def test_the_start_leaves_the_trunk_as_it_is() -> None:
    vit, adapter = built({"init_values": 0.0})
    vit.eval()
    images = torch.randn(2, 3, 64, 96)
    seen: dict[int, Tensor] = {}
    originals = [interaction.injector for interaction in adapter.interactions]
    for index, injector in enumerate(originals):
        injector.register_forward_hook(lambda module, args, output, index=index: seen.update({index: output - args[0]}))
    adapter(vit, images)
    assert sorted(seen) == [0, 1, 2, 3]
    assert not any(change.any() for change in seen.values())
    with torch.no_grad():
        for injector in originals:
            injector.gamma.fill_(0.5)
    adapter(vit, images)
    assert all(change.any() for change in seen.values())


def test_the_trunk_of_patch_14_sees_the_whole_image() -> None:
    vit, adapter = built(patch_size=14)
    sizes = []
    vit.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    adapter.maps(vit, torch.randn(1, 3, 90, 128))
    assert sizes == [(84, 112)]  # 14 · (96 / 16), 14 · (128 / 16)
    # What the trunk sees at a place is what stands there: a bright bottom right corner moves that corner of the map.
    vit.eval(), adapter.eval()
    images = torch.zeros(1, 3, 128, 128)
    before = adapter.maps(vit, images)[16]
    images[..., 112:, 112:] = 3
    change = (adapter.maps(vit, images)[16] - before).abs().mean(1)[0]
    assert change.argmax() == 63


def test_a_trunk_that_cannot_be_adapted() -> None:
    class Clips(Stub):
        takes_clips = True

    blocks = [nn.Identity() for _ in range(4)]
    with pytest.raises(ConfigError, match="takes clips"):
        ViTAdapter(ViTAdapterConfig(), trunk=Clips(*blocks, embed_dim=24))
    with pytest.raises(ConfigError, match="5 heads do not divide the values' width 24"):
        built({"deform_num_heads": 5})
    with pytest.raises(ConfigError, match="2 blocks cannot be cut into four groups"):
        built(depth=2)
    with pytest.raises(ConfigError, match=r"end with block 2, the trunk's last is 3"):
        built({"interaction_indexes": [[0, 0], [1, 2]]})
    with pytest.raises(ConfigError, match=r"there are 2 groups; give four groups, or use fusion: last"):
        built({"interaction_indexes": [[0, 0], [1, 3]], "fusion": "stages"})


@pytest.mark.parametrize("indexes", [[], [[0]], [[0, 1], [3, 3]], [[1, 3]], [[0, 2], [2, 3]], [[0, 1], [2, 1]], [[]]])
def test_groups_that_do_not_follow_each_other(indexes: list[list[int]]) -> None:
    with pytest.raises(ValidationError, match=r"follow each other from block 0"):
        ViTAdapterConfig(interaction_indexes=indexes)


# -- options ---------------------------------------------------------------------------------------------------------


def test_groups_of_blocks() -> None:
    assert built(depth=12)[1].boundaries == [0, 3, 6, 9, 12]
    assert built(depth=6)[1].boundaries == [0, 1, 3, 4, 6]
    vit, adapter = built({"interaction_indexes": [[0, 0], [1, 3]]})
    assert [len(interaction.extractors()) for interaction in adapter.interactions] == [1, 3]
    order: list[str] = []
    for name, module in [*vit.named_modules(), *adapter.named_modules()]:
        if isinstance(module, Injector | Extractor) or name in {f"vit.blocks.{index}" for index in range(4)}:
            module.register_forward_hook(lambda *_, name=name: order.append(name.replace("interactions.", "")))
    adapter(vit, torch.randn(2, 3, 64, 64))
    assert order == [
        *("0.injector", "vit.blocks.0", "0.extractor"),
        *("1.injector", "vit.blocks.1", "vit.blocks.2", "vit.blocks.3", "1.extractor"),
        *("1.extra_extractors.0", "1.extra_extractors.1"),
    ]


def test_what_is_added_to_the_maps() -> None:
    images = torch.randn(2, 3, 64, 64)
    found = {}
    for name, options in {
        "last": {},
        "stages": {"fusion": "stages"},
        "none": {"add_vit_feature": False},
    }.items():
        vit, adapter = built(options)
        vit.eval(), adapter.eval()
        found[name] = adapter(vit, images)
    assert not torch.allclose(found["last"][0], found["stages"][0])
    torch.testing.assert_close(found["last"][3], found["stages"][3])  # after the last group the two are one
    assert not torch.allclose(found["last"][3], found["none"][3])


def test_options_that_leave_something_out() -> None:
    names = {name for name, _ in built({"with_cffn": False, "use_extra_extractor": False})[1].named_parameters()}
    assert not any(".ffn" in name or "extra_" in name for name in names)
    _, adapter = built({"norm": "gn", "layer_norm_eps": 1e-5})
    assert not [name for name, _ in adapter.named_buffers() if "running" in name]
    assert {module.eps for module in adapter.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_drop_path_drops_the_ffn_at_one_rate() -> None:
    vit, adapter = built({"drop_path": 0.5, "norm": "gn"}, drop_path=0.0)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(adapter(vit, images)[1], adapter(vit, images)[1])
    adapter.eval()
    assert torch.equal(adapter(vit, images)[1], adapter(vit, images)[1])
    rates = [module.drop_path.drop_prob for module in adapter.modules() if isinstance(module, Extractor)]
    assert rates == [0.5] * 6


def test_initial_values() -> None:
    _, adapter = built({"conv_inplane": 64}, embed_dim=96)
    assert adapter.spm.fc1.bias is not None
    assert not adapter.spm.fc1.bias.any()
    assert adapter.spm.conv3[0].weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
    assert adapter.up.weight.std().item() == pytest.approx((2 / (4 * 96)) ** 0.5, rel=0.05)
    assert adapter.level_embed.std().item() == pytest.approx(1, rel=0.2)
    extractor = adapter.interactions[0].extractor
    assert extractor.ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert extractor.attn.sampling_offsets.bias.abs().max() == 4  # the ring, not zeros
    assert not extractor.attn.sampling_offsets.weight.any()


def test_a_frozen_trunk() -> None:
    vit, adapter = built(frozen=True)
    loss(vit, adapter, torch.randn(2, 3, 64, 64)).backward()
    assert all(p.grad is None for p in vit.parameters())
    assert all(p.grad is not None for p in adapter.parameters())


def test_recomputation_changes_nothing() -> None:
    images = torch.randn(2, 3, 64, 96)
    found = []
    for policy in "none", "full":
        vit, adapter = built()
        apply_recompute([*vit.recompute_units(), *adapter.recompute_units()], policy)  # type: ignore[arg-type]
        value = loss(vit, adapter, images)
        value.backward()
        statistics = {name: buffer.clone() for name, buffer in adapter.named_buffers()}
        found.append((value, gradients(vit, adapter), statistics))
    (value, kept, statistics), (again, recomputed, same) = found
    assert torch.equal(value, again)
    assert all(map(torch.equal, kept, recomputed))
    assert all(torch.equal(statistics[name], same[name]) for name in statistics)


def test_bfloat16() -> None:
    vit, adapter = built()
    images = torch.randn(2, 3, 64, 96)
    expected = adapter(vit, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = adapter(vit, images)
        loss(vit, adapter, images).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    vit.bfloat16(), adapter.bfloat16()
    half = adapter(vit, images.bfloat16())
    for found in cast, half:
        for low, full in zip(found, expected, strict=True):
            assert (low.float() - full).abs().mean() < 0.05 * full.abs().mean()


class Whole(nn.Module):
    def __init__(self, trunk: Trunk, adapter: ViTAdapter) -> None:
        super().__init__()
        self.trunk, self.adapter = trunk, adapter

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = self.adapter(self.trunk, images)
        return maps


@pytest.mark.slow
def test_export() -> None:
    model = Whole(*built(window_size=3, global_blocks=[1])).eval()
    images = torch.randn(2, 3, 64, 96)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    other = torch.randn(3, 3, 64, 96)
    for found, expected in zip(exported.module()(other), model(other), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["mask_rcnn", "upernet"])
def test_a_whole_model_learns(head: str) -> None:
    options = {"anchor_sizes": [8, 16, 32, 64]} if head == "mask_rcnn" else {}
    model = model_of(head, adapter=[ADAPTER], backbone=TRUNK, **options)
    assert not [name for name, _ in model.backbone.named_parameters() if name.startswith("vit.norm.")]
    batch = batch_of(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        value = loss_of(model(**batch))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0]
