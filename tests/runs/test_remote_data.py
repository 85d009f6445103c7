"""Whole runs over data behind a URL, with damaged samples that the recipe lets be skipped."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_folder import HttpFolder
from support import history, tiny_recipe, train, vitgraft, write_recipe

from vitgraft.configs.hashing import sha256_file
from vitgraft.data_shards.manifest import dump_manifest, make_manifest, read_manifest

pytestmark = pytest.mark.slow


@pytest.fixture
def served(semantic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpFolder]:
    """Twenty-two scenes, of which 3 and 9 were broken before they were hashed."""
    folder = Path(shutil.copytree(semantic_data / "train", tmp_path / "served"))
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        members = [member for member in tar if member.name in ("000000003.jpg", "000000009.jpg")]
    with shard.open("r+b") as stream:
        for member in members:
            stream.seek(member.offset_data)
            stream.write(b"\0" * member.size)
    old = read_manifest(folder)
    shards = [old.shards[0].model_copy(update={"sha256": sha256_file(shard)})]
    manifest = make_manifest(old.kind, old.classes, old.category_ids, shards, old.source)
    (folder / "manifest.json").write_text(dump_manifest(manifest))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VITGRAFT_CACHE", str(tmp_path / "cache"))
    with HttpFolder(folder) as server:
        yield server


def recipe(server: HttpFolder, folder: Path, budget: int, **settings: Any) -> Path:
    # SGD, as AdamW turns a gradient that is zero but for the order of sums into a whole step.
    sgd = {"name": "sgd", "lr": 0.01}
    fixed: dict[str, Any] = {"data__on_error": {"skip": budget}, "train__steps": 8, "train__optimizer": sgd}
    tree = tiny_recipe("semantic", server.url, **fixed, **settings)
    return write_recipe(folder / f"skip-{budget}.yaml", tree)


def skipped(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def test_the_same_entries_are_skipped_in_every_world_and_the_run_goes_on(served: HttpFolder, tmp_path: Path) -> None:
    file = recipe(served, tmp_path, 2)
    train(file, tmp_path / "two")
    train(file, tmp_path / "one", "--processes", "1", "--set", "data.workers=2")
    rows = skipped(tmp_path / "two")
    assert rows == skipped(tmp_path / "one")
    # Eight steps of four: all of one epoch and the start of the next.
    assert {row["sample"] for row in rows} == {3, 9}
    assert all("shard-000000.tar" in row["reason"] and "broken image" in row["reason"] for row in rows)
    two, one = history(tmp_path / "two"), history(tmp_path / "one")
    for step in range(1, 9):
        # After the first a ReLU may open on a last bit (test_worlds.py).
        assert math.isclose(two[step]["loss"], one[step]["loss"], rel_tol=1e-5 if step == 1 else 1e-3)
    # With loader processes their memory is in the log, without there is none.
    assert all(row["loader_memory"] > 1 << 20 for row in one.values())
    assert all(row["loader_memory"] == 0 for row in two.values())
    # All processes of both runs fetched the shard once.
    assert (served.requests["shard-000000.tar"], served.requests["shard-000000.idx"]) == (1, 1)


def test_the_budget_ends_the_run_and_a_larger_one_goes_on(served: HttpFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"train__checkpoint": {"every_steps": 1, "keep_last": 2}}
    done = vitgraft("train", recipe(served, tmp_path, 1, **settings), "--run-dir", run)
    assert done.returncode == 3
    line = done.stderr.strip().splitlines()[-1]
    assert "2 samples cannot be read, data.on_error.skip allows 1" in line
    assert "Traceback" not in done.stderr
    train(recipe(served, tmp_path, 2, **settings), run)
    found = skipped(run)
    assert {row["sample"] for row in found} == {3, 9}
    assert {row["attempt"] for row in found} == {1, 2}
