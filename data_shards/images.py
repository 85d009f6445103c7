"""Image files: headers and pixels, in display orientation, with bounded sizes and clear errors."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from vitgraft.configs.errors import ConfigError, DataError

Values = tuple[float, float]
"""Values of black and white."""

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded."""
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
"""Suffixes of packed members."""

_PACKED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are packed as they are. MPO: a JPEG behind which lie more, as phones write them; all decoders take the
first."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "TGA", "PCX", "SGI", "QOI")
"""Decoded formats. Excluded are those that run a program (EPS), contain other formats (ICO, ICNS, IPTC), or are
stubs."""
_ROWS_PIXELS = 1 << 20
_OPPOSITE = {6: 8, 8: 6}
"""Of quarter turns; all other orientations are their own opposite."""
_OF_FRAMES = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")


class Header(NamedTuple):
    """Properties stated by an image file's header.

    ``size``: (height, width) of the stored pixels. ``orientation``: EXIF's, 1 to 8; from 5 on the displayed image has
    the sides exchanged. ``format``: Pillow's name. ``several``: it has more frames or pages than the first, which is
    what is decoded. ``depth``: 8, 16 or 32 bits for each value. ``grey``: it has one channel of more than 8 bits.
    """

    size: tuple[int, int]
    orientation: int
    format: str
    several: bool
    depth: int
    grey: bool

    @property
    def displayed(self) -> tuple[int, int]:
        """(height, width) after the orientation."""
        return oriented_size(self.size, self.orientation)

    @property
    def extension(self) -> str | None:
        """Extension of the packed member; ``None``: the format is not a packed one."""
        return _PACKED.get(self.format)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the names in ``_FORMATS`` that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def opened(data: bytes | Path, where: str) -> Iterator[Image.Image]:
    """Open an image of bounded size; whatever Pillow raises inside the block becomes a DataError.

    Besides Pillow's work the block should do nothing that can fail.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width}x{image.height}"
                    raise DataError(f"{where}: {size} pixels, more than {MAX_PIXELS}; shrink the image")
                yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; check the path") from None
    except MemoryError:
        raise DataError(f"{where}: decoding takes more memory than there is; shrink or replace the image") from None
    except Exception as error:  # its decoders raise anything of damaged files: KeyError, AssertionError, zlib.error
        # Pillow's own text names an object by its address, another in each process.
        reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise DataError(f"{where}: broken image ({reason}); expected a whole image file; replace it") from None


def read_header(data: bytes | Path, where: str) -> Header:
    """Read what the file says of itself, without decoding.

    Raises:
        DataError: no such file, not an image, or more than ``MAX_PIXELS``.
    """
    with opened(data, where) as image:
        orientation, size = _orientation(image), (image.height, image.width)
        kind, several = str(image.format), False
        if kind in _OF_FRAMES:
            # What follows the first frame is not decoded, so it may be damaged.
            with suppress(Exception):
                several = bool(getattr(image, "is_animated", False))
        # Of TIFF alone Pillow gives the displayed size.
        depth, grey = _depth(image), image.mode.startswith(("I", "F"))
    return Header(oriented_size(size, orientation) if kind == "TIFF" else size, orientation, kind, several, depth, grey)


def _depth(image: Image.Image) -> int:
    """Return the bits for each value. Of 16 bits in colours Pillow decodes the upper 8 alone."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return 32
    raw = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    return 16 if image.mode.startswith("I") or ";16" in raw else 8


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or the EXIF is damaged."""
    with suppress(Exception):
        # Not the method of PNG, which decodes all pixels for an EXIF that may lie behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        if type(value) is int and 1 <= value <= 8:
            return value
    return 1


def oriented_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return (height, width) after an orientation."""
    return (size[1], size[0]) if orientation >= 5 else size


def turned(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return a view of stored pixels (H, W, …) as they are displayed under an EXIF orientation (1 to 8)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


def orientation_of(metadata: dict[str, Any], where: str) -> int:
    """Return the EXIF orientation to apply to a packed sample's image: 1 where its metadata has no such key.

    Raises:
        DataError: it is none of EXIF's.
    """
    value = metadata.get("orientation", 1)
    if type(value) is not int or not 1 <= value <= 8:
        raise DataError(f"{where}: metadata says orientation {str(value)[:40]!r}, expected 1 to 8; pack again")
    return value


def image_size(data: bytes | Path, where: str) -> tuple[int, int]:
    """Return (height, width) of the stored pixels from the header, without decoding.

    Raises:
        DataError: no such file, not an image, or more than ``MAX_PIXELS``.
    """
    return read_header(data, where).size


def image_format(data: bytes | Path, where: str) -> str:
    """Return the member extension of an image by its content: jpg, png or webp.

    Raises:
        DataError: no image, or one of another format.
    """
    header = read_header(data, where)
    if header.extension is None:
        raise DataError(f"{where}: an image of format {header.format}; expected JPEG, PNG or WebP")
    return header.extension


def decode_image(data: bytes | Path, where: str, orientation: int = 1, values: Values | None = None) -> Tensor:
    """Return pixels (3, H, W) uint8 RGB, in memory with the channels last, as torch resizes them twice as fast.

    16-bit grey is scaled to 8 bits, transparency dropped.

    Args:
        orientation: EXIF's, to be applied. That of the file itself is not looked at: annotations may be in the
            coordinates of the stored pixels.
        values: what is black and what is white in grey of more than 8 bits; ``None``: 0 and 65535.

    Raises:
        DataError: broken, too large, or of 32 bits without ``values``; names ``where``.
    """
    with opened(data, where) as image:
        pixels = _stored(image, where, values)
        pixels = np.ascontiguousarray(turned(pixels, orientation))
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def encode_png(data: bytes | Path, where: str, values: Values | None = None) -> bytes:
    """Return a PNG of the stored pixels, without loss: 8-bit or 16-bit grey, or RGB; transparency dropped.

    Args:
        values: as of :func:`decode_image`; grey of more than 8 bits is scaled to 8, and stays 16-bit without.

    Raises:
        DataError: as :func:`decode_image`.
    """
    stream = io.BytesIO()
    with opened(data, where) as image:
        pixels = np.ascontiguousarray(_stored(image, where, values, keep=True))
        Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def is_narrow(found: Values, most: float) -> bool:
    """Tell whether the values span less than a tenth of 0 to ``most``: unscaled, such images are nearly black."""
    return found[1] - found[0] < most / 10


def range_for(high: float) -> str:
    """Return the ``--range`` option suited to values up to ``high``, e.g. of 10, 12 or 14 bits."""
    return f"--range 0,{2 ** max(1, int(high)).bit_length() - 1}"


def parse_range(text: str) -> Values | None:
    """Return the values of black and white that ``--range`` gives; ``None`` for an empty text.

    Raises:
        ConfigError: not two numbers, the larger one last.
    """
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not -1e12 < low < high < 1e12:
        raise ConfigError(f"--range {text}: expected the values of black and of white, the larger one, e.g. 0,4095")
    return low, high


def value_range(data: bytes | Path, where: str) -> Values:
    """Return the smallest and the largest value of all channels, decoded at the depth that Pillow gives.

    Raises:
        DataError: broken or too large.
    """
    with opened(data, where) as image:
        pixels = np.asarray(image)
        low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"{where}: holds values that are not finite; convert it to 8 bits")
    return low, high


def _stored(image: Image.Image, where: str, values: Values | None, keep: bool = False) -> npt.NDArray[Any]:
    """Return pixels as stored: (H, W, 3), or (H, W) of grey alone, uint8; with ``keep`` 16-bit grey stays uint16."""
    # Of TIFF alone Pillow applies the orientation when it decodes, after which it is forgotten.
    own = _orientation(image) if image.format == "TIFF" else 1
    depth, grey = _depth(image), image.mode.startswith(("I", "F"))
    if grey and depth > 16 and values is None:
        raise DataError(f"{where}: values of 32 bits; --range LOW,HIGH says which of them are black and white")
    pixels: npt.NDArray[Any]
    if grey and values is not None:
        pixels = _by_rows(np.asarray(image), np.uint8, functools.partial(_scaled, values=values))
    elif grey and keep:
        pixels = _by_rows(np.asarray(image), np.uint16, lambda rows: np.clip(rows, 0, 65535))
    elif grey:
        pixels = _by_rows(np.asarray(image), np.uint8, lambda rows: np.clip(rows, 0, 65535) >> 8)
    elif image.mode in ("1", "L"):
        pixels = np.asarray(image.convert("L"))
    else:
        # Without a copy; numpy marks the array read-only, though its memory is not shared.
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return turned(pixels, _OPPOSITE.get(own, own))


def _scaled(rows: npt.NDArray[Any], values: Values) -> npt.NDArray[Any]:
    low, high = values
    scaled = np.nan_to_num((rows.astype(np.float64) - low) * (255 / (high - low)))
    return np.clip(np.rint(scaled), 0, 255)


def _by_rows(
    pixels: npt.NDArray[Any], dtype: Any, function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """Apply ``function`` to all pixels (H, W), some rows at a time, as its temporaries take several times as much."""
    made = np.empty(pixels.shape, dtype)
    step = max(1, _ROWS_PIXELS // max(1, pixels.shape[1]))
    for first in range(0, len(pixels), step):
        made[first : first + step] = function(pixels[first : first + step])
    return made


def load_image(path: Path | str, values: Values | None = None) -> tuple[Tensor, int]:
    """Load an image file as displayed: pixels (3, H, W) uint8 RGB, and the EXIF orientation that was applied.

    Args:
        values: as of :func:`decode_image`.

    Raises:
        DataError: missing, broken, too large, or 16-bit grey that would be all but black without ``values``.
    """
    path = Path(path)
    header = read_header(path, str(path))
    if header.grey and header.depth == 16 and values is None:
        low, high = found = value_range(path, str(path))
        if is_narrow(found, 65535):
            raise DataError(
                f"{path}: 16-bit values from {low:g} to {high:g}, less than a tenth of 0 to 65535, would be all but "
                f"black; pass {range_for(high)}, or the range with which the training data was packed"
            )
    return decode_image(path, str(path), header.orientation, values), header.orientation
