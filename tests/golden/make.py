"""Makes a golden checkpoint: a real run of two ranks, of which only what a reader needs is kept.

    .venv/bin/python tests/golden/make.py tests/golden/checkpoint-2

A golden checkpoint is never made again: it stands for what a version of vitgraft wrote, and every later one must load
it (tests/trainer/test_golden.py). Make another one, under the next number, when the format gains something.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import succeed, tiny_recipe, train, write_recipe

from vitgraft.trainer.checkpoint.read import Checkpoint, VectorReader, open_checkpoint

STEP = 3
SETTINGS: dict[str, Any] = {
    "name": "golden",
    "model__backbone": {
        "name": "vit",
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 8,
        "mlp_ratio": 1.0,
        "frozen": True,
    },
    "model__adapter": {"name": "simple_pyramid", "channels": 4, "strides": [8, 16], "norm": "syncbn"},
    "model__head": {"name": "upernet", "channels": 4, "pool_scales": [1], "auxiliary_weight": 0.0},
    "data__image_size": [32, 32],
    "train__steps": STEP,
    "train__ema": 0.9,
    "train__param_groups": [{"match": r"^head\.", "lr_multiplier": 2.0, "weight_decay": 0.1}],
    "train__checkpoint": {"every_steps": STEP},
}


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every vector of a checkpoint, little-endian float32, by KIND|PARAMETER."""
    reader, manifest = VectorReader(checkpoint), checkpoint.manifest
    found = {}
    for kind in manifest.kinds:
        for name, shape in manifest.parameters.items():
            values = reader.read(kind, name, 0, int(np.prod(shape)))
            found[f"{kind}|{name}"] = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
    return found


def main(out: Path) -> None:
    if out.exists():
        sys.exit(f"{out} exists: a golden checkpoint is never made again; choose the next number")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, run = folder / "data", folder / "golden"
        succeed("shards", "pack", "digits", "--task", "semantic", "--split", "train", "--samples", "12", "--out", data)
        train(write_recipe(folder / "recipe.yaml", tiny_recipe("semantic", data, **SETTINGS)), run)
        step = f"checkpoints/step-{STEP:08d}"
        shutil.copytree(run / step, out / step)
        shutil.copytree(run / "blobs", out / "blobs")
        config = (run / "config.yaml").read_text().replace(str(data), "data")
        (out / "config.yaml").write_text(config)
    found = digests(open_checkpoint(out / step))
    (out / "digests.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file())} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
