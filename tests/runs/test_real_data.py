"""Real photographs, street scenes and clips: packed, trained on, and the losses fall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import DETECTION_HEAD, PYRAMID, SEMANTIC_HEAD, VIDEO_HEAD, history, succeed, train, write_recipe

BACKBONE = {"name": "vit", "embed_dim": 96, "depth": 4, "num_heads": 4, "patch_size": 8}
CAMVID = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"


def recipe_of(head: dict[str, Any], adapter: dict[str, Any], data: dict[str, Any], **settings: Any) -> dict[str, Any]:
    backbone = {**BACKBONE, "patch_size": 16} if head["name"] == "video_transformer" else BACKBONE
    return {
        "model": {"backbone": backbone, "adapter": adapter, "head": head},
        "data": data,
        "train": {
            "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.98]},
            "clip_grad": 1.0,
            "schedule": {"name": "cosine", "warmup": 0.05, "final": 0.05},
            **settings,
        },
        "evaluate": {"pictures": 4},
        "launch": {"processes": 2, "threads": 1},
    }


def few_images(annotations: Path, out: Path, count: int) -> Path:
    """The annotations of the images with few and large objects, which a tiny model can learn by heart."""
    tree = json.loads(annotations.read_text())
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in tree["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)

    def suits(image: dict[str, Any]) -> bool:
        items = by_image.get(image["id"], [])
        share = min((a["area"] / (image["height"] * image["width"]) for a in items), default=0.0)
        return 1 <= len(items) <= 4 and share > 0.01 and not any(a["iscrowd"] for a in items)

    tree["images"] = [image for image in tree["images"] if suits(image)][:count]
    kept = {image["id"] for image in tree["images"]}
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in kept]
    out.write_text(json.dumps(tree))
    assert len(kept) == count
    return out


@pytest.mark.slow
@pytest.mark.soak
def test_a_handful_of_coco_photographs_is_learnt(test_data: Path, tmp_path: Path) -> None:
    """Box and mask AP50 on the images trained on pass 0.5: boxes, masks, classes and their geometry are all right."""
    source = test_data / "coco_tiny"
    annotations = few_images(source / "annotations" / "instances_train2017.json", tmp_path / "few.json", 6)
    images, out = source / "images" / "train2017", tmp_path / "coco"
    succeed("shards", "pack", "coco", "--images", images, "--annotations", annotations, "--out", out)
    succeed("shards", "verify", out)
    head = {
        **DETECTION_HEAD,
        "anchor_sizes": [24, 48, 96],
        "rpn_batch": 64,
        "rpn_proposals": 100,
        "roi_batch": 32,
        "box_channels": 128,
        "mask_channels": 32,
    }
    data = {"train": {"path": str(out), "repeats": 4}, "val": {"path": str(out)}, "image_size": [160, 160]}
    tree = recipe_of(head, {**PYRAMID, "channels": 48, "norm": "ln"}, data, epochs=60, global_batch=4)
    run = tmp_path / "run"
    train(write_recipe(tmp_path / "recipe.yaml", tree), run, timeout=900)
    result = json.loads(max((run / "results").glob("*.json")).read_text())
    assert result["metrics"]["box_AP50"] > 0.5
    assert result["metrics"]["mask_AP50"] > 0.5


def assert_falls(run: Path) -> None:
    """The mean of the last five losses is below 0.8 of that of the first five."""
    rows = history(run)
    losses = [rows[step]["loss"] for step in sorted(rows)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses


@pytest.mark.slow
def test_camvid_trains(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "camvid_mini"
    for split in ("train", "val"):
        folders = ("--images", source / split, "--labels", source / f"{split}annot")
        succeed(
            "shards", "pack", "semantic", *folders, "--classes", CAMVID, "--ignore", "11", "--out", tmp_path / split
        )
    data = {
        "train": {"path": str(tmp_path / "train")},
        "val": {"path": str(tmp_path / "val")},
        "image_size": [144, 192],
        "transforms": [{"name": "scale_jitter", "min": 0.8}, {"name": "random_crop"}, {"name": "photometric"}],
    }
    tree = recipe_of(SEMANTIC_HEAD, PYRAMID, data, epochs=12, global_batch=8)
    run = tmp_path / "run"
    train(write_recipe(tmp_path / "recipe.yaml", tree), run, timeout=900)
    assert_falls(run)
    result = json.loads(max((run / "results").glob("*.json")).read_text())
    assert result["samples"] == 12
    assert result["metrics"]["aAcc"] > 0.2
    assert len(result["pictures"]) == 4


@pytest.mark.slow
def test_video_clips_train(test_data: Path, tmp_path: Path) -> None:
    """Clips of Kinetics, UCF101 and HMDB51 as they are: avi, mp4 and mkv, long and short, with wrong headers."""
    source = test_data / "video_clips"
    clips = json.loads((source / "clips.json").read_text())
    lines = [f"{clip['file']},{clip['label'].replace(',', ' ')}" for clip in clips if clip.get("label")]
    assert len(lines) >= 10
    listing = tmp_path / "list.csv"
    listing.write_text("\n".join(lines) + "\n")
    packed = tmp_path / "packed"
    succeed("shards", "pack", "video", "--list", listing, "--root", source, "--out", packed, "--on-error", "skip")
    data = {
        "train": {"path": str(packed), "repeats": 2},
        "image_size": [64, 64],
        "clip": {"frames": 4, "sampling": "uniform"},
        "transforms": [{"name": "resize"}],
    }
    head, adapter = {**VIDEO_HEAD, "embed_dim": 96}, {"name": "adaptformer", "bottleneck": 16}
    tree = recipe_of(head, adapter, data, steps=30, global_batch=6)
    run = tmp_path / "run"
    train(write_recipe(tmp_path / "recipe.yaml", tree), run, timeout=900)
    assert_falls(run)
