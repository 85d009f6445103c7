"""Pictures that vitgraft draws say so, and replace nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vitgraft.configs.errors import ConfigError
from vitgraft.data_shards.pack.digits import pack_digits
from vitgraft.data_shards.pictures import is_own_picture, write_picture
from vitgraft.data_shards.report import inspect


def test_only_pictures_of_ours_are_replaced(tmp_path: Path) -> None:
    path, picture = tmp_path / "new" / "a.png", Image.new("RGB", (4, 3), "red")
    for colour in ("red", "blue"):
        write_picture(path, Image.new("RGB", (4, 3), colour), "--out new")
        assert is_own_picture(path)
        with Image.open(path) as read:
            assert read.getpixel((0, 0)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    photo, text = tmp_path / "photo.png", tmp_path / "text.png"
    picture.save(photo)
    text.write_text("hello")
    for other in (photo, text):
        before = other.read_bytes()
        with pytest.raises(ConfigError, match=r"--out x: .* exists, and is no picture of vitgraft's"):
            write_picture(other, picture, "--out x")
        assert other.read_bytes() == before
    assert not is_own_picture(tmp_path / "none.png")


def test_inspect_draws_over_its_own_pictures_alone(tmp_path: Path) -> None:
    pack_digits("detection", "val", tmp_path / "set", samples=3)
    for _ in range(2):
        assert len(inspect(tmp_path / "set", 2, tmp_path / "pictures").pictures) == 2
    photo = tmp_path / "photos" / "000000001.png"
    photo.parent.mkdir()
    Image.new("RGB", (4, 3)).save(photo)
    before = photo.read_bytes()
    with pytest.raises(ConfigError, match=r"000000001\.png exists"):
        inspect(tmp_path / "set", 3, photo.parent)
    assert photo.read_bytes() == before
