"""BitFit and the report of what is trained."""

from __future__ import annotations

import pytest
import torch
from model_samples import Stub, batch_of, loss_of, model_of
from pydantic import ValidationError
from torch import nn

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.adapters import AdaptFormerConfig, BitFitConfig
from vitgraft.configs.schema.backbones import VideoMAEConfig
from vitgraft.configs.schema.heads import ClassifierConfig
from vitgraft.models.adapters.adaptformer import graft_adaptformer
from vitgraft.models.adapters.bitfit import graft_bitfit
from vitgraft.models.backbones.videomae import VideoMAE
from vitgraft.models.build import GraftedModel, parameter_counts
from vitgraft.models.heads.classifier import Classifier
from vitgraft.models.tuning import tuning_report

BITFIT = [{"name": "bitfit"}]


def test_biases_train_and_nothing_is_added() -> None:
    plain = model_of("video_transformer")
    model = model_of("video_transformer", adapter=BITFIT, backbone={"frozen": True, "drop_path": 0.9}).train()
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not model.backbone.blocks[0].mlp.training
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model(**batch_of("video_transformer"))).backward()
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.backbone.named_parameters() if name.endswith("bias")}
    assert {"vit.patch_embed.proj.bias", "vit.norm.bias", "vit.blocks.1.attn.qkv.bias"} < trained
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_biases_that_stand_alone() -> None:
    with torch.device("meta"):
        trunk = VideoMAE(VideoMAEConfig(frozen=True), image_size=(224, 224))
        graft_bitfit(BitFitConfig(), trunk=trunk)
    block = 2 * 768 + 2 * 768 + 768 + 3072 + 768
    assert parameter_counts(trunk)[0] == 12 * block + 768


def test_tables_are_not_biases() -> None:
    block = nn.Linear(2, 2)
    block.relative_position_bias_table = nn.Parameter(torch.zeros(3))
    trunk = Stub(block, embed_dim=2)
    trunk.frozen = True
    trunk.freeze()
    graft_bitfit(BitFitConfig(), trunk=trunk)
    assert [name for name, p in trunk.named_parameters() if p.requires_grad] == ["stack.0.bias"]


def test_refusals() -> None:
    with pytest.raises(ValidationError, match=r"biases of a frozen trunk; set backbone\.frozen: true"):
        model_of("video_transformer", adapter=BITFIT)
    with pytest.raises(ConfigError, match=r"set model\.backbone\.frozen: true"):
        graft_bitfit(BitFitConfig(), trunk=Stub(embed_dim=2))
    trunk = Stub(nn.Linear(2, 2, bias=False), embed_dim=2)
    trunk.frozen = True
    with pytest.raises(ConfigError, match="this trunk has no biases"):
        graft_bitfit(BitFitConfig(), trunk=trunk)


# -- the report ------------------------------------------------------------------------------------------------------


def test_the_report_of_the_papers_video_run() -> None:
    with torch.device("meta"):
        trunk = VideoMAE(VideoMAEConfig(frozen=True), image_size=(224, 224))
        graft_adaptformer(AdaptFormerConfig(), trunk=trunk)
        head = Classifier(ClassifierConfig(batch_norm=True), channels=trunk.channels, num_classes=174)
    model = GraftedModel(trunk, nn.Module(), None, head)  # type: ignore[arg-type]
    assert tuning_report(model) == (
        "1,324,974 of 87,550,638 parameters are trained (1.51%): trunk 0 of 86,225,664, "
        "adaptformer 1,189,632 of 1,189,632, head 135,342 of 135,342"
    )


def test_every_part_is_reported_once() -> None:
    grafts = [{"name": "lora"}, {"name": "vpt", "depth": "shallow"}, {"name": "adaptformer", "bottleneck": 2}, *BITFIT]
    model = model_of("video_transformer", adapter=grafts, backbone={"frozen": True})
    report = tuning_report(model)
    trained, total = parameter_counts(model)
    assert report.startswith(f"{trained:,} of {total:,} parameters are trained")
    parts = [part.split() for part in report.partition(": ")[2].split(", ")]
    assert sorted(part[0] for part in parts) == ["adaptformer", "head", "lora", "trunk", "vpt"]
    assert sum(int(part[1].replace(",", "")) for part in parts) == trained
    assert sum(int(part[3].replace(",", "")) for part in parts) == total
    full = model_of("upernet")
    trunk = sum(p.numel() for p in full.backbone.parameters())
    assert f": trunk {trunk:,} of {trunk:,}, adapter " in tuning_report(full)
