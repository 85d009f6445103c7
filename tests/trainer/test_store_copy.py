"""Copies of committed checkpoints in a store: what arrives, in which order, and what a failing store does."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support import tiny_recipe
from support_checkpoints import write
from support_writers import Told, checkpointer, make_ranks, make_run, poll_until_idle

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.hashing import sha256_of
from vitgraft.configs.load import validate_recipe
from vitgraft.trainer.checkpoint import store_copy
from vitgraft.trainer.checkpoint.handover import BUFFER_VARIABLE
from vitgraft.trainer.checkpoint.layout import MANIFEST
from vitgraft.trainer.checkpoint.read import newest_valid, open_checkpoint
from vitgraft.trainer.checkpoint.retention import delete
from vitgraft.trainer.checkpoint.savers import make_saver
from vitgraft.trainer.checkpoint.store_copy import StoreCopy, check_store, copy_checkpoint


class Flaky(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """A store in memory that writes down what it is sent, and fails as often as it is told."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    sent: list[str] = []
    failures = 0
    gate = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        Flaky.gate.wait(20)
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise RuntimeError("the store has hiccups")
        Flaky.sent.append(rpath)
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        Flaky.sent.append(path)
        super().pipe_file(path, value, **options)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.sent.clear()
    Flaky.failures = 0
    Flaky.gate.set()


def frozen(run: Path, step: int) -> Path:
    """A checkpoint with a frozen blob (its content is not looked at here)."""
    path = write(run, step)
    tree = json.loads((path / MANIFEST).read_text()) | {"frozen": "a" * 64}
    del tree["digest"]
    (path / MANIFEST).write_text(json.dumps({**tree, "digest": sha256_of(tree)}))
    (run / "blobs").mkdir(exist_ok=True)
    (run / "blobs" / ("a" * 64)).write_bytes(b"trunk")
    return path


def test_a_copied_run_is_a_run(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    for step in (1, 2):
        copy_checkpoint(open_checkpoint(write(run, step)), f"file://{tmp_path}/store")
    found, invalid = newest_valid(tmp_path / "store")
    assert found is not None
    assert (found.step, invalid) == (2, [])
    assert (tmp_path / "store" / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert (tmp_path / "store" / "checkpoints" / "latest").read_text() == "step-00000002\n"
    files = {path.name for path in (tmp_path / "store" / "checkpoints" / "step-00000001").iterdir()}
    assert files == {path.name for path in (run / "checkpoints" / "step-00000001").iterdir()}


def test_blobs_come_first_and_the_manifest_last(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    checkpoint = open_checkpoint(frozen(run, 1))
    copy_checkpoint(checkpoint, "flaky://bucket/here")
    folder = "/bucket/here/checkpoints/step-00000001"
    assert Flaky.sent[:2] == ["/bucket/here/config.yaml", "/bucket/here/blobs/" + "a" * 64]
    assert Flaky.sent[-2:] == [f"{folder}/manifest.json", "/bucket/here/checkpoints/latest"]
    assert len(Flaky.sent) == 7
    Flaky.sent.clear()
    copy_checkpoint(checkpoint, "flaky://bucket/here")
    assert Flaky.sent == [], "what is there already is not sent again"
    copy_checkpoint(open_checkpoint(frozen(run, 2)), "flaky://bucket/here")
    assert not any("blobs" in path for path in Flaky.sent), "a blob is sent once"


def test_an_earlier_attempts_copy_is_replaced_and_never_mixed(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    path = write(run, 1)
    copy_checkpoint(open_checkpoint(path), "flaky://b")
    (path / MANIFEST).write_text((path / MANIFEST).read_text() + "\n")
    Flaky.failures = 2  # config.yaml and then the first file: the copy is cut short twice
    for _ in range(2):
        with pytest.raises(RuntimeError):
            copy_checkpoint(open_checkpoint(path), "flaky://b")
        assert "/b/checkpoints/step-00000001/manifest.json" not in Flaky.store
    copy_checkpoint(open_checkpoint(path), "flaky://b")
    assert Flaky.store["/b/checkpoints/step-00000001/manifest.json"].getvalue() == (path / MANIFEST).read_bytes()


@pytest.mark.parametrize("damaged", ["checkpoints/step-00000001/rank-00001.safetensors", "blobs/" + "a" * 64])
@pytest.mark.parametrize("lost", [False, True], ids=["cut short", "lost"])
def test_a_copy_that_is_not_whole_is_made_again_though_its_manifest_is_there(
    tmp_path: Path, damaged: str, lost: bool
) -> None:
    """E.g. because two writers met."""
    run, _ = make_run(tmp_path / "run")
    checkpoint, store = open_checkpoint(frozen(run, 1)), tmp_path / "store"
    copy_checkpoint(checkpoint, f"file://{store}")
    (store / damaged).write_bytes(b"x")
    if lost:
        (store / damaged).unlink()
    copy_checkpoint(checkpoint, f"file://{store}")
    assert (store / damaged).read_bytes() == (run / damaged).read_bytes()
    assert open_checkpoint(store / "checkpoints" / "step-00000001").manifest == checkpoint.manifest


def test_a_store_with_hiccups_is_tried_again(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    warnings: list[str] = []
    Flaky.failures = 3
    copy = StoreCopy(run, "flaky://user:secret@b", warnings.append, first_delay=0.01)
    copy.offer(write(run, 1))
    copy.close()
    assert warnings == []
    assert "/b/checkpoints/step-00000001/manifest.json" in {path.replace("user:secret@", "") for path in Flaky.store}


def test_a_store_that_fails_warns_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer does not wait for it, and secrets of the URL are not shown."""
    monkeypatch.setattr(store_copy, "LONGEST_DELAY", 0.01)
    checkpoint = {"every_steps": 1, "keep_last": 5, "copy_to": "flaky://user:secret@bucket"}
    run, recipe = make_run(tmp_path, train__checkpoint=checkpoint)
    Flaky.failures = 10**9
    ranks, paths = make_ranks(run, 1)
    role = checkpointer(run, recipe, paths)
    role._copy._first_delay = 0.01  # type: ignore[union-attr]
    ranks[0].hand_over(1)
    poll_until_idle(role)
    answer = ranks[0].answer()
    assert answer is not None
    assert answer.error is None
    drain = threading.Event()
    drain.set()
    role.serve(drain)
    assert isinstance(role.reporter, Told)
    (event,) = [message for message in role.reporter.messages if message["kind"] == "event"]
    assert event["name"] == "copy_failed"
    assert "WARNING step-00000001 was not copied to flaky://bucket" in event["text"]
    assert "hiccups" in event["text"]
    assert "secret" not in event["text"]


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_who_is_in_a_hurry_does_not_wait_for_the_store(tmp_path: Path, delay: float) -> None:
    """Asked at once or while it waits; the next start copies the newest."""
    settings = {"every_steps": 1, "copy_to": "flaky://b"}
    run, recipe = make_run(tmp_path, train__checkpoint=settings)
    write(run, 1)
    Flaky.gate.clear()
    drain, drop = threading.Event(), threading.Event()
    drain.set()
    threading.Timer(delay, drop.set).start()
    started = time.monotonic()
    checkpointer(run, recipe, make_ranks(run, 1)[1]).serve(drain, drop)
    assert delay <= time.monotonic() - started < 10
    assert not Flaky.store
    Flaky.gate.set()
    checkpointer(run, recipe, make_ranks(run, 1)[1]).serve(drain)
    assert "/b/checkpoints/step-00000001/manifest.json" in Flaky.store


def test_whatever_goes_wrong_the_next_one_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)
    real, told = open_checkpoint, []

    def broken(path: Path) -> Any:
        if path.name.endswith("1"):
            raise PermissionError("not today")
        return real(path)

    monkeypatch.setattr(store_copy, "open_checkpoint", broken)
    warned = threading.Event()
    copy = StoreCopy(run, "flaky://b", lambda text: (told.append(text), warned.set())[0])
    copy.offer(write(run, 1))
    assert warned.wait(10)
    copy.offer(write(run, 2))
    copy.close()
    assert told == [
        "WARNING step-00000001 was not copied to flaky://b (PermissionError: not today); training goes on, and the "
        "next checkpoint is tried again"
    ]
    assert "/b/checkpoints/step-00000002/manifest.json" in Flaky.store


def test_of_several_that_wait_the_newest_wins(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    Flaky.gate.clear()
    copy = StoreCopy(run, "flaky://b", lambda text: None)
    copy.offer(write(run, 1))
    time.sleep(0.2)  # the first has begun
    for step in (2, 3, 4):
        copy.offer(write(run, step))
    assert delete(run, [1, 2, 3]) == ["step-00000002", "step-00000003"], "what is being copied is not deleted"
    Flaky.gate.set()
    copy.close()
    steps = {path.split("/")[3] for path in Flaky.store if path.endswith(MANIFEST)}
    assert steps == {"step-00000001", "step-00000004"}


def test_a_successor_finishes_an_interrupted_copy(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path, train__checkpoint={"every_steps": 1, "copy_to": f"file://{tmp_path}/store"})
    write(run, 1)
    drain = threading.Event()
    drain.set()
    checkpointer(run, recipe, make_ranks(run, 1)[1]).serve(drain)
    assert newest_valid(tmp_path / "store")[0] is not None


def test_copies_that_no_role_would_make_are_refused_or_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = {"copy_to": "file:///store"}
    with pytest.raises(ConfigError, match=r"train\.checkpoint\.copy_to: train\.roles inline .* or roles to separate"):
        validate_recipe(tiny_recipe("semantic", "t", train__roles="inline", train__checkpoint=checkpoint), "test")
    monkeypatch.delenv(BUFFER_VARIABLE, raising=False)
    told: list[str] = []
    for settings in ({}, checkpoint):
        _, recipe = make_run(tmp_path, train__checkpoint=settings)
        reporter = Told()
        make_saver(recipe, None, None, 1, reporter)  # type: ignore[arg-type]
        told += reporter.texts()
    assert ["not copied to train.checkpoint.copy_to" in text for text in told] == [False, True]


@pytest.mark.parametrize("url", ["nosuch://bucket", "a::b://c"])
def test_an_unknown_kind_of_store_is_refused_before_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.checkpoint\.copy_to: "):
        check_store(url)
