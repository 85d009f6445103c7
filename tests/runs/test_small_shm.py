"""A container's /dev/shm may be far too small for what loader processes hand over."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import executable, processes_naming, tiny_recipe, write_recipe

MOUNT = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_full_dev_shm_is_named_with_its_remedy(semantic_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tiny_recipe("semantic", semantic_data / "train", data__workers=1, data__image_size=[256, 256])
    command = [executable(), "train", str(write_recipe(tmp_path / "recipe.yaml", recipe)), "--run-dir", str(run)]
    mounted = ["unshare", "--mount", "sh", "-c", MOUNT, "sh", *command]
    done = subprocess.run(mounted, capture_output=True, text=True, timeout=200, check=False)
    if "mount:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 5, done.stderr
    assert "no room in /dev/shm for the batches of data workers; enlarge it" in done.stderr
    assert "defect" not in done.stderr
    assert processes_naming(run) == []
