"""VideoMAE's video ViT: official numbers, positions, clips of any size, visits, freezing, files in three layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adaptformer_cases import compare
from model_samples import CLASSES, loss_of
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitgraft.configs.errors import CheckpointError, ConfigError
from vitgraft.configs.schema.adapters import NoAdapterConfig
from vitgraft.configs.schema.backbones import VideoMAEConfig
from vitgraft.configs.schema.heads import ClassifierConfig
from vitgraft.configs.schema.model import ModelConfig
from vitgraft.models.adapters.base import Adapter
from vitgraft.models.adapters.none import NoAdapter
from vitgraft.models.backbones.videomae import VideoMAE, positions
from vitgraft.models.build import build_model
from vitgraft.models.heads.classifier import Classifier

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8}


def trunk(**options: Any) -> VideoMAE:
    torch.manual_seed(0)
    return VideoMAE(VideoMAEConfig(**(SIZES | options)), image_size=(32, 32))


def test_parity_with_the_official_model(test_data: Path) -> None:
    compare(test_data, "adaptformer_video")


def test_the_papers_parameters() -> None:
    with torch.device("meta"):
        video = VideoMAE(VideoMAEConfig(), image_size=(224, 224))
        head = Classifier(ClassifierConfig(), channels=video.channels, num_classes=174)
    parameters = [sum(p.numel() for p in module.parameters()) for module in (video, head.fc_norm, head)]
    assert parameters[0] + parameters[1] == 86_227_200
    assert parameters[0] + parameters[2] == 86_361_006


def test_positions_are_sinusoids_of_the_flat_index() -> None:
    table = positions(7, 6, torch.device("cpu"))
    assert table.shape == (7, 6)
    assert table.dtype == torch.float32
    for index in range(7):
        for channel in range(6):
            angle = torch.tensor(index / 10000 ** (2 * (channel // 2) / 6))
            expected = angle.sin() if channel % 2 == 0 else angle.cos()
            torch.testing.assert_close(table[index, channel], expected)
    assert torch.equal(positions(1568, 24, torch.device("cpu"))[:784], positions(784, 24, torch.device("cpu")))
    assert not any("pos" in name for name in trunk().state_dict())


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 32, 32), (6, 32, 48), (8, 16, 8)])
def test_clips_of_any_size(frames: int, height: int, width: int) -> None:
    video = trunk()
    (features,) = video(torch.randn(2, 3, frames, height, width))
    assert features.shape == (2, frames // 2, 24, height // 8, width // 8)
    assert video.channels == {8: 24}
    features.square().sum().backward()
    assert [name for name, p in video.named_parameters() if p.grad is None] == []


def test_the_map_keeps_the_order_time_row_column() -> None:
    video = trunk(depth=1).eval()
    clips = torch.randn(1, 3, 4, 16, 24)
    tokens = video.tokens(clips)
    (features,) = video(clips)
    assert torch.equal(features[0, 1, :, 1, 2], tokens[0, 1 * 6 + 1 * 3 + 2])
    patch = clips[0, :, 2:4, 8:16, 16:24]
    first = (video.patch_embed.proj.weight * patch).sum((1, 2, 3, 4)) + video.patch_embed.proj.bias
    expected = first + positions(12, 24, torch.device("cpu"))[11]
    torch.testing.assert_close(video.embed(clips)[0, 11], expected, rtol=1e-4, atol=1e-4)


def test_attention_is_that_of_the_paper() -> None:
    attention = trunk().blocks[0].attn
    nn.init.normal_(attention.q_bias)
    nn.init.normal_(attention.v_bias)
    x = torch.randn(2, 5, 24)
    parts = (x @ attention.qkv.weight.T).chunk(3, -1)
    q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in parts)
    q = (q + attention.q_bias.view(3, 1, 8)) * 8**-0.5
    expected = (q @ k.transpose(2, 3)).softmax(-1) @ (v + attention.v_bias.view(3, 1, 8))
    expected = attention.proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_other_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads clips \(B, 3, T, H, W\), not an input of shape \(1, 3, 32, 32\)"):
        trunk()(torch.randn(1, 3, 32, 32))
    with pytest.raises(ConfigError, match=r"5 frames are no multiple of the 2 .* use e\.g\. 6"):
        trunk()(torch.randn(1, 3, 5, 32, 32))
    with pytest.raises(ConfigError, match="multiples of the trunk's patch size 8"):
        trunk()(torch.randn(1, 3, 4, 36, 32))
    with pytest.raises(ValidationError, match="embed_dim 25 must be a multiple of num_heads 3"):
        VideoMAEConfig(**(SIZES | {"embed_dim": 25}))


def test_an_adapter_pads_clips_and_crops_maps() -> None:
    video = trunk()
    adapter: Adapter = NoAdapter(NoAdapterConfig(), trunk=video)
    maps = adapter.maps(video, torch.randn(1, 3, 4, 30, 41))
    assert maps[8].shape == (1, 2, 24, 4, 6)


def test_a_visit_sees_every_tubelet_as_an_image() -> None:
    video = trunk().eval()
    clips = torch.randn(2, 3, 6, 16, 24)
    seen: list[tuple[int, torch.Size]] = []

    def visit(index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        assert grid == (2, 3)
        seen.append((index, tokens.shape))
        return tokens

    assert torch.equal(video(clips, visit)[0], video(clips)[0])
    assert seen == [(index, torch.Size([6, 6, 24])) for index in range(4)]

    def mark(index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens + torch.arange(6.0).view(6, 1, 1) if index == 3 else tokens

    moved = video(clips, mark)[0] - video(clips)[0]
    torch.testing.assert_close(moved.mean((2, 3, 4)), torch.arange(6.0).view(2, 3))


def test_drop_path_grows_with_depth() -> None:
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in trunk(drop_path=0.4).blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_a_frozen_trunk_trains_its_grafts_only() -> None:
    backbone = {"name": "videomae", **SIZES, "frozen": True, "drop_path": 0.9}
    adapter = [{"name": "adaptformer", "bottleneck": 4, "dropout": 0.5}]
    config = ModelConfig.model_validate({"backbone": backbone, "adapter": adapter, "head": {"name": "classifier"}})
    model = build_model(config, num_classes=CLASSES, image_size=(32, 32)).train()
    assert not model.backbone.blocks[0].mlp.training
    assert model.backbone.blocks[0].adaptmlp.training
    batch = {"sizes": torch.tensor([[32, 32]] * 2), "targets": torch.tensor([1, 2])}
    with torch.autocast("cpu", torch.bfloat16):
        losses: Any = model(torch.randn(2, 3, 4, 32, 32), **batch)
    loss_of(losses).backward()
    for name, parameter in model.named_parameters():
        trained = ".adaptmlp." in name or name.startswith("head.")
        assert (parameter.grad is not None) == parameter.requires_grad == trained, name


def test_bfloat16_parameters() -> None:
    video = trunk().to(torch.bfloat16)
    (features,) = video(torch.randn(1, 3, 4, 32, 32, dtype=torch.bfloat16))
    assert features.dtype == torch.bfloat16
    assert torch.isfinite(features.float()).all()


@pytest.mark.parametrize("head", ["classifier", "video_transformer"])
def test_heads_for_clips_read_it(head: str) -> None:
    config = ModelConfig.model_validate({"backbone": {"name": "videomae", **SIZES}, "head": {"name": head}})
    model = build_model(config, num_classes=CLASSES, image_size=(32, 32)).eval()
    logits: Any = model(torch.randn(2, 3, 4, 32, 40), torch.tensor([[32, 40]] * 2))
    assert logits.shape == (2, CLASSES)


def test_heads_for_images_are_refused() -> None:
    backbone = {"name": "videomae", **SIZES}
    adapter = {"name": "simple_pyramid"}
    with pytest.raises(ValidationError, match="backbone videomae reads clips, head upernet images; change one"):
        ModelConfig.model_validate({"backbone": backbone, "adapter": adapter, "head": {"name": "upernet"}})


# -- files -----------------------------------------------------------------------------------------------------------


def fine_tuned() -> dict[str, Tensor]:
    """VideoMAE's fine-tuned layout, which is ours, with a classifier."""
    torch.manual_seed(5)
    state = {name: torch.randn_like(value) for name, value in trunk().state_dict().items()}
    return state | {
        "fc_norm.weight": torch.randn(24),
        "fc_norm.bias": torch.randn(24),
        "head.weight": torch.ones(7, 24),
    }


def adaptformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in AdaptFormer's layout."""
    split = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.weight"):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                split[name.replace("qkv", f"{letter}_proj")] = part.contiguous()
        else:
            split[name.replace(".mlp.", ".")] = value
    return split


def pretrained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as VideoMAE's pre-training writes it."""
    encoder = {f"encoder.{name}": value for name, value in state.items() if not name.startswith(("head", "fc_norm"))}
    decoder = {"decoder.blocks.0.attn.qkv.weight": torch.ones(3), "encoder_to_decoder.weight": torch.ones(2)}
    return encoder | decoder | {"encoder.norm.weight": torch.ones(24), "mask_token": torch.ones(1)}


@pytest.mark.parametrize("layout", [dict, adaptformer, pretrained])
def test_official_files(layout: Any, tmp_path: Path) -> None:
    state = fine_tuned()
    save_file(layout(state), tmp_path / "weights.safetensors")
    video = trunk(weights=str(tmp_path / "weights.safetensors"))
    for name, value in video.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_another_depth_is_refused(tmp_path: Path) -> None:
    save_file(fine_tuned(), tmp_path / "weights.safetensors")
    for depth in (2, 4):
        with pytest.raises(CheckpointError, match=r"blocks\.[23]\."):
            trunk(weights=str(tmp_path / "weights.safetensors"), depth=depth)
