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

from vitgraft.configs.errors import ConfigError, TrainingError
from vitgraft.launch.run_dir import open_run
from vitgraft.trainer.checkpoint.commit import set_aside
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
    ("number", "error", "text"),
    [
        (errno.ENOSPC, TrainingError, "no room for another attempt: No space left on device; make room"),
        (errno.EDQUOT, TrainingError, "no room for another attempt: Disk quota exceeded; make room"),
        (errno.EROFS, ConfigError, "cannot be written: Read-only file system"),
    ],
)
def test_a_full_disk_between_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[ConfigError], text: str
) -> None:
    run, recipe = make_run(tmp_path)
    handle = open_run(run, recipe, "auto")

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("vitgraft.launch.run_dir.replace_text", full)
    with pytest.raises(error, match=text) as caught:
        handle.next_attempt()
    assert caught.value.cause == ("no_space" if error is TrainingError else None)
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
