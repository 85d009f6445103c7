"""What is tried with damaged images and videos, and the whole ones that are damaged."""

from __future__ import annotations

import contextlib
import io
import random
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.decode import decode_frames, decode_label, decode_resized, probe_video
from vitgraft.data_shards.images import decode_image, encode_png, read_header, value_range
from vitgraft.data_shards.pack.reencode import Reencode


def try_image(data: bytes, generator: random.Random) -> None:
    """Every way in which image files are read. Raises what none of them should."""
    for step in (
        lambda: read_header(data, "x"),
        lambda: decode_image(data, "x", generator.randrange(1, 9)),
        lambda: decode_image(data, "x", 1, (0, 4095)),
        lambda: decode_label(data, "x"),
        lambda: encode_png(data, "x"),
        lambda: value_range(data, "x"),
    ):
        with contextlib.suppress(DataError):
            step()
    # One is left to be seen by the caller.
    decode_image(data, "x", 1, (0, 4095))


def try_video(data: bytes, generator: random.Random) -> None:
    """Every way in which videos are read."""
    length = None
    with contextlib.suppress(DataError):
        length = probe_video(data, "x")["frames"]
    numbers = sorted(generator.randrange(20) for _ in range(3))
    for step in (
        lambda: decode_frames(data, numbers, "x", "pyav", length),
        lambda: decode_resized(data, numbers, "x", lambda size: (32, 32), "pyav", length),
        lambda: Reencode(generator.choice(("gop", "frames")), short_side=16).encode(data, "x"),
    ):
        with contextlib.suppress(DataError):
            step()
    probe_video(data, "x")


def image_files() -> list[bytes]:
    """Small images of all formats that are taken, in their usual encodings."""
    random_state = np.random.RandomState(0)
    colour = Image.fromarray(random_state.randint(0, 256, (20, 24, 3)).astype(np.uint8))
    deep = Image.fromarray(random_state.randint(0, 65536, (20, 24)).astype(np.uint16))
    real = Image.fromarray(random_state.rand(20, 24).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    several: dict[str, Any] = {"save_all": True, "append_images": [colour.rotate(180)]}
    wanted: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colour, "JPEG", {"exif": exif}),
        (colour, "JPEG", {"progressive": True, "subsampling": 0}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("L"), "JPEG", {}),
        (colour, "MPO", several),
        (colour, "PNG", {"exif": exif}),
        (colour, "PNG", several),
        (colour.convert("RGBA"), "PNG", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour.convert("1"), "PNG", {}),
        (colour.convert("LA"), "PNG", {}),
        (deep, "PNG", {}),
        (colour, "WEBP", {"exif": exif}),
        (colour, "WEBP", {"lossless": True}),
        (colour, "WEBP", several),
        (colour, "BMP", {}),
        (colour.convert("P"), "BMP", {}),
        (colour, "DIB", {}),
        (colour, "GIF", several),
        (colour.convert("P"), "GIF", {"interlace": 1}),
        *((colour, "TIFF", {"compression": name, "exif": exif}) for name in _COMPRESSIONS),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
        (colour.convert("P"), "TIFF", {}),
        (colour.convert("CMYK"), "TIFF", {}),
        (colour.convert("YCbCr"), "TIFF", {}),
        (colour, "TIFF", several),
        (deep, "TIFF", {}),
        (real, "TIFF", {}),
        (colour, "JPEG2000", {}),
        (deep, "JPEG2000", {}),
        (colour, "AVIF", {}),
        (colour, "AVIF", several),
        (colour, "PPM", {}),
        (colour.convert("1"), "PPM", {}),
        (deep, "PPM", {}),
        (real, "PPM", {}),
        (colour, "TGA", {}),
        (colour.convert("P"), "TGA", {"compression": "tga_rle"}),
        (colour, "PCX", {}),
        (colour.convert("P"), "PCX", {}),
        (colour, "SGI", {}),
        (colour, "QOI", {}),
    ]
    found = [b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12 ", b"P1 3 2 1 0 1 0 1 0 "]
    for image, form, options in wanted:
        stream = io.BytesIO()
        # Which encoders there are differs among builds of Pillow.
        with contextlib.suppress(KeyError, OSError, ValueError, TypeError):
            image.save(stream, form, **options)
            found.append(stream.getvalue())
    return [data for data in found if _is_taken(data)]


_COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")


def _is_taken(data: bytes) -> bool:
    try:
        decode_image(data, "x", 1, (0, 255))
    except DataError:
        return False
    return True


def video_files() -> list[bytes]:
    """Small videos in the usual containers."""
    import av

    random_state = np.random.RandomState(0)
    frames = [random_state.randint(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(20)]
    found = []
    for container, codec in (
        ("mp4", "libx264"),
        ("mp4", "mpeg4"),
        ("mov", "mjpeg"),
        ("mov", "png"),
        ("avi", "mpeg4"),
        ("avi", "rawvideo"),
        ("avi", "ffv1"),
        ("matroska", "libx264"),
        ("matroska", "ffv1"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("mpegts", "mpeg2video"),
        ("mpeg", "mpeg1video"),
        ("flv", "flv"),
        ("asf", "msmpeg4"),
        ("ogg", "libtheora"),
        ("gif", "gif"),
    ):
        with contextlib.suppress(av.FFmpegError, ValueError, KeyError):
            found.append(_encoded(frames, container, codec))
    return [data for data in found if data]


def _encoded(frames: list[Any], container: str, codec: str) -> bytes:
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        video: Any = output.add_stream(codec, rate=Fraction(25))
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = video.codec_context.codec.video_formats[0].name if codec != "rawvideo" else "yuv420p"
        video.gop_size = 8
        for frame in frames:
            output.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=video.pix_fmt)))
        output.mux(video.encode())
    return stream.getvalue()


def _large(mode: str, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8944, 8944)).save(stream, form, **options)
    return stream.getvalue()


LARGEST = {
    "PNG": lambda: _large("RGBA", "PNG"),
    "PNG of 16 bits": lambda: _large("I;16", "PNG"),
    "PNG with a palette": lambda: _large("P", "PNG", transparency=0),
    "JPEG": lambda: _large("CMYK", "JPEG"),
    "GIF": lambda: _large("P", "GIF"),
    "TIFF": lambda: _large("RGB", "TIFF", compression="tiff_adobe_deflate"),
    "TIFF of floats": lambda: _large("F", "TIFF", compression="tiff_adobe_deflate"),
    "WebP": lambda: _large("RGBA", "WEBP", lossless=True, method=0),
}
"""Blank images of as many pixels as are taken."""
