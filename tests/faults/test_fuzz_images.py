"""Damaged images end in pixels or one line, within bounds of memory and time: SOAK_SEED and SOAK_SECONDS say which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_media import LARGEST, image_files, try_image
from fuzzing import campaign

MEMORY = 2 << 30
"""The largest image that is taken has 80 million pixels: four bytes of each twice in Pillow, three twice in numpy."""


@pytest.mark.soak
def test_damaged_images(tmp_path: Path) -> None:
    files = image_files()
    assert len(files) > 30
    campaign(try_image, files, tmp_path, memory=MEMORY)


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_images_take_no_more_memory_than_is_said(name: str, tmp_path: Path) -> None:
    """Little data, 80 million pixels."""
    lines = (
        "import resource",
        "from pathlib import Path",
        "from vitgraft.data_shards.images import decode_image, value_range",
        f"data = Path({str(tmp_path / 'image')!r}).read_bytes()",
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "decode_image(data, 'x', 6, (0, 4095))",
        "value_range(data, 'x')",
        "print(len(data), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)",
    )
    (tmp_path / "image").write_bytes(LARGEST[name]())
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert size < 8 << 20
    assert peak < MEMORY
