"""What an evaluation gives besides the figures: those of the weights themselves, losses, confusion, curves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_checkpoints import model_of, save_model
from support import tiny_recipe
from support_evaluator import make_evaluated_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from vitgraft.configs.load import load_recipe, validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import eval_batches
from vitgraft.data_shards.pack.digits import pack_digits
from vitgraft.launch.cli import app
from vitgraft.trainer.batch_picture import draw_batch
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint
from vitgraft.trainer.evaluate import Evaluation, Evaluator, cross_entropy, evaluate_into_run
from vitgraft.trainer.figures import headline, in_words, missing_best
from vitgraft.trainer.monitor import Monitor, groups_table
from vitgraft.trainer.param_groups import Group

KINDS = ["detection", "semantic", "video"]
NOT_SAID = lambda *_: None  # noqa: E731


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("digits")
    for kind in KINDS:
        pack_digits(kind, "val", root / kind, samples=6)  # type: ignore[arg-type]
    return {kind: root / kind for kind in KINDS}


def run_of(kind: str, folder: Path, data: Path, **settings: Any) -> tuple[Recipe, Checkpoint]:
    """A run with one checkpoint of random weights, whose average is half of them."""
    classes = json.loads((data / "manifest.json").read_text())["classes"]
    tree = tiny_recipe(kind, data, data, train__ema=0.9, **settings)
    recipe = validate_recipe(tree, "recipe")
    path = save_model(folder, tree, model_of(recipe, len(classes)), ema=0.5, classes=classes)
    (folder / "results").mkdir()
    return recipe, open_checkpoint(path)


def evaluator_of(recipe: Recipe, checkpoint: Checkpoint, losses: bool = False) -> Evaluator:
    assert recipe.data.val is not None
    return Evaluator(recipe, checkpoint.manifest.classes, recipe.data.val.path, torch.device("cpu"), losses)


def test_the_weights_themselves_are_evaluated_beside_their_average(tmp_path: Path, data: dict[str, Path]) -> None:
    run, recipe = make_evaluated_run(tmp_path / "run", data["semantic"], [3])
    checkpoint = open_checkpoint(run / "checkpoints" / "step-00000003")
    evaluator = evaluator_of(recipe, checkpoint)
    steps: list[tuple[int, int]] = []
    found = evaluate_into_run(evaluator, run, checkpoint, lambda *step: steps.append(step))
    averaged, raw = (evaluator.run(checkpoint, None, 0, NOT_SAID, weights) for weights in ("ema", "raw"))
    assert found is not None
    assert averaged is not None
    assert raw is not None
    assert (found.metrics, found.raw_metrics) == (averaged.metrics, raw.metrics)
    assert averaged.metrics != raw.metrics
    assert [e.protocol["weights"] for e in (found, averaged, raw)] == ["ema", "ema", "raw"]
    assert steps[-1] == (12, 12)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    stored = json.loads((run / "results" / "step-00000003.json").read_text())
    assert (stored["metrics"], stored["raw_metrics"]) == (averaged.metrics, raw.metrics)
    line = headline(evaluator, found, checkpoint)
    assert f"without averaging mIoU {raw.metrics['mIoU']:.3f}" in line
    assert "73 % of the average (train.ema 0.9) is still what the run began with" in line
    alone = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"raw": False})})
    found = evaluate_into_run(evaluator_of(alone, checkpoint), run, checkpoint, NOT_SAID)
    assert found is not None
    assert found.raw_metrics is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_training_on_the_same_samples(kind: str, tmp_path: Path, data: dict[str, Path]) -> None:
    """Against training's own batches, which without transforms are the same images and targets."""
    plain = {"model__head__auxiliary_weight": 0.0} if kind == "semantic" else {}
    recipe, checkpoint = run_of(kind, tmp_path / "run", data[kind], evaluate__batch=6, **plain)
    evaluator = evaluator_of(recipe, checkpoint, losses=True)
    found = evaluator.run(checkpoint, None, 0, NOT_SAID)
    assert found is not None
    assert found.confusion is None if kind == "detection" else found.confusion is not None
    train = PackedDataset(str(data[kind]), recipe.data, recipe.task, train=True)
    batch = train.train_batch([Entry(0, i, i, 0) for i in range(6)])
    (evaluated,) = eval_batches(evaluator.dataset, range(6), 6)
    if kind != "video":  # training draws other frames
        assert torch.equal(batch.images, evaluated.images)
    targets = evaluated.targets if kind == "video" else batch.targets
    torch.manual_seed(0)
    with torch.no_grad():
        terms = evaluator.model(evaluated.images, batch.sizes, targets, batch.weights)
    expected = {name: float(term.total) / max(float(term.count), 1) for name, term in terms.items()}
    assert found.losses == pytest.approx(expected, rel=1e-5)
    # The figures are the same as without.
    without = evaluator_of(recipe, checkpoint).run(checkpoint, None, 0, NOT_SAID)
    assert without is not None
    assert without.losses == {}
    assert without.metrics == pytest.approx(found.metrics, nan_ok=True)


def test_losses_do_not_depend_on_the_cut_into_batches(tmp_path: Path, data: dict[str, Path]) -> None:
    recipe, checkpoint = run_of("semantic", tmp_path / "run", data["semantic"])
    found = []
    for batch in (1, 4, 6):
        cut = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch": batch})})
        evaluation = evaluator_of(cut, checkpoint, losses=True).run(checkpoint, None, 0, NOT_SAID)
        assert evaluation is not None
        found.append(evaluation.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_change_nothing_else_of_a_batch(kind: str, tmp_path: Path, data: dict[str, Path]) -> None:
    recipe = validate_recipe(tiny_recipe(kind, data[kind]), "recipe")
    plain, asked = (
        PackedDataset(str(data[kind]), recipe.data, recipe.task, train=False, targets=targets)  # type: ignore[arg-type]
        for targets in (False, True)
    )
    one, other = (dataset.eval_batch([0, 3]).batch for dataset in (plain, asked))
    assert one.targets is None
    assert len(other.targets) == 2
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.sizes, other.sizes)


def test_a_classifiers_confusion_is_counted(tmp_path: Path, data: dict[str, Path]) -> None:
    recipe, checkpoint = run_of("video", tmp_path / "run", data["video"])
    evaluator = evaluator_of(recipe, checkpoint)
    found = evaluator.run(checkpoint, None, 0, NOT_SAID)
    assert found is not None
    assert found.confusion is not None
    assert found.confusion.sum() == 6
    assert np.trace(found.confusion[:, :-1]) == round(6 * (found.metrics["top1"] or 0))
    assert "confusion" not in found.as_json()


def board(run: Path) -> Any:
    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    shown.Reload()
    return shown


def test_what_tensorboard_shows_of_an_evaluation_and_a_start(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: mine\ntrain: {}\n")
    monitor = Monitor(tmp_path, 4)
    groups = [Group(("head.weight", "head.other"), 1.0, 0.05), Group(("backbone.a",), 0.5, 0.0)]
    monitor.start(groups, torch.zeros(3, 8, 8, dtype=torch.uint8))
    evaluation = Evaluation(7, {"box_AP": 0.25, "box_APs": None}, {}, 3, [], 1.0)
    evaluation = replace(
        evaluation,
        raw_metrics={"box_AP": 0.5, "box_APs": None},
        losses={"box": 1.0, "mask": 0.5},
        confusion=np.eye(2, 3, dtype=np.int64),
    )
    monitor.evaluation(evaluation, tmp_path, ["a", "b"])
    monitor.close()
    shown = board(tmp_path)
    points = {tag: [(p.step, p.value) for p in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    assert points == {
        "evaluation/box_AP": [(7, 0.25)],
        "evaluation_raw/box_AP": [(7, 0.5)],
        "validation/loss": [(7, 1.5)],
        "validation/loss/box": [(7, 1.0)],
        "validation/loss/mask": [(7, 0.5)],
    }
    assert set(shown.Tags()["images"]) == {"train/batch", "confusion"}
    (text,) = shown.Tensors("run/recipe/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    name: mine\n    train: {}"
    (text,) = shown.Tensors("run/parameter_groups/text_summary")
    assert text.tensor_proto.string_val[0].decode() == groups_table(groups)
    assert "| 01 | 0.5 | 0 | 1 | `backbone.a` |" in groups_table(groups)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_training_is_drawn_with_its_labels(kind: str, data: dict[str, Path]) -> None:
    transforms = [{"name": "mixup"}] if kind == "video" else []
    recipe = validate_recipe(tiny_recipe(kind, data[kind], data__transforms=transforms), "recipe")
    dataset = PackedDataset(str(data[kind]), recipe.data, recipe.task, train=True)
    batch = dataset.train_batch([Entry(0, i, i, 0) for i in range(6)])
    picture = draw_batch(batch, recipe, dataset.manifest.classes)
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    for target in batch.targets if kind == "detection" else []:
        target["boxes"] *= 0.5
    if kind == "semantic":
        batch.targets[:] = 1
    if kind == "video":
        batch.targets[:] = batch.targets.flip(1)
    assert not torch.equal(picture, draw_batch(batch, recipe, dataset.manifest.classes))
    filler = dataset.train_batch([])
    assert draw_batch(filler, recipe, dataset.manifest.classes).shape[0] == 3


def test_a_best_that_the_data_cannot_give_is_said(tmp_path: Path, data: dict[str, Path]) -> None:
    keep = {"every_steps": 3, "keep_best": "box_APl"}
    recipe, checkpoint = run_of("detection", tmp_path / "run", data["detection"], train__checkpoint=keep)
    evaluator = evaluator_of(recipe, checkpoint)
    found = evaluator.run(checkpoint, None, 0, NOT_SAID)
    assert found is not None
    assert found.metrics["box_APl"] is None  # images of 128 pixels hold nothing of 96 x 96
    text = missing_best(evaluator, found)
    assert text is not None
    assert "gives no box_APl, by which keep_best chooses" in text
    assert missing_best(evaluator, replace(found, metrics={"box_APl": 0.0})) is None
    assert (in_words(None), in_words(0.12345), in_words(0.12345, 4)) == ("no ground truth", "0.123", "0.1235")


def test_old_checkpoints_go_on_without_a_ramp(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from vitgraft.trainer.checkpoint.read import resolve_checkpoint
    from vitgraft.trainer.checkpoint.save import TrainerState

    golden = Path(__file__).resolve().parents[1] / "golden" / "checkpoint-1"
    recipe = load_recipe(str(golden / "config.yaml"))
    checkpoint = resolve_checkpoint(golden)
    model = model_of(recipe, len(checkpoint.manifest.classes))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engine = SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    state = TrainerState(engine, recipe.train.ema)
    assert state.ema is not None
    assert state.ema.ramped
    state.restore(checkpoint)
    assert not state.ema.ramped


def test_class_255_of_an_image_counts_and_255_of_a_pixel_does_not() -> None:
    logits, targets = torch.randn(2, 300), torch.tensor([255, 3])
    total, count = cross_entropy(logits, targets, torch.ones(2))
    assert float(total) == pytest.approx(float(-logits.log_softmax(1)[[0, 1], targets].sum()), rel=1e-6)
    assert float(count) == 2
    maps = torch.tensor([[[255, 1]], [[0, 1]]])
    total, count = cross_entropy(torch.zeros(2, 4, 1, 2), maps, torch.tensor([1.0, 0.0]))
    assert (float(total), float(count)) == (pytest.approx(float(torch.tensor(4.0).log())), 1.0)


def test_the_command_prints_the_protocol_and_what_has_no_ground_truth(tmp_path: Path, data: dict[str, Path]) -> None:
    run_of("detection", tmp_path / "run", data["detection"])
    out = tmp_path / "figures.json"
    for weights in ("ema", "raw"):
        done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--weights", weights, "--out", str(out)])
        assert done.exception is None
        lines = done.stdout.splitlines()
        assert "box_APl          no ground truth" in lines
        assert (
            "# metric: COCO AP (pycocotools), IoU 0.50:0.05:0.95, 101 recall points, 100 detections per image" in lines
        )
        assert f"# weights: {weights}" in lines
        assert "# input: resized to fit 128x128, padded" in lines
        stored = json.loads(out.read_text())
        assert stored["metrics"]["box_APl"] is None
        assert stored["protocol"]["weights"] == weights
        assert ("of the average (train.ema 0.9)" in done.stderr) == (weights == "ema")
