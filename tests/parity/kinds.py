"""Every kind of case: the official constructor's arguments as sections of a recipe, and the forward pass.

An argument that is not translated fails the case; nothing is ignored but what has no influence on loaded weights in
evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from parity.cases import Built, Case, NotBuilt, Options, build_adapter, build_trunk, graft
from pydantic import TypeAdapter
from torch import Tensor, nn

from vitgraft.configs.schema.heads import HeadConfig
from vitgraft.models import registry
from vitgraft.models.backbones.mimdet import MIMDet
from vitgraft.models.backbones.trunk import Trunk
from vitgraft.models.ops.deformable import MSDeformAttn, deformable_attention


def build_case(case: Case) -> Built:
    """The model for a case. Raises ``NotBuilt`` for the kinds that have none here, ``AssertionError`` for a kind that
    is unknown though its repository is not."""
    repo = case.meta["source"]["repo"]
    if repo == "raoyongming/DenseCLIP":
        raise NotBuilt("DenseCLIP's encoders and CLIP's tokens are not built here yet")
    kinds = _KINDS.get(repo)
    if kinds is None:
        raise NotBuilt(f"nothing of {repo} is built here")
    what = case.meta.get("cls") or case.meta.get("fn")
    builder = kinds.get(what)
    assert builder is not None, f"{case.name}: {repo} has no {what!r} here; known: {sorted(kinds)}"
    return builder(case)


# -- ViT-Adapter -----------------------------------------------------------------------------------------------------


def _vit_adapter(case: Case) -> Built:
    options = case.options("constructor")
    sections = _adapter_section(options, stages=_segmentation(case))
    depth = options.take("depth", 12)
    windows = _windows(options, depth)
    side = options.take("pretrain_size", 224)
    assert options.take("img_size", 224) == side, f"{case.name}: img_size differs from pretrain_size"
    backbone: dict[str, Any] = {
        "name": "vit",
        "embed_dim": options.take("embed_dim", 768),
        "depth": depth,
        "num_heads": options.take("num_heads", 12),
        "patch_size": options.take("patch_size", 16),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "layer_scale": 1.0 if options.take("layer_scale", True) else None,
    }
    if any(windows):
        backbone["window_size"] = [size or 14 for size in windows]
        backbone["global_blocks"] = [index for index, size in enumerate(windows) if not size]
    backbone["qkv_bias"] = options.take("qkv_bias", True)
    options.expect(in_chans=3)
    _without_influence(options)
    return _pyramid_of(backbone, side, sections)


def _beit_adapter(case: Case) -> Built:
    options = case.options("constructor")
    segmentation = _segmentation(case)
    stages = options.take("version", "new") == "old" or segmentation
    scale = options.take("init_values")
    sections = _adapter_section(options, stages=stages)
    depth = options.take("depth", 12)
    side = options.take("img_size", 224)
    assert options.take("pretrain_size", side) == side, f"{case.name}: img_size differs from pretrain_size"
    options.take("use_shared_rel_pos_bias", False)  # one table for all blocks: the loader gives each its own
    backbone = {
        "name": "beit",
        "embed_dim": options.take("embed_dim", 768),
        "depth": depth,
        "num_heads": options.take("num_heads", 12),
        "patch_size": options.take("patch_size", 16),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "class_token": segmentation,
        "relative_bias": any(name.endswith("relative_position_bias_table") for name in case.state),
        "absolute_positions": options.take("use_abs_pos_emb", False),
        "qkv_bias": options.take("qkv_bias", False),
        "layer_scale": scale if "blocks.0.gamma_1" in case.state else None,
        "window_size": _windows(options, depth),
        "pretrain_size": side,
    }
    options.drop("use_rel_pos_bias", "inj_init_values")
    options.expect(in_chans=3)
    _without_influence(options)
    return _pyramid_of(backbone, side, sections)


def _uniperceiver_adapter(case: Case) -> Built:
    options = case.options("constructor")
    sections = _adapter_section(options, stages=_segmentation(case)) | {"layer_norm_eps": 1e-5}
    depth = options.take("depth", 12)
    side = options.take("pretrain_size", 224)
    options.drop("img_size")
    backbone = {
        "name": "uniperceiver",
        "embed_dim": options.take("embed_dim", 768),
        "depth": depth,
        "num_heads": options.take("num_heads", 12),
        "patch_size": options.take("patch_size", 16),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "layer_scale": 0.0 if "layers.0.gamma_1" in case.state else None,
        "window_size": _windows(options, depth),
        "pretrain_size": side,
    }
    options.drop("layer_scale")
    options.expect(in_chans=3, qkv_bias=True)
    _without_influence(options)
    return _pyramid_of(backbone, side, sections)


def _adapter_section(options: Options, *, stages: bool) -> dict[str, Any]:
    return {
        "name": "vit_adapter",
        "conv_inplane": options.take("conv_inplane", 64),
        "n_points": options.take("n_points", 4),
        "deform_num_heads": options.take("deform_num_heads", 6),
        "deform_ratio": options.take("deform_ratio", 1.0),
        "interaction_indexes": options.take("interaction_indexes"),
        "with_cffn": options.take("with_cffn", True),
        "cffn_ratio": options.take("cffn_ratio", 0.25),
        "add_vit_feature": options.take("add_vit_feature", True),
        "use_extra_extractor": options.take("use_extra_extractor", True),
        "fusion": "stages" if stages else "last",
        "norm": "bn",
    }


def _pyramid_of(backbone: dict[str, Any], side: int, sections: dict[str, Any]) -> Built:
    trunk = build_trunk(backbone, side)
    adapter = build_adapter(sections, trunk)

    def forward(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"f{index + 1}": level_map for index, level_map in enumerate(adapter(trunk, inputs["x"]))}

    return Built({"backbone": trunk, "adapter": adapter}, forward)


def _segmentation(case: Case) -> bool:
    return any(re.search(r"(^|/)seg(mentation)?/", file) for file in case.meta["source"]["files"])


def _windows(options: Options, depth: int) -> list[int]:
    """The window of each block, 0 for a global one."""
    windowed, sizes = options.take("window_attn", False), options.take("window_size", 14)
    windowed = [windowed] * depth if isinstance(windowed, bool) else windowed
    sizes = [sizes] * depth if isinstance(sizes, int) else sizes
    return [size if inside else 0 for inside, size in zip(windowed, sizes, strict=True)]


def _without_influence(options: Options) -> None:
    options.drop("drop_rate", "attn_drop_rate", "drop_path_rate", "drop_path", "init_values", "init_scale", "with_cp")
    options.drop("num_classes", "pretrained", "use_act_checkpoint", "use_checkpoint")
    options.done()


# -- AdaptFormer -----------------------------------------------------------------------------------------------------


def _adaptformer_image(case: Case) -> Built:
    options = case.options("constructor")
    pooled = options.take("global_pool", False)
    classes = options.take("num_classes", 1000)
    backbone = {
        "name": "vit",
        "embed_dim": options.take("embed_dim", 768),
        "depth": options.take("depth", 12),
        "num_heads": options.take("num_heads", 12),
        "patch_size": options.take("patch_size", 16),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "class_token": True,
        "qkv_bias": options.take("qkv_bias", True),
    }
    options.expect(in_chans=3, representation_size=None, distilled=False)
    trunk = build_trunk(backbone, options.take("img_size", 224))
    _without_influence(options)
    _tune(case, trunk)
    if pooled:
        trunk.without_final_norm()
        return _classified(trunk, _classifier(trunk, classes))
    head = nn.ModuleDict({"head": nn.Linear(trunk.embed_dim, classes)})

    def of_class_token(tokens: Tensor) -> dict[str, Tensor]:
        return {"pre_logits": tokens[:, 0], "logits": head["head"](tokens[:, 0])}

    return _with_hooks(trunk, head, lambda x: of_class_token(trunk.tokens(x)))


def _adaptformer_video(case: Case) -> Built:
    options = case.options("constructor")
    classes = options.take("num_classes", 1000)
    backbone = {
        "name": "videomae",
        "embed_dim": options.take("embed_dim", 768),
        "depth": options.take("depth", 12),
        "num_heads": options.take("num_heads", 12),
        "patch_size": options.take("patch_size", 16),
        "tubelet_size": options.take("tubelet_size", 2),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "qkv_bias": options.take("qkv_bias", False),
    }
    options.expect(in_chans=3, qk_scale=None, use_learnable_pos_emb=False, use_mean_pooling=True)
    options.drop("all_frames")  # positions are computed for any number of frames
    trunk = build_trunk(backbone, options.take("img_size", 224))
    _without_influence(options)
    _tune(case, trunk)
    return _classified(trunk, _classifier(trunk, classes))


def _tune(case: Case, trunk: Trunk) -> None:
    """Graft what the case's ``tuning_config`` says."""
    options = case.options("tuning_config")
    width = options.take("d_model", trunk.embed_dim)
    assert width == trunk.embed_dim, f"{case.name}: bottlenecks of width {width} on a trunk of {trunk.embed_dim}"
    scale = options.take("ffn_adapter_scalar", "0.1")
    section = {
        "name": "adaptformer",
        "bottleneck": options.take("ffn_num", 64),
        "layout": options.take("ffn_option", "parallel"),
        "layernorm": options.take("ffn_adapter_layernorm_option", "none"),
        "scale": "learnable" if scale == "learnable_scalar" else float(scale),
    }
    prompts = {"name": "vpt", "prompts": options.take("vpt_num", 1)}
    options.drop("ffn_adapter_init_option")
    if options.take("ffn_adapt", True):
        graft(section, trunk)
    if options.take("vpt_on", False):
        graft(prompts, trunk)
    options.done()


def _classifier(trunk: Trunk, classes: int) -> nn.Module:
    config: Any = TypeAdapter(HeadConfig).validate_python({"name": "classifier"})
    head: nn.Module = registry.build("head", config, channels=trunk.channels, num_classes=classes)
    return head


def _classified(trunk: Trunk, head: nn.Module) -> Built:
    """The mean of all patches, normed and classified."""

    def forward(x: Tensor) -> dict[str, Tensor]:
        (level_map,) = trunk(x)
        clip = level_map if level_map.ndim == 5 else level_map[:, None]
        normed: list[Tensor] = []
        hook = head.get_submodule("fc_norm").register_forward_hook(lambda *args: normed.append(args[2]))
        logits = head({trunk.patch_size: clip}, torch.tensor([x.shape[-2:]] * len(x)), tuple(x.shape[-2:]))
        hook.remove()
        return {"logits": logits, "pre_logits": normed[0]}

    return _with_hooks(trunk, head, forward)


def _with_hooks(trunk: Trunk, head: nn.Module, outputs: Callable[[Tensor], dict[str, Tensor]]) -> Built:
    """Adds what the first and the last block return, prompts included: they are cut off after the block."""

    def forward(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        hooks = [
            trunk.blocks[index].register_forward_hook(
                lambda *args, name=name: seen.update({name: args[2]}), prepend=True
            )
            for name, index in (("tokens_block0", 0), ("tokens_last", -1))
        ]
        result = outputs(inputs["x"])
        for hook in hooks:
            hook.remove()
        return result | seen

    return Built({"backbone": trunk, "head": head}, forward)


# -- MIMDet ----------------------------------------------------------------------------------------------------------


def _mimdet(case: Case) -> Built:
    encoder, decoder = case.options("encoder"), case.options("decoder")
    ratio = case.meta["sample_ratio_partial"]
    width, side = encoder.take("embed_dim", 768), encoder.take("img_size", 800)
    assert (decoder.take("embed_dim", width), decoder.take("img_size", side)) == (width, side), case.name
    eps = [re.search(r"eps=([\de.-]+)", case.meta[f"{which}_norm"]) for which in ("encoder", "decoder")]
    assert eps[0] is not None, f"{case.name}: {case.meta['encoder_norm']}"
    assert eps[1] is not None, f"{case.name}: {case.meta['decoder_norm']}"
    assert float(eps[1][1]) == 1e-5, f"{case.name}: {case.meta['decoder_norm']}"
    backbone = {
        "name": "mimdet",
        "embed_dim": width,
        "depth": encoder.take("depth", 12),
        "num_heads": encoder.take("num_heads", 12),
        "mlp_ratio": encoder.take("mlp_ratio", 4.0),
        "norm_eps": float(eps[0][1]),
        "decoder_dim": decoder.take("decoder_embed_dim", 512),
        "decoder_depth": decoder.take("depth", 4),
        "decoder_heads": decoder.take("num_heads", 16),
        "decoder_mlp_ratio": decoder.take("mlp_ratio", 4.0),
        "table_size": side,
        "sample_ratio": ratio,
    }
    for options in (encoder, decoder):
        options.expect(patch_size=16, in_chans=3)
        options.drop("dpr")
        _without_influence(options)
    trunk = build_trunk(backbone, side)
    assert isinstance(trunk, MIMDet)
    names = ("c2", "c3", "c4", "c5")

    def forward(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        full = dict(zip((f"full_{name}" for name in names), trunk(x), strict=True))
        encoded = trunk.encode(x, case.extra["noise"], torch.tensor(case.meta["image_sizes"]))
        maps = trunk.decode(encoded, trunk.grid_of(x))
        part = dict(zip((f"part_{name}" for name in names), maps, strict=True))
        kept = case.extra["ids_keep_part"]
        assert torch.equal(encoded.order[:, : kept.shape[1]], kept), "other places are encoded"
        return full | part | {"latent_part": encoded.latent}

    return Built({"backbone": trunk}, forward)


# -- EVA and ViTDet --------------------------------------------------------------------------------------------------


def _eva01(case: Case) -> Built:
    options = case.options("vit")
    backbone = _windowed_section(options, "eva01")
    bias, beit_bias = options.take("qkv_bias", True), options.take("beit_like_qkv_bias", False)
    rule = {"vitdet": "linear", "beit": "geometric"}[options.take("interp_type", "vitdet")]
    options.take("beit_like_gamma", False)
    backbone |= {
        "qkv_bias": "none" if not bias else "beit" if beit_bias else "full",
        "layer_scale": 1.0 if "net.blocks.0.gamma_1" in case.state else None,
        "rel_pos": rule if options.take("use_rel_pos", False) else "none",
        "residual_blocks": options.take("residual_block_indexes", []),
        "norm_eps": 1e-5 if "EVA" in case.meta["source"]["repo"] else 1e-6,
    }
    return _simple_pyramid_of(case, backbone, options)


def _eva02(case: Case) -> Built:
    options = case.options("vit")
    backbone = _windowed_section(options, "eva02")
    backbone |= {
        "rope_grid": options.take("pt_hw_seq_len", 16),
        "sub_ln": "net.blocks.0.mlp.ffn_ln.weight" in case.state,
    }
    backbone["residual_blocks"] = options.take("residual_block_indexes", [])
    options.expect(qkv_bias=True, use_rel_pos=False, rope=True)
    # Without intp_freq the tables fit only the grid that they were trained on, where they are the same.
    options.drop("intp_freq")
    options.drop("xattn", "subln", "swiglu", "naiveswiglu")  # ways to the same numbers, or told by the names
    return _simple_pyramid_of(case, backbone, options)


def _windowed_section(options: Options, name: str) -> dict[str, Any]:
    depth = options.take("depth", 12)
    windowed = options.take("window_block_indexes", [])
    window = options.take("window_size", 0)
    positions = options.take("use_abs_pos", True)
    options.expect(in_chans=3)
    options.drop("pretrain_use_cls_token")  # whether the table has its row, which is not used: the loader sees it
    return {
        "name": name,
        "embed_dim": options.take("embed_dim", 768),
        "depth": depth,
        "num_heads": options.take("num_heads", 12),
        "patch_size": options.take("patch_size", 16),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "window_size": window,
        "global_blocks": [index for index in range(depth) if index not in windowed],
        "pretrain_size": options.take("pretrain_img_size", 224),
        "absolute_positions": positions,
    }


def _simple_pyramid_of(case: Case, backbone: dict[str, Any], options: Options) -> Built:
    side = options.take("img_size", 1024)
    options.drop("out_feature", "rel_pos_zero_init")
    _without_influence(options)
    pyramid = case.options("pyramid")
    top = pyramid.take("top_block")
    assert top is None or top.startswith("LastLevelMaxPool"), f"{case.name}: top_block {top!r}"
    section = {
        "name": "simple_pyramid",
        "channels": pyramid.take("out_channels", 256),
        "strides": [int(backbone["patch_size"] / factor) for factor in pyramid.take("scale_factors")],
        "norm": {"LN": "ln", "BN": "bn", "SyncBN": "syncbn"}[pyramid.take("norm", "LN")],
        "top_block": top is not None,
    }
    pyramid.expect(in_feature="last_feat", square_pad=0)
    pyramid.done()
    trunk = build_trunk(backbone, side)
    adapter = build_adapter(section, trunk)

    def forward(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features: list[Tensor] = []
        hook = trunk.register_forward_hook(lambda *args: features.append(args[2][0]))
        maps = adapter(trunk, inputs["x"])
        hook.remove()
        named = {f"p{stride.bit_length() - 1}": found for stride, found in zip(adapter.strides, maps, strict=True)}
        return named | {"last_feat": features[0]}

    return Built({"backbone": trunk, "adapter": adapter}, forward)


# -- Deformable attention --------------------------------------------------------------------------------------------


def _deformable_module(case: Case) -> Built:
    options = case.options("constructor")
    module = MSDeformAttn(
        options.take("d_model", 256),
        levels=options.take("n_levels", 4),
        heads=options.take("n_heads", 8),
        points=options.take("n_points", 4),
        ratio=options.take("ratio", 1.0),
    )
    options.done()

    def forward(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        query, features, shapes = inputs["query"], inputs["input_flatten"], _levels(inputs["spatial_shapes"])
        outputs = {}
        for name in case.outputs:
            references = inputs[f"reference_points{name.removeprefix('ref')[0]}"]
            mask = inputs["padding_mask"] if name.endswith("_mask") else None
            outputs[name] = module(query, references, features, shapes, mask)
        return outputs

    return Built(
        {"backbone": module},
        forward,
        inputs=("query", "input_flatten"),
        loss=lambda outputs: outputs["ref2"].square().mean(),
    )


def _deformable_op(case: Case) -> Built:
    def forward(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels = _levels(inputs["value_spatial_shapes"])
        locations, weights = inputs["sampling_locations"], inputs["attention_weights"]
        return {"output": deformable_attention(inputs["value"], levels, locations, weights)}

    return Built(
        {},
        forward,
        inputs=("value", "sampling_locations", "attention_weights"),
        loss=lambda outputs: (outputs["output"] * case.extra["grad_output"]).sum(),
        # The first three queries lie exactly on borders and centres, where this gradient is one-sided.
        left_out={"sampling_locations": lambda gradient: gradient[:, 3:]},
    )


def _levels(shapes: Tensor) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in shapes]


_DEFORMABLE: dict[str, Callable[[Case], Built]] = {
    "MSDeformAttn": _deformable_module,
    "ms_deform_attn_core_pytorch": _deformable_op,
}
_KINDS: dict[str, dict[str, Callable[[Case], Built]]] = {
    "czczup/ViT-Adapter": {
        "ViTAdapter": _vit_adapter,
        "BEiTAdapter": _beit_adapter,
        "UniPerceiverAdapter": _uniperceiver_adapter,
        **_DEFORMABLE,
    },
    "ShoufaChen/AdaptFormer": {
        "VisionTransformer (vit_image)": _adaptformer_image,
        "VisionTransformer (vit_video)": _adaptformer_video,
    },
    "hustvl/MIMDet": {"MIMDetBackbone(MIMDetEncoder, MIMDetDecoder)": _mimdet},
    "baaivision/EVA": {
        "SimpleFeaturePyramid(ViT)": lambda case: (
            _eva02(case) if any(file.startswith("EVA-02") for file in case.meta["source"]["files"]) else _eva01(case)
        ),
        "BEiTAdapter": _beit_adapter,
    },
    "facebookresearch/detectron2": {"SimpleFeaturePyramid(ViT)": _eva01},
    "fundamentalvision/Deformable-DETR": _DEFORMABLE,
}
