"""The run directory at a start: what is moved aside, and where it may lie."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.errors import CheckpointError, ConfigError, TrainingError
from vitgraft.launch import run_dir
from vitgraft.launch.run_dir import open_run
from vitgraft.trainer.checkpoint.commit import set_aside, temporary_folder
from vitgraft.trainer.checkpoint.retention import figures_of, result_path


def test_results_of_later_steps_go_with_their_checkpoints(tmp_path: Path) -> None:
    """They would be taken for those of the checkpoints that are written again under these names."""
    run, recipe = make_run(tmp_path)
    for step in (3, 6):
        write(run, step)
    for step in (3, 6, 9):  # retention took 9, or a kill came between
        result_path(run, step).write_text('{"metrics": {"mIoU": 0.5}}')
    handle = open_run(run, recipe, str(run / "checkpoints" / "step-00000003"))
    handle.close()
    assert figures_of(run, [3, 6, 9]) == {3: {"mIoU": 0.5}}
    aside = {path.name for path in (run / "set-aside-1").iterdir()}
    assert aside == {"reason.txt", "step-00000006", "step-00000006.json", "step-00000009.json"}
    assert handle.notes == [f"step-00000006 moved to {run / 'set-aside-1'}"]


def test_what_lies_on_another_disk_is_set_aside_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)
    write(run, 3)
    real = os.rename

    def rename(old: Any, new: Any) -> None:
        if "set-aside" in str(new):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    target = set_aside(run, ["checkpoints/step-00000003"], "a test")
    assert {path.name for path in (target / "step-00000003").iterdir()} >= {"manifest.json", "rank-00001.safetensors"}
    assert not list((run / "checkpoints").glob("step-*"))


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    _, recipe = make_run(tmp_path / "other")
    path = tmp_path / os.fsdecode(b"run-\xff")
    with pytest.raises(ConfigError, match=r"--run-dir b'.*run-\\xff': the path is not UTF-8"):
        open_run(path, recipe, "auto")
    assert not path.exists()


@pytest.mark.parametrize("look", ["sweep", "newest_valid"])
@pytest.mark.parametrize("between", [False, True], ids=["a start", "between attempts"])
def test_a_run_is_taken_before_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str, between: bool
) -> None:
    """A killed supervisor's ranks on other hosts live on for a while: what they commit while the newest checkpoint is
    searched for would be found neither by this attempt nor by its own save of that step."""
    run, recipe = make_run(tmp_path)
    first = open_run(run, recipe, "auto")
    write(run, 3, attempt=first.attempt)
    if not between:
        first.close()
    real, refused = getattr(run_dir, look), []

    def looking(path: Path) -> Any:
        if not refused:
            with pytest.raises(CheckpointError, match="attempt 1 is stale, attempt 2 owns the run"):
                write(run, 6, attempt=1)
            refused.append(look)
        return real(path)

    monkeypatch.setattr(run_dir, look, looking)
    if between:
        first.next_attempt()
    handle = first if between else open_run(run, recipe, "auto")
    handle.close()
    assert refused
    assert handle.resume is not None
    assert (handle.resume.step, handle.attempt) == (3, 2)


@pytest.mark.parametrize("how", ["deleted", "emptied", "a link to nowhere"])
def test_a_run_that_has_lost_its_checkpoints_does_not_start_afresh_by_itself(tmp_path: Path, how: str) -> None:
    """E.g. because the disk that they lie on is not mounted."""
    run, recipe = make_run(tmp_path / "run")
    write(run, 3)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    if how == "emptied":
        (run / "checkpoints").mkdir()
    elif how == "a link to nowhere":
        (run / "checkpoints").symlink_to(tmp_path / "disk")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"those in .*/checkpoints are gone\); restore.* --resume never"
        ) as caught:
            open_run(run, recipe, "auto")
        assert caught.value.exit_code == 4
    if how == "a link to nowhere":
        (tmp_path / "elsewhere").rename(tmp_path / "disk")
        handle = open_run(run, recipe, "auto")
        assert handle.resume is not None
    else:
        handle = open_run(run, recipe, "never")
        assert handle.resume is None
        assert not (run / "metrics.jsonl").exists()
        handle.close()
        handle = open_run(run, recipe, "auto")
        assert handle.resume is None
    handle.close()


def test_a_run_that_failed_before_its_first_commit_starts_afresh_by_itself(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path)
    open_run(run, recipe, "auto").close()
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "blobs").mkdir()
    (run / "blobs" / ("a" * 64)).write_bytes(b"trunk")
    temporary_folder(run, 3, 1).mkdir()
    handle = open_run(run, recipe, "auto")
    handle.close()
    assert (handle.resume, handle.notes) == (None, [])


def test_a_run_that_another_supervisor_has_taken_is_left_to_it(tmp_path: Path) -> None:
    """Where locks do not reach across hosts, two commands may both go on with a run."""
    run, recipe = make_run(tmp_path)
    handle = open_run(run, recipe, "auto")
    handle.next_attempt()
    assert handle.attempt == 2
    (run / "attempt").write_text("7\n")
    with pytest.raises(ConfigError, match=r"another supervisor owns the run now \(attempt 7; this one's was 2\)"):
        handle.next_attempt()
    assert (run / "attempt").read_text() == "7\n"
    (run / "attempt").unlink()
    handle.next_attempt()
    assert (run / "attempt").read_text() == "3\n"
    handle.close()


@pytest.mark.parametrize(
    ("number", "cause", "text"),
    [
        (errno.ENOSPC, "no_space", "No space left on device; make room"),
        (errno.EDQUOT, "no_space", "Disk quota exceeded; make room"),
        (errno.EROFS, "read_only", "Read-only file system; make it writable"),
        (errno.EACCES, "read_only", "Permission denied; make it writable"),
        (errno.EIO, None, "Input/output error"),
    ],
)
def test_a_disk_that_cannot_be_written_between_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cause: str | None, text: str
) -> None:
    run, recipe = make_run(tmp_path)
    handle = open_run(run, recipe, "auto")

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("vitgraft.launch.run_dir.replace_text", full)
    with pytest.raises(
        ConfigError if cause is None else TrainingError, match=rf"cannot be written.*: {text}"
    ) as caught:
        handle.next_attempt()
    assert caught.value.cause == cause
    handle.close()
    # At the start it is a matter of where to run.
    with pytest.raises(ConfigError, match=os.strerror(number)):
        open_run(run, recipe, "auto")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run, recipe = make_run(tmp_path)

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=rf"no locks \({os.strerror(number)}\).*Lustre: flock; NFS.*another folder"):
        open_run(run, recipe, "auto")
