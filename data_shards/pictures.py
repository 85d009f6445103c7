"""PNGs drawn by vitgraft, which are marked as such and overwrite no other file."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.outputs import write_output

_MAKER = "vitgraft"


def encoded(picture: Image.Image) -> bytes:
    """Return a picture as a PNG file whose metadata names vitgraft."""
    facts, stream = PngInfo(), io.BytesIO()
    facts.add_text("Software", _MAKER)
    picture.save(stream, "PNG", pnginfo=facts)
    return stream.getvalue()


def is_own_picture(path: Path) -> bool:
    """Tell whether a file is a PNG that vitgraft made."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == _MAKER
    except Exception:  # Pillow raises anything of what is no image
        return False


def write_picture(path: Path, picture: Image.Image, option: str) -> None:
    """Write a PNG; of what is there only a picture of ours is replaced.

    Args:
        option: names the place in errors.

    Raises:
        ConfigError: the file is not a picture of vitgraft's, or cannot be written.
    """
    if path.exists() and not is_own_picture(path):
        raise ConfigError(f"{option}: {path} exists, and is no picture of vitgraft's; choose another folder")
    write_output(path, encoded(picture), option)
