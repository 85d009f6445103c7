"""Tiny files of transformers' vision models: their names and shapes, and what transformers computes with them.

``python tests/transformers_table.py`` wrote transformers_table.json beside it, with transformers 5.24, which the
tests do not need: the values of a tensor are a function of its name and shape (:func:`values`), so that the table holds
names, shapes and the expected patch tokens alone.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TABLE = Path(__file__).with_suffix(".json")
SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of the tensor of this name."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.3
    return torch.from_numpy(np.asarray(drawn, dtype="f4"))


def picture() -> Tensor:
    """An image (1, 3, 8, 8)."""
    return values("picture", (1, 3, 8, 8)) * 3


def clip() -> Tensor:
    """A clip (1, 3, 4, 8, 8)."""
    return values("clip", (1, 3, 4, 8, 8)) * 3


def main() -> None:
    import tempfile

    import transformers as hf
    from safetensors.torch import load_file

    ratio = {name: size for name, size in SIZES.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
    video = SIZES | {"num_frames": 4, "tubelet_size": 2}
    text = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    beit = SIZES | {"vocab_size": 10}
    clip_text, siglip_text = text | {"hidden_size": 4}, text | {"hidden_size": 8}
    models: dict[str, tuple[Any, Any]] = {  # the model in the file, the class that computes the tokens
        "vit": (hf.ViTModel(hf.ViTConfig(**SIZES)), hf.ViTModel),
        "vit classifier": (hf.ViTForImageClassification(hf.ViTConfig(**SIZES)), hf.ViTModel),
        "deit": (hf.DeiTModel(hf.DeiTConfig(**SIZES)), hf.DeiTModel),
        "mae": (hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SIZES, decoder_hidden_size=4,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=8)), hf.ViTModel),
        "dinov2": (hf.Dinov2Model(hf.Dinov2Config(**ratio)), hf.Dinov2Model),
        "dinov2 swiglu": (hf.Dinov2Model(hf.Dinov2Config(**ratio, use_swiglu_ffn=True)), hf.Dinov2Model),
        "dinov2 registers": (hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**ratio,
            num_register_tokens=4)), hf.Dinov2WithRegistersModel),
        "dinov3": (hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES, num_register_tokens=4)), hf.DINOv3ViTModel),
        "dinov3 gated": (hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES, num_register_tokens=4, use_gated_mlp=True,
            hidden_act="silu")), hf.DINOv3ViTModel),
        "clip": (hf.CLIPModel(hf.CLIPConfig(vision_config=SIZES, text_config=clip_text)), hf.CLIPVisionModel),
        "clip vision": (hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)), hf.CLIPVisionModel),
        "siglip": (hf.SiglipModel(hf.SiglipConfig(vision_config=SIZES, text_config=siglip_text)), hf.SiglipVisionModel),
        "videomae classifier": (hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**video)), hf.VideoMAEModel),
        "videomae": (hf.VideoMAEForPreTraining(hf.VideoMAEConfig(**video, decoder_hidden_size=4,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=8)),
            hf.VideoMAEModel),
        "beit": (hf.BeitForImageClassification(hf.BeitConfig(**beit, use_relative_position_bias=True)), hf.BeitModel),
        "data2vec": (hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**beit,
            use_shared_relative_position_bias=True)), hf.Data2VecVisionModel),
        "ijepa": (hf.IJepaModel(hf.IJepaConfig(**SIZES)), hf.IJepaModel),
    }  # fmt: skip
    table = {}
    for case, (model, reader) in models.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            file = Path(folder) / "model.safetensors"
            shapes = {name: list(value.shape) for name, value in load_file(file).items()}
            from safetensors.torch import save_file

            save_file({name: values(name, tuple(shape)) for name, shape in shapes.items()}, file, {"format": "pt"})
            options = {"use_mean_pooling": True} if "videomae" in case else {}
            computes = reader.from_pretrained(folder, **options).eval()
            if "videomae" in case:
                tokens = computes(pixel_values=clip().transpose(1, 2)).last_hidden_state
            else:
                tokens = computes(pixel_values=picture()).last_hidden_state[:, -4:]
            if "clip" in case and "siglip" not in case:
                tokens = computes.post_layernorm(tokens)
        table[case] = {"shapes": shapes, "tokens": [round(value, 5) for value in tokens.flatten().tolist()]}
    TABLE.write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
