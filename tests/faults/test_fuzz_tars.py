"""Damaged tars, indices and arrays end in samples or one line: SOAK_SEED and SOAK_SECONDS say which and how long."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_tars import (
    arrays,
    indices,
    own_sets,
    tars,
    try_arrays,
    try_foreign_tar,
    try_index_of_foreign_tar,
    try_own_set,
)
from fuzzing import campaign

MEMORY = 1 << 30
"""Far more than these small files hold: what they claim must not be taken."""


@pytest.mark.soak
def test_damaged_tars_of_others(tmp_path: Path) -> None:
    campaign(try_foreign_tar, tars(), tmp_path, memory=MEMORY)


@pytest.mark.soak
def test_damaged_packed_sets(tmp_path: Path) -> None:
    campaign(try_own_set, own_sets(), tmp_path, memory=MEMORY)


@pytest.mark.soak
def test_damaged_indices_of_foreign_tars(tmp_path: Path) -> None:
    campaign(try_index_of_foreign_tar, indices(), tmp_path, memory=MEMORY)


@pytest.mark.soak
def test_damaged_arrays(tmp_path: Path) -> None:
    campaign(try_arrays, arrays(), tmp_path, memory=MEMORY)
