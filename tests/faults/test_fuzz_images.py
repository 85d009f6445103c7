"""Damaged images end in pixels or one line, within bounds of memory and time: SOAK_SEED and SOAK_SECONDS say which."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_media import image_files, try_image
from fuzzing import campaign

MEMORY = 2 << 30
"""The largest image that is taken has 80 million pixels: four bytes of each twice in Pillow, three twice in numpy."""


@pytest.mark.soak
def test_damaged_images(tmp_path: Path) -> None:
    files = image_files()
    assert len(files) > 30
    campaign(try_image, files, tmp_path, memory=MEMORY)
