"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Machines are shared and slow at times: how long an example takes fails nothing.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# nohup and background jobs of scripts have these ignored, and what the tests start would inherit it.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

_WITH_RANKS = {"runs", "multinode"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts ranks, by folder, so that make test runs it after all else.

    A file stays in one process there, and all hosts do: they share data, runs and a network.
    """
    for item in items:
        if item.path.parent.name in _WITH_RANKS:
            item.add_marker("ranks")
            group = item.path.stem if item.path.parent.name == "runs" else item.path.parent.name
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of test data that ``VITGRAFT_TEST_DATA`` names; skips when it is unset, fails when it is missing."""
    folder = os.environ.get("VITGRAFT_TEST_DATA")
    if folder is None:
        pytest.skip("VITGRAFT_TEST_DATA is not set")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"VITGRAFT_TEST_DATA={folder} is no folder")
    return path


@pytest.fixture(scope="session")
def fault_data(test_data: Path) -> Path:
    """The folder of inputs that once broke something, beside the test data; skips when it is not there."""
    path = test_data.parent / "faults" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path
