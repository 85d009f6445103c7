"""Labels, manifests and class lists, changed at random: each is taken, or answered with one line, within bounds.

``make soak``; ``SOAK_SEED`` and ``SOAK_SECONDS`` say which and how many.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz_labels import originals, try_class_list, try_foreign_boxes, try_labels, try_manifest
from fuzzing import Target, campaign

MEMORY = 512 << 20
"""The inputs are of a few kB, at most one MiB; most of this is what the first packing loads."""


@pytest.mark.soak
@pytest.mark.parametrize("target", [try_labels, try_foreign_boxes, try_manifest, try_class_list])
def test_changed_labels_and_manifests(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert os.environ["TMPDIR"]
    campaign(target, originals()[target], tmp_path, memory=MEMORY)
