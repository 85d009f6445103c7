"""Batches are a pure function of (data, recipe, entries)."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.data_shards.batch import Batch, Entry
from vitgraft.data_shards.dataset import EvalItem, PackedDataset, prepare_clip, prepare_image
from vitgraft.data_shards.decode import decode_frames, sample_frames
from vitgraft.data_shards.images import load_image
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack.digits import encode_clip
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.plan import MicroBatch

Configure = Callable[..., DataConfig]

RANDOM = [
    {"name": "scale_jitter", "min": 0.5, "max": 1.5},
    {"name": "random_crop"},
    {"name": "horizontal_flip"},
    {"name": "photometric"},
]
KINDS = ["detection", "semantic", "video"]


def tensors(batch: Batch) -> list[Tensor]:
    targets = batch.targets if isinstance(batch.targets, list) else [{"all": batch.targets}]
    return [batch.images, batch.sizes, batch.weights, *(value for target in targets for value in target.values())]


def same(one: Batch, two: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_looks_the_same_in_any_company(packed: dict[str, Path], configure: Configure, kind: Any) -> None:
    config = configure(packed[kind], transforms=RANDOM)
    dataset = PackedDataset(packed[kind], config, kind, seed=3)
    entries = dataset.plan(1).entries(4, 10)
    whole = dataset.train_batch(entries)
    torch.manual_seed(12345)
    copy = pickle.loads(pickle.dumps(dataset))
    parts = [copy.train_batch([entry]) for entry in reversed(entries)][::-1]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert whole.entries == entries
    assert whole.weights.tolist() == [1.0] * 6
    again = whole.images
    for change in ({"seed": 4}, {"seed": 3, "epoch": 2}, {"seed": 3, "repetition": 1}):
        other = PackedDataset(packed[kind], config, kind, seed=change.pop("seed"))
        changed = other.train_batch([entry._replace(**change) for entry in entries])
        assert not torch.equal(changed.images, again)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_types(packed: dict[str, Path], configure: Configure, kind: Any) -> None:
    dataset = PackedDataset(packed[kind], configure(packed[kind], image_size=[96, 112]), kind)
    batch = dataset.train_batch(dataset.plan(0).entries(0, 3))
    assert batch.images.shape == ((3, 3, 4, 96, 112) if kind == "video" else (3, 3, 96, 112))
    assert batch.images.dtype == torch.float32
    assert batch.sizes.tolist() == [[96, 96]] * 3
    assert not batch.images[..., 96:].any()
    if kind == "detection":
        for target in batch.targets:
            count = len(target["labels"])
            assert target["boxes"].shape == (count, 4)
            assert target["masks"].shape == (count, 96, 112)
            types = [target[key].dtype for key in ("boxes", "labels", "masks")]
            assert types == [torch.float32, torch.int64, torch.uint8]
    elif kind == "semantic":
        assert batch.targets.shape == (3, 96, 112)
        assert batch.targets.dtype == torch.int64
        assert bool((batch.targets[:, :, 96:] == 255).all())
    else:
        assert batch.targets.shape == (3,)
        assert batch.targets.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_fillers_look_like_batches_and_weigh_nothing(packed: dict[str, Path], configure: Configure, kind: Any) -> None:
    dataset = PackedDataset(packed[kind], configure(packed[kind]), kind)
    filler, batch = dataset.train_batch([]), dataset.train_batch([Entry(0, 0, 0, 0)])
    assert filler.images.shape == batch.images.shape
    assert filler.weights.tolist() == [0.0]
    assert filler.entries == []
    assert not filler.images.any()
    assert [t.dtype for t in tensors(filler)] == [t.dtype for t in tensors(batch)]
    if kind == "detection":
        assert [len(value) for value in filler.targets[0].values()] == [0, 0, 0]
    if kind == "semantic":
        assert bool((filler.targets == 255).all())


def test_targets_without_augmentation_are_what_was_packed(packed: dict[str, Path], configure: Configure) -> None:
    config = configure(packed["detection"], image_size=[128, 128], transforms=[])
    dataset = PackedDataset(packed["detection"], config, "detection")
    batch = dataset.train_batch([Entry(0, 0, 4, 0)])
    raw = dataset.reader.read(4)
    annotations = json.loads(raw.members["json"])["annotations"]
    target = batch.targets[0]
    assert target["labels"].tolist() == [a["class"] for a in annotations]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    assert target["boxes"].tolist() == boxes
    masks = np.stack([coco_mask.decode(a["segmentation"]) for a in annotations])
    assert np.array_equal(target["masks"].numpy(), masks)
    pixels = np.asarray(Image.open(io.BytesIO(raw.members["jpg"]))).astype(np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(batch.images[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def detection_set(folder: Path, annotations: list[dict[str, Any]], image: bytes | None = None) -> Path:
    """A set of two samples; the first has these annotations and, if given, this image."""
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), 100, dtype=np.uint8)).save(stream, "PNG")
    facts = {"image_id": 1, "file_name": "street.png", "height": 20, "width": 30}
    with DatasetWriter(folder, "detection", ["a", "b"], category_ids=[1, 2]) as writer:
        writer.add({"png": stream.getvalue() if image is None else image}, facts | {"annotations": annotations})
        writer.add({"png": stream.getvalue()}, facts | {"annotations": []})
    return folder


BOX = {"id": 5, "bbox": [2.0, 3.0, 10.0, 8.0], "class": 1, "area": 80.0, "iscrowd": 0, "segmentation": None}


def test_crowds_are_no_targets_but_stay_in_the_truth(tmp_path: Path, configure: Configure) -> None:
    folder = detection_set(tmp_path / "set", [BOX, BOX | {"id": 6, "iscrowd": 1}])
    config = configure(folder, image_size=[20, 30], transforms=[])
    target = PackedDataset(folder, config, "detection").train_batch([Entry(0, 0, 0, 0)]).targets[0]
    assert target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == [[2, 3, 12, 11]]
    # Without segmentation the box is the mask.
    assert int(target["masks"].sum()) == 80
    item = PackedDataset(folder, config, "detection", train=False).eval_batch([0])
    assert [a["id"] for a in item.batch.truths[0].value] == [5, 6]


def test_an_unreadable_training_sample_is_named(tmp_path: Path, configure: Configure) -> None:
    folder = detection_set(tmp_path / "set", [BOX], image=b"no image")
    dataset = PackedDataset(folder, configure(folder), "detection")
    with pytest.raises(DataError, match=r"shard-000000\.tar:000000000 \(street\.png\): broken image"):
        dataset.train_batch([Entry(0, 0, 0, 0)])


def test_an_unreadable_evaluation_image_keeps_place_and_truth(tmp_path: Path, configure: Configure) -> None:
    folder = detection_set(tmp_path / "set", [BOX], image=b"no image")
    item = PackedDataset(folder, configure(folder), "detection", train=False).eval_batch([1, 0])
    assert item.batch.weights.tolist() == [1.0, 0.0]
    assert not item.batch.images[1].any()
    assert item.batch.truths[1].value == [BOX]
    assert item.batch.truths[1].size == (20, 30)
    assert [(sample, "street.png" in reason) for sample, reason in item.errors] == [(0, True)]


def test_an_unreadable_label_leaves_no_truth(tmp_path: Path, configure: Configure) -> None:
    folder = detection_set(tmp_path / "set", [BOX | {"class": 7}])
    item = PackedDataset(folder, configure(folder), "detection", train=False).eval_batch([0, 1])
    assert item.batch.weights.tolist() == [0.0, 1.0]
    assert [truth.value for truth in item.batch.truths] == [None, []]
    assert "class 7 of 2" in item.errors[0][1]


def test_evaluation_of_label_maps_and_clips(packed: dict[str, Path], configure: Configure) -> None:
    semantic = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic", train=False)
    truth = semantic.eval_batch([2]).batch.truths[0]
    expected = np.asarray(Image.open(io.BytesIO(semantic.reader.read(2).members["label.png"])))
    assert truth.size == (128, 128)
    assert truth.value.dtype == np.uint8
    assert np.array_equal(truth.value, expected)
    video = PackedDataset(packed["video"], configure(packed["video"]), "video", train=False)
    item = video.eval_batch([0, 21])
    assert item.batch.images.shape == (2, 3, 4, 96, 96)
    assert item.batch.targets is None
    labels = [json.loads(video.reader.read(i).members["json"])["label"] for i in (0, 21)]
    assert [t.value for t in item.batch.truths] == labels


def test_another_kind_of_data_is_refused(packed: dict[str, Path], configure: Configure) -> None:
    with pytest.raises(ConfigError, match="holds video data, the model's head needs semantic"):
        PackedDataset(packed["video"], configure(packed["video"]), "semantic")


def test_the_plan_is_that_of_the_manifest(packed: dict[str, Path], configure: Configure) -> None:
    source = {"path": str(packed["video"]), "repeats": 3}
    dataset = PackedDataset(packed["video"], configure(packed["video"], train=source), "video", seed=5)
    assert dataset.epoch_size == len(dataset.plan(0)) == 66
    assert read_manifest(packed["video"]).shard_sizes == [10, 10, 2]


def test_loose_files_get_the_transform_of_evaluation(
    packed: dict[str, Path], configure: Configure, tmp_path: Path
) -> None:
    config = configure(packed["detection"])
    dataset = PackedDataset(packed["detection"], config, "detection", train=False)
    (tmp_path / "a.jpg").write_bytes(dataset.reader.read(7).members["jpg"])
    canvas, size, scale = prepare_image(load_image(tmp_path / "a.jpg")[0], config)
    assert torch.equal(canvas, dataset.eval_batch([7]).batch.images[0])
    assert (size, scale) == ((96, 96), (0.75, 0.75))
    video = PackedDataset(packed["video"], config, "video", train=False)
    (tmp_path / "a.mp4").write_bytes(video.reader.read(7).members["mp4"])
    assert torch.equal(prepare_clip(tmp_path / "a.mp4", config).canvas, video.eval_batch([7]).batch.images[0])
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")
    (tmp_path / "a.avi").write_text("no video")
    with pytest.raises(DataError, match=r"a\.avi: broken video"):
        prepare_clip(tmp_path / "a.avi", config)


def test_clips_are_the_frames_that_sampling_names(tmp_path: Path, configure: Configure) -> None:
    frames = [np.full((32, 32, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    data = encode_clip(frames, 10)
    with DatasetWriter(tmp_path / "set", "video", ["a"]) as writer:
        writer.add({"mp4": data}, {"label": 0, "file_name": "x", "frames": 20, "fps": 10, "height": 32, "width": 32})
    config = configure(tmp_path / "set", image_size=[32, 32], mean=[0.0] * 3, std=[1.0] * 3)
    batch = PackedDataset(tmp_path / "set", config, "video", train=False).eval_batch([0]).batch
    expected = decode_frames(data, sample_frames(20, config.clip, False), "x").float() / 255
    assert torch.allclose(batch.images[0], expected.transpose(0, 1), atol=1e-6)
    assert torch.allclose(batch.images[0].mean((0, 2, 3)) * 25.5, torch.tensor([6.0, 8, 10, 12]), atol=0.6)


def test_a_changed_label_map_is_found_in_training(
    packed: dict[str, Path], configure: Configure, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed["semantic"], tmp_path / "set"))
    path = folder / "shard-000000.tar"
    data = path.read_bytes().replace(b'"height":128', b'"height":127')
    path.write_bytes(data)
    from vitgraft.data_shards.report import verify

    assert len(verify(folder).bad_samples) == 10


@pytest.mark.parametrize("train", [True, False])
def test_images_are_written_where_the_caller_says(packed: dict[str, Path], configure: Configure, train: bool) -> None:
    dataset = PackedDataset(packed["detection"], configure(packed["detection"]), "detection", train=train)
    index = MicroBatch(0, 0, 0, tuple(dataset.plan(0).entries(0, 3)), 3, 3) if train else [4, 0, 9]
    out = torch.full(dataset.images_shape(index), -9.0)
    own, there = dataset.produce(index), dataset.produce(index, out)
    batches = [item.batch if isinstance(item, EvalItem) else item for item in (own, there)]
    assert batches[1].images is out
    assert torch.equal(batches[0].images, out)
