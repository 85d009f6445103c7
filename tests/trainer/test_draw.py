"""Pictures: shapes, what they change and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFont
from pycocotools import mask as mask_utils
from torch import Tensor

from vitgraft.data_shards import text
from vitgraft.data_shards.batch import Truth
from vitgraft.data_shards.draw import class_colour
from vitgraft.data_shards.text import written
from vitgraft.trainer.draw import beside, draw_confusion, enlarge, load_picture, remarked, repeat, save_png, titled
from vitgraft.trainer.tasks.detection import DetectionTask
from vitgraft.trainer.tasks.semantic import SemanticTask
from vitgraft.trainer.tasks.video import VideoTask

GREY = 90


def grey(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), GREY, dtype=torch.uint8)


def rle_of(top: int, left: int, bottom: int, right: int, size: tuple[int, int]) -> dict[str, Any]:
    mask = np.zeros(size, np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    rle = mask_utils.encode(mask)
    return {"size": list(size), "counts": rle["counts"].decode()}


def detection(score: float, box: list[float], mask: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"class": 0, "name": "a", "score": score, "box": box, "mask": mask}


def test_enlarging_repeats_whole_pixels() -> None:
    image = torch.arange(3 * 4 * 5).to(torch.uint8).reshape(3, 4, 5)
    big, factor = enlarge(image)
    assert factor == 64
    assert big.shape == (3, 4 * 64, 5 * 64)
    assert torch.equal(big[:, ::64, ::64], image)
    assert torch.equal(repeat(image, 1), image)
    same, one = enlarge(grey(100, 400))
    assert (same.shape, one) == ((3, 100, 400), 1)


def test_a_title_lies_above_an_unchanged_image() -> None:
    image = grey(50, 200)
    one, other = titled(image, "truth"), titled(image, "prediction")
    height = one.shape[1] - 50
    assert height > 0
    assert one.dtype == torch.uint8
    assert torch.equal(one[:, height:], image)
    assert one[:, :height].max() > 128
    assert titled(image, "")[:, :height].max() == 0
    assert not torch.equal(one[:, :height], other[:, :height])


def test_beside_puts_the_two_side_by_side_and_pads_the_shorter() -> None:
    both = beside(grey(30, 20), grey(40, 25), gap=6)
    assert both.shape == (3, 40, 20 + 6 + 25)
    assert (both[:, :30, :20] == GREY).all()
    assert (both[:, 30:, :26] == 0).all()
    assert (both[:, :, 20:26] == 0).all()
    assert (both[:, :, 26:] == GREY).all()


def test_beside_puts_wide_ones_above_each_other() -> None:
    both = beside(grey(10, 30), grey(12, 35), gap=6)
    assert both.shape == (3, 10 + 6 + 12, 35)
    assert (both[:, :10, :30] == GREY).all()
    assert (both[:, :16, 30:] == 0).all()
    assert (both[:, 16:] == GREY).all()


def test_a_saved_picture_is_read_back_exactly(tmp_path: Path) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 7, 9), dtype=np.uint8))
    save_png(image, tmp_path / "a.png")
    assert torch.equal(load_picture(tmp_path / "a.png"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def changed(before: Tensor, after: Tensor) -> Tensor:
    """(H, W) bool: where a picture differs from the enlarged image."""
    return (enlarge(before)[0] != after).any(0)


def test_boxes_are_drawn_where_they_are() -> None:
    image, task = grey(160, 160), DetectionTask(["a"])
    drawn = task.draw(image, {"detections": [detection(0.9, [40, 60, 120, 140])]})
    assert drawn.shape == (3, 320, 320)
    where = changed(image, drawn)
    assert where[2 * 100, 2 * 40]  # the left side
    assert where[2 * 140 - 1, 2 * 80]  # the bottom
    assert not where[2 * 100, 2 * 80]  # the inside
    assert not where[:100].any()
    assert not where[290:].any()
    assert not where[:, :70].any()


def test_weak_detections_are_not_drawn() -> None:
    image, task = grey(160, 160), DetectionTask(["a"])
    weak = task.draw(image, {"detections": [detection(0.49, [40, 60, 120, 140])]})
    assert not changed(image, weak).any()
    assert changed(image, task.draw(image, {"detections": [detection(0.5, [40, 60, 120, 140])]})).any()


def test_masks_fill_their_pixels_in_prediction_and_truth() -> None:
    image, task = grey(160, 160), DetectionTask(["a"])
    rle = rle_of(80, 60, 120, 100, (160, 160))
    drawn = task.draw(image, {"detections": [detection(0.9, [40, 60, 120, 140], rle)]})
    annotations = [{"class": 0, "bbox": [40, 60, 80, 80], "iscrowd": 0, "segmentation": rle}]
    truth = task.draw_truth(image, Truth("000000000", (160, 160), annotations))
    for picture in (drawn, truth):
        where = changed(image, picture)
        assert where[160:240, 120:200].all()
        assert not where[2 * 130, 2 * 50]
    crowd = [{**annotations[0], "iscrowd": 1}]
    assert not changed(image, task.draw_truth(image, Truth("000000000", (160, 160), crowd))).any()


def test_label_maps_colour_their_pixels_and_leave_the_ignored_ones() -> None:
    image, task = grey(160, 160), SemanticTask(["a", "b"])
    labels = torch.zeros(160, 160, dtype=torch.uint8)
    labels[:, 80:] = 1
    labels[:40] = 255
    predicted = task.draw(image, {"labels": labels})
    truth = task.draw_truth(image, Truth("000000000", (160, 160), labels.numpy()))
    assert torch.equal(predicted, truth)
    assert predicted.shape[0] == 3
    assert predicted.shape[1] > 320  # the legend is below
    assert predicted.shape[2] == 320
    where = changed(image, predicted[:, :320])
    assert not where[:80].any()
    assert where[80:].all()
    assert not torch.equal(predicted[:, 200, 10], predicted[:, 200, 310])


@pytest.mark.parametrize(("frames", "shown"), [(1, 1), (4, 4), (12, 6)])
def test_a_clip_is_a_strip_of_its_frames(frames: int, shown: int) -> None:
    clip = torch.stack([torch.full((3, 32, 40), 10 * (i + 1), dtype=torch.uint8) for i in range(frames)])
    task = VideoTask(["a", "b"])
    classes = [{"class": 0, "name": "a", "score": 0.75}, {"class": 1, "name": "b", "score": 0.25}]
    strip = task.draw(clip, {"classes": classes})
    assert strip.shape[2] == (2 * 40 if shown == 1 else shown * (2 * 40 + 2) + 2)
    assert strip.shape[1] > 2 * 32
    row = strip[0, 30].tolist()
    values = sorted({value for value in row if value})
    assert len(values) == shown
    assert (values[0], values[-1]) == (10, 10 * frames)
    one, other = (task.draw_truth(clip, Truth("000000000", (32, 40), label)) for label in (0, 1))
    assert torch.equal(one[:, : 2 * 32], other[:, : 2 * 32])
    assert not torch.equal(one[:, 2 * 32 :], other[:, 2 * 32 :])


def test_masks_that_overlap_are_drawn_one_after_the_other() -> None:
    image, task = grey(160, 160), DetectionTask(["a", "b"])
    large = detection(0.9, [20, 20, 120, 120], rle_of(20, 20, 120, 120, (160, 160)))
    small = {**detection(0.8, [80, 80, 150, 150], rle_of(80, 80, 150, 150, (160, 160))), "class": 1, "name": "b"}
    both = task.draw(image, {"detections": [small, large]})
    alone = task.draw(image, {"detections": [small]})
    inside, shared = both[:, 2 * 140, 2 * 140], both[:, 2 * 100, 2 * 100]
    assert torch.equal(inside, alone[:, 2 * 140, 2 * 140])
    assert shared.float().max() > 60  # not black
    # The small one over the large one, half of each.
    first, second = (torch.tensor(class_colour(label), dtype=torch.float32) for label in (0, 1))
    expected = ((GREY * 0.5 + first * 0.5).to(torch.uint8).float() * 0.5 + second * 0.5).to(torch.uint8)
    assert torch.equal(shared, expected)


def test_a_detection_without_a_mask_takes_nobody_elses() -> None:
    image, task = grey(160, 160), DetectionTask(["a"])
    masked = detection(0.9, [20, 20, 60, 60], rle_of(20, 20, 60, 60, (160, 160)))
    where = changed(image, task.draw(image, {"detections": [masked, detection(0.8, [80, 80, 150, 150])]}))
    assert where[2 * 40, 2 * 40]
    assert not where[2 * 120, 2 * 120]


def test_boxes_from_outside_are_drawn_whatever_they_are() -> None:
    image, task = grey(160, 160), DetectionTask(["a"])
    for box in ([120, 140, 40, 60], [-50, -50, 500, 500], [float("nan"), 0, 10, 10], [300, 300, 400, 400]):
        assert task.draw(image, {"detections": [detection(0.9, box)]}).shape == (3, 320, 320)


def test_what_is_not_drawn_is_said() -> None:
    task = DetectionTask(["a"])
    assert task.remark({"detections": [detection(0.5, [0, 0, 9, 9])]}) is None
    assert task.remark({"detections": [detection(0.25, [0, 0, 9, 9])]}) == "nothing of score 0.5 or more; best: a 0.25"
    task.threshold = 0.2
    assert task.remark({"detections": [detection(0.25, [0, 0, 9, 9])]}) is None
    assert task.remark({"detections": []}) == "nothing of score 0.2 or more"
    image = grey(160, 160)
    assert remarked(image, None) is image
    said = remarked(image, "nothing")
    assert said.shape == image.shape
    assert not torch.equal(said[:, 140:], image[:, 140:])
    assert torch.equal(said[:, :130], image[:, :130])


@pytest.mark.parametrize(
    "name", ["Füße", "кошка", "القط", "猫", "हिन्दी", "a\nb\tc", "\x00\u202e", "x" * 500, "\ud800", ""]
)
def test_letters_are_drawn_in_a_font_that_has_them_or_escaped(name: str) -> None:
    font, shown = written(name, 13)
    assert all(letter.isprintable() for letter in shown)
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    box = bytes(plain.getmask("\U0010fffe"))
    assert all(bytes(plain.getmask(letter)) != box for letter in shown if letter != " ")
    one, other = (VideoTask([name]).draw_truth(grey(32, 40)[None], Truth("0", (32, 40), 0)) for _ in range(2))
    assert torch.equal(one, other)


def test_without_fonts_of_the_system_letters_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_others", lambda *_: iter(()))
    text.written.cache_clear()
    assert text.written("猫 1", 13)[1] == "\\u732b 1"
    assert text.written("кот", 13)[1] == "\\u043a\\u043e\\u0442"
    monkeypatch.undo()
    text.written.cache_clear()
    monkeypatch.setenv("PATH", "")  # no fontconfig either
    assert text.written("cat", 13)[1] == "cat"
    text.written.cache_clear()


def test_a_confusion_matrix_shows_what_is_taken_for_what() -> None:
    matrix = np.array([[8, 0, 2], [0, 0, 0]])
    picture = draw_confusion(matrix, ["cat", "dog"])
    assert picture.dtype == torch.uint8
    assert picture[0, -10, -10] == 0  # no dog
    assert (picture[0] == round(255 * 0.8)).any()
    assert draw_confusion(np.eye(400, 401, dtype=np.int64), [str(i) for i in range(400)]).shape[2] == 400
