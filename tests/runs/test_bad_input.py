"""Whatever is wrong: one clear line, the right exit code, nothing half-written, no process left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import losses, processes_naming, rows, start, tiny_recipe, train, vitgraft, wait_until, write_recipe


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *fragments: str) -> None:
    """One line that says it, no traceback."""
    assert done.returncode == code, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("vitgraft: "), done.stderr
    for fragment in fragments:
        assert fragment in line, line
    assert "Traceback" not in done.stderr


def semantic(data: Path, **settings: Any) -> dict[str, Any]:
    return tiny_recipe("semantic", data / "train", data / "val", **settings)


def refused_training(tree: dict[str, Any], folder: Path, code: int, *fragments: str) -> None:
    """Training is refused, and afterwards nothing lives and no checkpoint exists."""
    run = folder / "run"
    done = vitgraft("train", write_recipe(folder / "recipe.yaml", tree), "--run-dir", run)
    assert_refused(done, code, *fragments)
    assert not list(run.glob("checkpoints/step-*"))
    wait_until(lambda: not processes_naming(run), seconds=15)


def test_usage() -> None:
    assert vitgraft("train").returncode == 2
    assert vitgraft("nonsense").returncode == 2
    assert_refused(vitgraft("train", "no/such/recipe"), 2, "no such recipe file")


def test_missing_data(tmp_path: Path) -> None:
    refused_training(tiny_recipe("semantic", tmp_path / "nowhere"), tmp_path, 3, "nowhere", "no such folder")
    assert not (tmp_path / "run").exists()


def test_truncated_tar(semantic_data: Path, tmp_path: Path) -> None:
    shutil.copytree(semantic_data, tmp_path / "data")
    shard = tmp_path / "data" / "train" / "shard-000000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    refused_training(semantic(tmp_path / "data"), tmp_path, 3, "shard-000000.tar", "expected")


def test_broken_image(semantic_data: Path, tmp_path: Path) -> None:
    """Found while training: the run stops, naming the sample, and leaves nothing running."""
    shutil.copytree(semantic_data, tmp_path / "data")
    shard = tmp_path / "data" / "train" / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name == "000000007.jpg")
    with shard.open("r+b") as stream:
        stream.seek(member.offset_data)
        stream.write(b"\0" * member.size)
    refused_training(semantic(tmp_path / "data", data__workers=1), tmp_path, 3, "000000007")


def test_wrong_kind_of_data(detection_data: Path, tmp_path: Path) -> None:
    refused_training(semantic(detection_data), tmp_path, 2, "data.train.path", "holds detection samples")


def test_class_lists_that_do_not_fit(detection_data: Path, semantic_data: Path, tmp_path: Path) -> None:
    tree = semantic(semantic_data, model__head__num_classes=5)
    refused_training(tree, tmp_path, 2, "model.head.num_classes: 5", "has 11 classes")
    images, labels = tmp_path / "images", tmp_path / "labels"
    from PIL import Image

    for folder, mode in ((images, "RGB"), (labels, "L")):
        folder.mkdir()
        Image.new(mode, (32, 32)).save(folder / "a.png")
    packed = vitgraft(
        "shards",
        "pack",
        "semantic",
        "--images",
        images,
        "--labels",
        labels,
        "--classes",
        "x,y",
        "--out",
        tmp_path / "other",
    )
    assert packed.returncode == 0, packed.stderr
    tree = semantic(semantic_data)
    tree["data"]["val"]["path"] = str(tmp_path / "other")
    refused_training(tree, tmp_path, 3, "data.val.path", "other classes")


def test_a_world_that_cannot_carry_the_batch(semantic_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", semantic(semantic_data))
    done = vitgraft("train", recipe, "--run-dir", tmp_path / "run", "--processes", "3")
    assert_refused(done, 2, "possible worlds: 1, 2, 4")


def test_port_in_use(semantic_data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused_training(semantic(semantic_data, launch__port=port), tmp_path, 2, f"launch.port: {port}", "in use")


def test_a_changed_recipe_is_not_resumed(unbroken: Path, detection_recipe: Path) -> None:
    before = losses(unbroken)
    done = vitgraft("train", detection_recipe, "--run-dir", unbroken, "--set", "train.seed=9")
    assert_refused(done, 2, "train.seed was 0, now 9", "--run-dir")
    assert losses(unbroken) == before


def test_a_checkpoint_of_another_model(unbroken: Path, semantic_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", semantic(semantic_data))
    foreign = unbroken / "checkpoints" / "step-00000020"
    done = vitgraft("train", recipe, "--run-dir", tmp_path / "run", "--resume", foreign)
    assert_refused(done, 4, "a checkpoint of another run")
    # The same files under another recipe: evaluate must see that the model does not fit.
    fake = tmp_path / "fake"
    shutil.copytree(unbroken / "checkpoints", fake / "checkpoints")
    shutil.copy(recipe, fake / "config.yaml")
    assert_refused(vitgraft("evaluate", fake, "--data", semantic_data / "val"), 3, "class")
    config = (unbroken / "config.yaml").read_text().replace("embed_dim: 32", "embed_dim: 64")
    (fake / "config.yaml").write_text(config)
    assert_refused(vitgraft("evaluate", fake), 4, "a checkpoint of another model", "has shape")


def test_damaged_checkpoints(unbroken: Path, detection_recipe: Path, tmp_path: Path) -> None:
    """The newest is damaged: the one before is used, loudly. All are damaged: refuse to start afresh, unless told."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shard = run / "checkpoints" / "step-00000020" / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert_refused(vitgraft("checkpoints", "verify", run), 4, "step-00000020")
    done = train(detection_recipe, run)
    assert "WARNING step-00000020 is invalid" in done.stderr
    assert "step-00000018" in done.stderr
    assert losses(run) == losses(unbroken)
    for manifest in run.glob("checkpoints/step-*/manifest.json"):
        manifest.unlink()
    assert_refused(
        vitgraft("train", detection_recipe, "--run-dir", run), 4, "no valid checkpoint is left", "--resume never"
    )


def test_missing_and_empty_runs(tmp_path: Path) -> None:
    assert_refused(vitgraft("checkpoints", "list", tmp_path / "none"), 4, "no such run")
    assert_refused(vitgraft("checkpoints", "verify", tmp_path), 4, "no checkpoints yet")
    assert_refused(vitgraft("evaluate", tmp_path), 4, "no checkpoints/ in it; name a run")


def test_predict_on_bad_inputs(unbroken: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 no image")
    out = tmp_path / "out"
    assert_refused(vitgraft("predict", unbroken, broken, "--out", out), 3, "broken.jpg")
    assert_refused(vitgraft("predict", unbroken, tmp_path / "none.png", "--out", out), 3, "none.png: no such file")
    assert list(out.glob("*.json")) == []


# With loader processes, which must not outlive the run.
ENDLESS: dict[str, Any] = {
    "data__workers": 1,
    "train__steps": 100_000,
    "train__checkpoint": {"every_steps": 100_000},
}


def test_a_second_owner_is_refused_and_ctrl_c_ends_everything(semantic_data: Path, tmp_path: Path) -> None:
    """Ctrl-C: a checkpoint at the end of the step, exit 130, no stray process; the same command then goes on."""
    tree = semantic(semantic_data, **ENDLESS)
    recipe, run = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "run"
    process = start("train", recipe, "--run-dir", run)
    wait_until(lambda: rows(run) >= 3, process=process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted behind a committed checkpoint" in errors
    wait_until(lambda: not processes_naming(run), seconds=15)
    step = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
    process = start("train", recipe, "--run-dir", run)
    wait_until(lambda: rows(run) > step, process=process)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] > step
    # SIGTERM, as a scheduler sends it: exit 75, requeue me.
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    wait_until(lambda: not processes_naming(run), seconds=15)


def test_a_killed_rank_ends_the_run(semantic_data: Path, tmp_path: Path) -> None:
    tree = semantic(semantic_data, **ENDLESS)
    run = tmp_path / "run"
    process = start("train", write_recipe(tmp_path / "recipe.yaml", tree), "--run-dir", run)
    wait_until(lambda: rows(run) >= 2, process=process)
    ranks = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and is_rank(p, run)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 5, errors
    wait_until(lambda: not processes_naming(run), seconds=15)


def is_rank(entry: Path, run: Path) -> bool:
    try:
        line = (entry / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return "vitgraft.trainer.rank" in line and str(run) in line and "multiprocessing" not in line


def test_non_finite_loss_names_the_samples(semantic_data: Path, tmp_path: Path) -> None:
    tree = semantic(semantic_data, train__optimizer={"name": "sgd", "lr": 1e30}, train__clip_grad=0.0)
    done = vitgraft("train", write_recipe(tmp_path / "recipe.yaml", tree), "--run-dir", tmp_path / "run")
    assert_refused(done, 5, "not finite")
    assert "samples: 0000" in done.stderr or "gradient's norm" in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    for _ in range(50):
        if subprocess.run(["umount", folder], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)


def test_full_disk_while_writing_a_checkpoint(semantic_data: Path, tmp_path: Path, small_disk: Path) -> None:
    """Each checkpoint is about a megabyte: some are committed, then one is not; those before it stay valid. The ranks
    hear of it while they train on, long before the next save."""
    tree = semantic(semantic_data, train__checkpoint={"every_steps": 8, "keep_last": 100}, train__steps=200)
    recipe, run = write_recipe(tmp_path / "recipe.yaml", tree), small_disk / "run"
    done = vitgraft("train", recipe, "--run-dir", run)
    assert_refused(done, 5, "no space left", "earlier checkpoints are untouched")
    assert rows(run) % 8
    assert not list(run.glob("checkpoints/*.tmp"))
    listed = vitgraft("checkpoints", "verify", run)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert " valid" in listed.stdout
