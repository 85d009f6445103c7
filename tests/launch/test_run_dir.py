"""The run directory at a start: what is moved aside, and where it may lie."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.errors import ConfigError
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
