"""What a power failure would leave: contents of files and names in folders as they were at their last fsync."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support_checkpoints import manifest_of, write
from support_writers import make_run

from vitgraft.launch.run_dir import open_run
from vitgraft.trainer.checkpoint import commit, layout
from vitgraft.trainer.checkpoint.files import write_safetensors
from vitgraft.trainer.checkpoint.save import store_frozen


class Disk:
    """Remembers what was made durable, and looks at every folder when it gets its final name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[int, object] = {}
        self.renamed: dict[str, list[str]] = {}
        sync, rename = os.fsync, os.rename

        def syncing(descriptor: int) -> None:
            sync(descriptor)
            self.kept[os.fstat(descriptor).st_ino] = content(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

        def renaming(old: Path, new: Path) -> None:
            self.renamed[Path(new).name] = self.lost(Path(old))
            rename(old, new)

        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(os, "rename", renaming)

    def lost(self, top: Path) -> list[str]:
        """What would not be as it is."""
        paths = [top, *(sorted(top.iterdir()) if top.is_dir() else ())]
        return [path.name for path in paths if self.kept.get(path.stat().st_ino) != content(path)]

    def names(self, folder: Path) -> set[str]:
        """What would be in a folder."""
        names = self.kept.get(folder.stat().st_ino, [])
        assert isinstance(names, list)
        return set(names)


def content(path: Path) -> object:
    return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_checkpoint_is_durable_before_it_has_its_name(tmp_path: Path, disk: Disk) -> None:
    run, _ = make_run(tmp_path)
    final = write(run, 3)
    assert disk.renamed == {final.name: [], commit.COMMITTED: [], layout.POINTER: []}
    assert disk.names(final.parent) == {final.name, layout.POINTER}
    assert commit.COMMITTED in disk.names(run)


def test_a_manifest_that_a_killed_writer_did_not_flush_is_durable_too(tmp_path: Path, disk: Disk) -> None:
    """Its successor finds it whole in memory."""
    run, _ = make_run(tmp_path)
    folder = commit.temporary_folder(run, 3, 1)
    folder.mkdir()
    files = [write_safetensors(folder / name, {}) for name in layout.expected_files(1)]
    manifest = layout.seal(manifest_of(run, 3, files, 1))
    (folder / layout.MANIFEST).write_text(manifest.model_dump_json())
    found = commit.interrupted_commit(run, 1, 3)
    assert found is not None
    final = commit.publish(run, found)
    assert disk.renamed[final.name] == []


def test_a_new_run_its_folders_and_its_blobs_are_durable(tmp_path: Path, disk: Disk) -> None:
    _, recipe = make_run(tmp_path / "other")
    run = tmp_path / "above" / "higher" / "run"
    open_run(run, recipe, "auto").close()
    for folder in (run, *run.parents[:2]):
        assert folder.name in disk.names(folder.parent)
    assert {"attempt", "checkpoints", "config.yaml"} <= disk.names(run)
    trunk = torch.nn.Parameter(torch.zeros(7), requires_grad=False)
    digest = store_frozen(run, SimpleNamespace(named_parameters=lambda: [("trunk", trunk)]))  # type: ignore[arg-type]
    assert "blobs" in disk.names(run)
    assert disk.names(run / "blobs") == {digest}
