"""``pytest tests/parity --parity-dir DIR``: one test for every case in the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        type=Path,
        default=None,
        help="folder of NAME.json and NAME.npz with numbers of official implementations; "
        "by default the folder parity under VITGRAFT_TEST_DATA",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A parameter ``case`` for every JSON file; one that skips, or fails, where there are none."""
    if "case" not in metafunc.fixturenames:
        return
    # The option exists where this folder is named on the command line.
    folder = metafunc.config.getoption("--parity-dir", None)
    data = os.environ.get("VITGRAFT_TEST_DATA")
    if folder is None and data is None:
        skip = pytest.mark.skip(reason="neither --parity-dir nor VITGRAFT_TEST_DATA is set")
        metafunc.parametrize("case", [pytest.param(None, marks=skip, id="none")])
        return
    folder = Path(data or "") / "parity" if folder is None else folder
    files = sorted(folder.glob("*.json"))
    if not files:
        raise pytest.UsageError(f"{folder} holds no cases (NAME.json beside NAME.npz)")
    metafunc.parametrize("case", files, ids=[file.stem for file in files])
