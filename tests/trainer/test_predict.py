"""Predictions on folders as people have them: what is taken, what is passed over, what is never written over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_checkpoints import model_of, save_model
from PIL import Image
from support import tiny_recipe
from typer.testing import CliRunner, Result

from vitgraft.configs.errors import VitgraftError
from vitgraft.configs.load import validate_recipe
from vitgraft.launch.cli import app


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector whose weights are of no use, but do find something."""
    tree = tiny_recipe("detection", "data", model__head__score_threshold=0.05, model__head__detections_per_image=5)
    folder = tmp_path_factory.mktemp("predict") / "run"
    save_model(folder, tree, model_of(validate_recipe(tree, "recipe")), ema=0.5)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of images."""
    tree = tiny_recipe(
        "semantic", "data", model__head={"name": "image_classifier"}, model__adapter=[{"name": "none"}], train__ema=0.9
    )
    folder = tmp_path_factory.mktemp("classify") / "run"
    save_model(folder, tree, model_of(validate_recipe(tree, "recipe")), ema=0.5)
    return folder


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def command(*words: str | Path) -> tuple[int, Result]:
    """The command in this process; the exit code that ``main`` gives."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    error = done.exception
    if error is not None and not isinstance(error, VitgraftError | SystemExit):
        raise error
    return (error.exit_code if isinstance(error, VitgraftError) else done.exit_code), done


def written(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_folder_of_the_inputs_is_refused(run: Path, tmp_path: Path, suffix: str) -> None:
    photos = tmp_path / "photos"
    photo(photos / f"a.{suffix}")
    link = tmp_path / "link"
    link.symlink_to(photos)
    before = contents(photos)
    for out in (photos, tmp_path / "photos/../photos", link):
        code, done = command("predict", run, photos, "--out", out)
        assert code == 2
        assert "is the folder of the inputs" in str(done.exception)
    assert contents(photos) == before


def test_no_photo_is_written_over_by_another_way(run: Path, tmp_path: Path) -> None:
    """A single file in the folder that it lies in, a hard link, annotations with the name of an output."""
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    a = photo(photos / "a.png")
    photo(photos / "b.jpg")
    photo(photos / "b.png", 1)
    photo(photos / "c.jpg")
    (photos / "c.json").write_text('{"shapes": []}')
    elsewhere.mkdir()
    os.link(a, elsewhere / "a.png")
    before = contents(tmp_path)
    for given, out in ((a, photos), (a, elsewhere), (photos / "b.jpg", photos), (photos / "c.jpg", photos)):
        code, _ = command("predict", run, given, "--out", out)
        assert code == 2, given
    assert contents(tmp_path) == before


def test_predictions_are_written_over_earlier_ones(run: Path, tmp_path: Path) -> None:
    """Below the inputs, which are not walked for them."""
    photos = tmp_path / "photos"
    photo(photos / "a.png")
    photo(photos / "more" / "b.png")
    out = photos / "predictions"
    for _ in range(2):
        code, done = command("predict", run, photos, "--out", out)
        assert (code, done.stdout) == (0, f"2 predictions in {out}\n")
        assert "passed over" not in done.stderr
        assert written(out) == ["a.json", "a.png", "more/b.json", "more/b.png"]
    (out / "a.json").unlink()
    assert command("predict", run, photos, "--out", out)[0] == 0  # the picture says whose it is


def test_a_folder_with_all_that_photos_lie_among(run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photo(photos / "day 1" / "a.jpg")
    photo(photos / "a.png")
    shutil.move(photo(photos / "later.png"), photos / "no_suffix")
    (photos / "notes.txt").write_text("hello")
    (photos / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (photos / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (photos / "._a.png").write_bytes(b"\0\5\x16\7")
    photo(photos / ".hidden" / "c.png")
    (photos / "empty").mkdir()
    code, done = command("predict", run, photos, "--out", tmp_path / "out")
    assert code == 0
    assert "5 files passed over: " in done.stderr
    assert all(name in done.stderr for name in ("notes.txt", "Thumbs.db", ".DS_Store", "._a.png", ".hidden"))
    stems = ["a", "day 1/a", "no_suffix"]
    assert written(tmp_path / "out") == sorted(f"{stem}.{end}" for stem in stems for end in ("json", "png"))
    assert json.loads((tmp_path / "out" / "day 1" / "a.json").read_text())["input"] == str(photos / "day 1" / "a.jpg")


def test_names_are_kept_apart(run: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one" / "photos", tmp_path / "other" / "photos"
    for name in ("a.png", "a.jpg", "b.webp"):
        photo(one / name)
    photo(other / "b.png")
    code, _ = command("predict", run, one, "--out", tmp_path / "out1")
    assert code == 0
    assert [n for n in written(tmp_path / "out1") if n.endswith("json")] == ["a.jpg.json", "a.png.json", "b.json"]
    code, _ = command("predict", run, one / "b.webp", other, other / "b.png", one, "--out", tmp_path / "out2")
    assert code == 0
    found = [name for name in written(tmp_path / "out2") if name.endswith("json")]
    assert found == [f"one/photos/{name}.json" for name in ("a.jpg", "a.png", "b")] + ["other/photos/b.json"]
    for name in found:
        result = json.loads((tmp_path / "out2" / name).read_text())
        assert Path(result["input"]).parent == tmp_path / Path(name).parent
        assert (tmp_path / "out2" / name).with_name(result["picture"]).is_file()


def test_broken_ones_are_listed_and_the_rest_is_done(run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    whole = photo(photos / "b.png")
    (photos / "a.png").write_bytes(whole.read_bytes()[:500])
    (photos / "c.jpg").write_text("<html>")
    code, done = command("predict", run, photos, "--out", tmp_path / "out")
    assert code == 3
    assert written(tmp_path / "out") == ["b.json", "b.png"]
    assert "1 prediction in" in done.stdout
    assert f"{photos}/a.png: broken image" in done.stderr
    assert f"{photos}/c.jpg: broken image" in done.stderr
    assert "2 of 3 inputs could not be read" in str(done.exception)


def test_nothing_to_predict_on_is_said(run: Path, tmp_path: Path) -> None:
    empty, notes = tmp_path / "empty", tmp_path / "notes"
    empty.mkdir()
    notes.mkdir()
    (notes / "a.txt").write_text("")
    for given, words in (
        (empty, "an empty folder"),
        (notes, "no image in it; 1 file passed over: a.txt"),
        (tmp_path / "none", "no such file"),
        (Path("/dev/null"), "cannot be read"),
    ):
        code, done = command("predict", run, given, "--out", tmp_path / "out")
        assert code == 3
        assert words in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_the_threshold_decides_what_is_listed_and_drawn(run: Path, tmp_path: Path) -> None:
    a = photo(tmp_path / "a.png")
    scores: dict[str, list[float]] = {}
    pictures: dict[str, bytes] = {}
    for threshold in ("none", "0.01", "0.3", "0.99"):
        out = tmp_path / threshold
        words = [] if threshold == "none" else ["--threshold", threshold]
        code, done = command("predict", run, a, "--out", out, *words)
        assert code == 0
        result: dict[str, Any] = json.loads((out / "a.json").read_text())
        scores[threshold] = [d["score"] for d in result["detections"]]
        pictures[threshold] = (out / "a.png").read_bytes()
        drawn = [score for score in scores[threshold] if score >= result["threshold"]]
        assert result["threshold"] == (0.5 if threshold == "none" else float(threshold))
        assert ("nothing is drawn on 1 of 1 pictures" in done.stderr) == (not drawn) == ("remark" in result)
        if threshold != "none":
            assert drawn == scores[threshold]
    assert scores["0.01"]
    assert scores["0.99"] == []
    assert max(scores["0.01"]) == max(scores["none"])
    assert pictures["0.01"] != pictures["0.99"]
    assert command("predict", run, a, "--out", tmp_path / "x", "--threshold", "1.5")[0] == 2


def test_a_classifier_lists_what_reaches_the_threshold(classifier: Path, tmp_path: Path) -> None:
    a = photo(tmp_path / "a.png")
    assert command("predict", classifier, a, "--out", tmp_path / "all")[0] == 0
    every = json.loads((tmp_path / "all" / "a.json").read_text())["classes"]
    assert len(every) == 3
    middle = every[1]["score"]
    assert command("predict", classifier, a, "--out", tmp_path / "some", "--threshold", middle)[0] == 0
    assert json.loads((tmp_path / "some" / "a.json").read_text())["classes"] == every[:2]


def test_the_average_or_the_weights_themselves(classifier: Path, tmp_path: Path) -> None:
    a = photo(tmp_path / "a.png")
    found = {}
    for words in ([], ["--weights", "ema"], ["--weights", "raw"]):
        out = tmp_path / "-".join(["out", *words])
        code, done = command("predict", classifier, a, "--out", out, *words)
        assert code == 0
        found["".join(words[1:])] = json.loads((out / "a.json").read_text())["classes"]
        # An average of 3 steps without a ramp: 0.9³.
        assert ("73 % of the average (train.ema 0.9)" in done.stderr) == ("raw" not in words)
    assert found[""] == found["ema"] != found["raw"]


def test_a_threshold_has_no_meaning_for_label_maps(tmp_path: Path) -> None:
    tree = tiny_recipe("semantic", "data")
    save_model(tmp_path / "run", tree, model_of(validate_recipe(tree, "recipe")))
    code, done = command(
        "predict", tmp_path / "run", photo(tmp_path / "a.png"), "--out", tmp_path / "out", "--threshold", "0.5"
    )
    assert code == 2
    assert "label maps have no scores" in str(done.exception)
    code, done = command("predict", tmp_path / "run", tmp_path / "a.png", "--out", tmp_path / "out", "--weights", "ema")
    assert code == 2
    assert "holds no average" in str(done.exception)


def test_a_model_of_clips_passes_images_over(tmp_path: Path) -> None:
    from vitgraft.trainer.inputs import find_inputs

    photo(tmp_path / "clips" / "cover.jpg")
    for name, head in {
        "a.mp4": b"\0\0\0\x18ftypmp42",
        "b.bin": b"\0\0\0\x18ftypisom",
        "c.bin": b"\x1aE\xdf\xa3\0\0\0\0",
        "d.heic": b"\0\0\0\x18ftypheic",
        "e.dat": b"RIFF\0\0\0\0AVI LIST",
    }.items():
        (tmp_path / "clips" / name).write_bytes(head)
    found = find_inputs([tmp_path / "clips"], tmp_path / "out", "video")
    assert [given.name for given in found.files] == ["a", "b", "c", "e"]
    assert [path.name for path in found.passed_over] == ["cover.jpg", "d.heic"]


def test_names_that_meet_in_their_outputs_are_kept_apart(tmp_path: Path) -> None:
    from vitgraft.trainer.inputs import find_inputs, outputs_of

    names = ["a.jpg", "a.png", "a.jpg.jpg", "b.jpg", "b.labels.jpg", "c.d.png"]
    for name in names:
        photo(tmp_path / name)
    found = find_inputs([tmp_path], tmp_path / "out", "semantic").files
    assert len({path for given in found for path in outputs_of(given.name, Path())}) == 3 * len(names)
    assert {given.path.name: given.name for given in found}["c.d.png"] == "c.d"


def test_inputs_that_once_broke(run: Path, fault_data: Path, tmp_path: Path) -> None:
    for name, expected in {
        "predict_junk": ["a"],
        "predict_sub": ["a", "more/b"],
        "predict_stem": ["a.jpg", "a.png"],
        "predict_exif": ["phone"],
    }.items():
        out = tmp_path / name
        assert command("predict", run, fault_data / name, "--out", out)[0] == 0
        assert written(out) == sorted(f"{stem}.{end}" for stem in expected for end in ("json", "png"))


def test_a_photo_of_a_phone_is_predicted_as_it_is_displayed(run: Path, tmp_path: Path) -> None:
    """Like an upright copy of its pixels; the JSON says which frame its boxes lie in."""
    exif, pixels = Image.Exif(), np.random.RandomState(0).randint(0, 255, (90, 120, 3)).astype(np.uint8)
    exif[0x0112] = 6
    for folder in ("turned", "upright"):
        (tmp_path / folder).mkdir()
    Image.fromarray(pixels).save(tmp_path / "turned" / "a.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1).copy()).save(tmp_path / "upright" / "a.png")
    found = {}
    for folder in ("turned", "upright"):
        out = tmp_path / f"{folder}-out"
        assert command("predict", run, tmp_path / folder, "--out", out, "--threshold", "0")[0] == 0
        found[folder] = json.loads((out / "a.json").read_text())
        width, height = Image.open(out / "a.png").size
        assert width * 120 == height * 90
    turned, upright = found["turned"], found["upright"]
    assert (turned.pop("orientation"), upright.pop("orientation")) == (6, 1)
    assert (turned["frame"], turned["height"], turned["width"]) == ("displayed", 120, 90)
    assert turned.pop("input") != upright.pop("input")
    assert turned == upright


def test_values_of_12_bits_need_the_range_of_the_training_data(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    values = np.linspace(0, 4095, 96 * 96).astype(np.uint16).reshape(96, 96)
    Image.fromarray(values).save(tmp_path / "in" / "a.png")
    code, done = command("predict", run, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 3
    assert "pass --range 0,4095" in str(done.exception)
    assert command("predict", run, tmp_path / "in", "--out", tmp_path / "out", "--range", "0,4095")[0] == 0


def test_outputs_of_other_commands_spare_the_run(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = contents(copy)
    checkpoint = copy / "checkpoints" / "step-00000003"
    shard = checkpoint / "rank-00000.safetensors"
    for out in (copy / "config.yaml", shard):
        code, done = command("evaluate", copy, "--data", tmp_path, "--out", out)
        assert code == 2
        assert "over an input" in str(done.exception)
    code, done = command("export", copy, "--format", "safetensors", "--out", shard, "--overwrite")
    assert code == 2
    assert "over an input" in str(done.exception)
    assert contents(copy) == before


def test_out_that_is_a_file_is_refused_before_the_first_prediction(run: Path, tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png")
    (tmp_path / "notes.txt").write_text("mine")
    code, done = command("predict", run, tmp_path / "in", "--out", tmp_path / "notes.txt", "--device", "cpu")
    assert code == 2
    assert str(done.exception).endswith("notes.txt: a file; name a folder, which may be new")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_run_is_told_so(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png")
    code, done = command("predict", tmp_path / "in", tmp_path / "in", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 4
    assert "in: no checkpoints/ in it; name a run that has committed one" in str(done.exception)
