"""``vitgraft checkpoints``: what is listed, verified and pruned."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from model_checkpoints import model_of, save_model
from support import tiny_recipe, vitgraft

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.load import validate_recipe
from vitgraft.launch.inspection import list_checkpoints, verify_lines
from vitgraft.launch.pruning import Wanted, prune
from vitgraft.trainer.checkpoint.read import open_checkpoint

FIGURES = {2: 0.5, 4: 0.9, 6: 0.7}
SETTINGS: dict[str, Any] = {
    "model__backbone__frozen": True,
    "train__checkpoint": {"every_steps": 2, "keep_last": 2},
    "evaluate__every_checkpoints": 1,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, all but the last evaluated, with one frozen trunk; a blob that nobody names."""
    run = tmp_path / "run"
    tree = tiny_recipe("video", "data", "data", **SETTINGS)
    model = model_of(validate_recipe(tree, "recipe"))
    for step in (2, 4, 6, 8):
        save_model(run, tree, model, step=step)
    (run / "results").mkdir()
    for step, figure in FIGURES.items():
        metrics = {"metrics": {"top1": figure, "top5": 1.0}}
        (run / "results" / f"step-{step:08d}.json").write_text(json.dumps(metrics))
    (run / "blobs" / ("0" * 64)).write_bytes(b"of a start that was set aside")
    return run


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage(run: Path, step: int) -> None:
    shard = folder(run, step) / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def blobs(run: Path) -> int:
    return len(list((run / "blobs").iterdir()))


def test_the_list(run: Path) -> None:
    damage(run, 6)
    (folder(run, 2) / "buffers.safetensors").unlink()
    fast = {listed.step: listed for listed in list_checkpoints(run)}
    assert {step: listed.state for step, listed in fast.items()} == {
        2: "invalid",
        4: "complete",
        6: "complete",
        8: "complete",
    }
    hashed = {listed.step: listed for listed in list_checkpoints(run, hashes=True)}
    assert {step: listed.state for step, listed in hashed.items()} == {
        2: "invalid",
        4: "valid",
        6: "invalid",
        8: "valid",
    }
    assert "buffers.safetensors: is missing" in str(hashed[2].problem)
    assert "SHA-256" in str(hashed[6].problem)
    assert [step for step, listed in fast.items() if listed.latest] == [8]
    assert [step for step, listed in fast.items() if listed.best] == [4]
    assert fast[4].metrics == {"top1": 0.9, "top5": 1.0}
    assert fast[4].bytes == sum(path.stat().st_size for path in folder(run, 4).glob("*.safetensors"))
    line = fast[4].as_line()
    assert line.startswith("step-00000004  complete")
    assert "top1 0.900" in line
    assert line.endswith("best")
    assert "INVALID" in hashed[6].as_line()
    done = vitgraft("checkpoints", "list", run, "--json")
    rows = json.loads(done.stdout)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[3]["latest"] is True
    assert rows[1]["zero_stage"] == 2


def test_verify(run: Path) -> None:
    assert [line.split()[1] for line in verify_lines(run)] == ["valid"] * 4
    seen: list[tuple[int, int]] = []
    list(verify_lines(folder(run, 4), lambda done, total: seen.append((done, total))))
    assert seen[-1][0] == seen[-1][1] > 0
    damage(run, 4)
    done = vitgraft("checkpoints", "verify", run)
    assert done.returncode == 4
    assert "step-00000004  INVALID" in done.stdout
    assert "damaged: step-00000004" in done.stderr
    assert vitgraft("checkpoints", "verify", folder(run, 4)).returncode == 4


def test_prune_by_the_recipe(run: Path) -> None:
    """The newest two stay; the dry run says the same and deletes nothing."""
    said = list(prune(run, Wanted(), dry_run=True))
    assert [line.split()[0] for line in said if "would be deleted" in line] == [
        "step-00000002",
        "step-00000004",
        "blobs/000000000000…",
    ]
    assert (steps(run), blobs(run)) == ([2, 4, 6, 8], 2)
    done = vitgraft("checkpoints", "prune", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  deleted  ") == 3
    assert (steps(run), blobs(run)) == ([6, 8], 1)
    assert [line.split()[1] for line in verify_lines(run)] == ["valid"] * 2


def test_prune_by_options(run: Path) -> None:
    list(prune(run, Wanted(keep_last=1, keep_every=3, keep_best="top1")))
    assert steps(run) == [4, 6, 8]
    with pytest.raises(ConfigError, match="--keep-best mIoU: no metric of video; use one of top1, top5"):
        list(prune(run, Wanted(keep_best="mIoU")))
    assert vitgraft("checkpoints", "prune", run, "--keep-last", "0").returncode == 2


def test_prune_says_that_nothing_is_to_be_deleted(run: Path) -> None:
    """The first takes a blob that no checkpoint names."""
    assert vitgraft("checkpoints", "prune", run, "--keep-last", "9").stdout != ""
    done = vitgraft("checkpoints", "prune", run, "--keep-last", "9", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing to delete: the policy keeps every checkpoint" in done.stderr


def test_an_invalid_one_is_not_counted_and_not_deleted(run: Path) -> None:
    """Complete but damaged: the last valid one stays although newer files lie there."""
    for step in (6, 8):
        damage(run, step)
    said = list(prune(run, Wanted(keep_last=1)))
    assert steps(run) == [4, 6, 8]
    assert sum("left, INVALID" in line for line in said) == 2


def test_what_is_read_or_awaits_its_evaluation_stays(run: Path) -> None:
    (run / "results" / "step-00000004.json").unlink()
    with open_checkpoint(folder(run, 2)).reading():
        said = list(prune(run, Wanted(keep_last=1)))
    assert steps(run) == [2, 4, 8]
    assert "step-00000002  left, somebody reads it" in said
    assert "step-00000004  left, it awaits its evaluation" in said


def test_a_blob_stays_while_anybody_may_want_it(run: Path) -> None:
    """A checkpoint whose manifest cannot be read may name it, and so may one that was set aside."""
    manifest = folder(run, 8) / "manifest.json"
    text = manifest.read_text()
    for damaged in ("{", None):
        manifest.write_text(damaged) if damaged else manifest.unlink()
        list(prune(run, Wanted()))
        assert blobs(run) == 2
    manifest.write_text(text)
    (run / "set-aside-1").mkdir()
    for step in (4, 6):
        folder(run, step).rename(run / "set-aside-1" / f"step-{step:08d}")
    tree = json.loads(text)
    del tree["digest"]
    edited = {**tree, "frozen": None}
    manifest.write_text(json.dumps({**edited, "digest": sha256_of(edited)}))
    list(prune(run, Wanted()))
    assert (steps(run), [path.name for path in (run / "blobs").iterdir()]) == ([8], [tree["frozen"]])


def test_a_run_that_somebody_owns_is_left_alone(run: Path) -> None:
    with (run / "lock").open("a+") as lock:
        lock.write("pid 7 on here\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"owned by a running attempt \(pid 7 on here\)"):
            list(prune(run, Wanted(keep_last=1)))
        assert "step-00000006  would be deleted" in "\n".join(prune(run, Wanted(keep_last=1), dry_run=True))
    assert steps(run) == [2, 4, 6, 8]
