"""Which checkpoint a start goes on from, and what it must not forget of it: nothing starts afresh, or from an older
one, behind anybody's back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support_checkpoints import write
from support_writers import make_run

from vitgraft.configs.errors import CheckpointError
from vitgraft.launch.run_dir import open_run
from vitgraft.trainer.checkpoint.commit import COMMITTED


@pytest.mark.parametrize("name", ["set-aside-1/step-00000006", "checkpoints/best"])
def test_only_what_a_restart_would_find_can_be_named(tmp_path: Path, name: str) -> None:
    """A restart before the next commit would go on from another checkpoint, or from the start."""
    run, recipe = make_run(tmp_path)
    for step in (3, 6):
        write(run, step)
    chosen, place = run / name, run / "checkpoints" / "step-00000006"
    chosen.parent.mkdir(exist_ok=True)
    place.rename(chosen)
    with pytest.raises(CheckpointError, match=rf"not among the run's checkpoints; move it back to {place} and"):
        open_run(run, recipe, str(chosen))
    chosen.rename(place)
    handle = open_run(run, recipe, str(place))
    assert handle.resume is not None
    assert handle.resume.step == 6
    handle.next_attempt()
    assert handle.resume.step == 6
    handle.close()


def test_one_that_lies_on_another_disk_can_be_named(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path / "run")
    write(run, 3)
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    handle = open_run(run, recipe, str(run / "checkpoints" / "step-00000003"))
    handle.close()
    assert handle.resume is not None


@pytest.mark.parametrize("resume", ["auto", "checkpoints/step-00000003"])
def test_a_run_that_does_not_know_of_its_checkpoints_learns_of_them_at_a_start(tmp_path: Path, resume: str) -> None:
    """E.g. one that was brought back from the store: when its checkpoints are lost again it does not start afresh."""
    run, recipe = make_run(tmp_path)
    write(run, 3)
    (run / COMMITTED).unlink()
    handle = open_run(run, recipe, resume if resume == "auto" else str(run / resume))
    handle.close()
    assert handle.resume is not None
    assert (run / COMMITTED).read_text() == "step-00000003\n"
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="are gone"):
        open_run(run, recipe, "auto")
