"""The code version of manifests, from checkouts made here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from vitgraft.trainer.checkpoint import code_version as module

RELEASED = version("vitgraft")


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module.code_version.__wrapped__


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=A", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True).stdout


def test_a_checkout_adds_its_commit(tmp_path: Path, read: Callable[[], str]) -> None:
    assert read() == RELEASED
    git(tmp_path, "init")
    assert read() == RELEASED, "nothing is committed yet"
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v9", "-m", "a tag is no version of the package")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD").strip()
    assert read() == f"{RELEASED}+g{commit}"
    (tmp_path / "file").write_text("two")
    assert read() == f"{RELEASED}+g{commit}.dirty"


def test_a_checkout_around_the_package_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[], str]
) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "of something else")
    assert read() != RELEASED
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path / "site-packages")
    assert read() == RELEASED


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git_the_version_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[], str], error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(subprocess, "run", fail)
    assert read() == RELEASED
