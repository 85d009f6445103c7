"""Damaged videos end in frames or one line, within bounds of memory and time: SOAK_SEED and SOAK_SECONDS say which."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_media import try_video, video_files
from fuzzing import campaign

MEMORY = 2 << 30
"""A clip of 2^28 pixels of three bytes, a frame of 40 million twice, and what the decoder refers to."""


@pytest.mark.soak
def test_damaged_videos(tmp_path: Path) -> None:
    files = video_files()
    assert len(files) > 10
    campaign(try_video, files, tmp_path, memory=MEMORY)
